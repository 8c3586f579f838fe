"""Values that belong to objects of others, such as the clock of a model."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import ref

T = TypeVar("T")


class _Held:
    """A value in the `__dict__` of its owner. Copies and pickles are empty: a copied model has a clock of its own."""

    def __init__(self, owner: Any = None, value: Any = None) -> None:
        self.owner = None if owner is None else ref(owner)
        self.value = value

    def __deepcopy__(self, memo: Any) -> "_Held":
        return _Held()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Held, ()


_NOTHING = _Held()


class PerObject(Generic[T]):
    """A value per object, which the object itself holds.

    Most such values point back to their object. In a `WeakKeyDictionary` they would keep it alive for ever; here both
    are one cycle, which the garbage collector takes when nobody else has the object.

    Args:
        name: of the attribute, without underscores in front.
    """

    def __init__(self, name: str) -> None:
        self.name = f"_pysteer_{name}"

    def get(self, obj: Any, make: Callable[[], T]) -> T:
        """The value of `obj`; made and kept where it has none."""
        found = self.find(obj)
        if found is None:
            found = make()
            self.set(obj, found)
        return found

    def find(self, obj: Any) -> T | None:
        """The value of `obj`, None where it has none."""
        held = vars(obj).get(self.name, _Held())
        return (
            held.value if held.owner is not None and held.owner() is obj else None
        )  # a shallow copy has the original's

    def set(self, obj: Any, value: T) -> None:
        """Give `obj` a value."""
        vars(obj)[self.name] = _Held(obj, value)

    def drop(self, obj: Any) -> None:
        """Take the value of `obj` away, if it has one."""
        vars(obj).pop(self.name, None)
