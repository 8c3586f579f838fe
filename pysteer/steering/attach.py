"""Attach to modules of a live model and leave it as it was.

The class of the target module is swapped for a cached subclass with the same name. Its `forward` runs the base class
and then whatever is attached; with nothing attached it passes through. The module stays the same object, with the same
children and state_dict keys. Libraries such as accelerate put a `forward` on the instance, which hides that of the
class; there a second subclass is used, whose `__call__` does it. Forward hooks are not used: inside a compiled frame
they are ignored.

What is attached is held in a tuple of plain objects and read by plain attribute access: a compiled graph guards that,
but not the absence of a key in `module.__dict__`.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from operator import contains, is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from pysteer.errors import InputError, PysteerError
from pysteer.steering.site import Site, did_you_mean

_KEYS = ("_steer_fwd", "_steer_call")
_FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


class Applier(Protocol):
    """What can be attached to a site."""

    def apply(self, x: Tensor) -> Tensor:
        """The activation that takes the place of `x`."""

    def to(self, device: torch.device) -> object:
        """Follow the module to `device`."""


def _replaced(output: Any, applier: Applier, element: int | str | None) -> Any:
    """`output` with the tensor at `element` replaced by what the applier makes of it."""
    if isinstance(output, Tensor):
        if element is not None and element != 0:
            raise PysteerError(f"a steered module returned one tensor, but its site names element {element!r}")
        return applier.apply(output)
    if isinstance(output, dict):
        keys = list(output.keys())
        key = keys[element] if isinstance(element, int) and element < len(keys) else element
        if key not in keys:
            raise PysteerError(f"a steered module returned {keys}, but its site names element {element!r}")
        return type(output)(**{**output, key: _replaced(output[key], applier, None)})
    if isinstance(output, (tuple, list)):
        if not isinstance(element, int) or not -len(output) <= element < len(output):
            raise PysteerError(
                f"a steered module returned {len(output)} elements, but its site names element {element!r}"
            )
        items = list(output)
        items[element] = _replaced(items[element], applier, None)
        if hasattr(output, "_fields"):
            return type(output)(*items)
        return items if isinstance(output, list) else tuple(items)
    raise PysteerError(f"a steered module returned {type(output).__name__}; allowed: Tensor, tuple, list, dict")


def _run_forward(base: type[nn.Module]) -> Callable[..., Any]:
    traced = base.forward  # a graph cannot look it up in a class that is allowed in graphs, as those of diffusers are

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = traced if is_compiling() else base.forward
        output = run(self, *args, **kwargs)
        # The default serves a bound method that outlives the swap (a compiled child, a hook that was removed).
        for applier, element in getattr(self, "_steer_fwd", ()):
            output = _replaced(output, applier, element)
        return output

    return functools.update_wrapper(forward, base.forward)


def _run_call(base: type[nn.Module]) -> Callable[..., Any]:
    traced = base.__call__

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = traced if is_compiling() else base.__call__
        output = run(self, *args, **kwargs)
        for applier, element in getattr(self, "_steer_call", ()):
            output = _replaced(output, applier, element)
        return output

    return functools.update_wrapper(__call__, base.__call__)


def _first_tensor(module: nn.Module) -> Tensor | None:
    return next(module.parameters(), next(module.buffers(), None))


def _follow_device(base: type[nn.Module]) -> Callable[..., Any]:
    """`_apply` that moves what is attached with the module, but never casts it: a strength is not a weight."""

    def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        weight = _first_tensor(self)
        before = weight.device if weight is not None else None
        result = base._apply(self, fn, *args, **kwargs)
        for applier, _ in (entry for key in _KEYS for entry in getattr(self, key, ())):
            where = getattr(applier, "device", None) or before
            target = fn(torch.empty(0, device=where)).device if where is not None else where
            if target != where:
                applier.to(target)
        return result

    return _apply


def _plain_reduce(base: type[nn.Module]) -> Callable[..., Any]:
    """`__reduce_ex__` under which a copy or a pickle is an instance of the base class with nothing attached."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # Protocol 1 names the class in an argument; from 2 on pickle insists that it is the class of the object.
        own_way = base.__reduce_ex__ is not object.__reduce_ex__
        reduced = base.__reduce_ex__(self, protocol if own_way else 1)
        if isinstance(reduced, str):
            return reduced
        function, arguments, *rest = reduced
        own = type(self) if "_steer_base" in type(self).__dict__ else None
        arguments = tuple(base if argument is own else argument for argument in arguments)
        if rest and isinstance(rest[0], dict):
            rest[0] = {key: value for key, value in rest[0].items() if key not in _KEYS}
        return (base if function is own else function, arguments, *rest)

    return __reduce_ex__


def _plain_deepcopy(base: type[nn.Module]) -> Callable[..., Any]:
    """`__deepcopy__` that copies the module as it is without steering, in the way of its own class."""

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> Any:
        held = {key: self.__dict__.pop(key) for key in _KEYS if key in self.__dict__}
        own = type(self)
        try:
            if "_steer_base" in own.__dict__:
                _restore_class(self)
                return copy.deepcopy(self, memo)
            # A class on top of ours, such as that of a parametrized module, which cannot be pickled.
            replica = own.__new__(own)
            memo[id(self)] = replica
            replica.__dict__ = copy.deepcopy(self.__dict__, memo)
            return replica
        finally:
            object.__setattr__(self, "__class__", own)
            self.__dict__.update(held)

    return __deepcopy__


def _steered_class(base: type[nn.Module]) -> type[nn.Module]:
    """The steered subclass of `base`, made once: a new class per site would cost a new graph per site.

    It is kept on the base class, so that the two are collected together.
    """
    known = base.__dict__.get("_steer_class")
    if known is not None:
        return known
    namespace: dict[str, Any] = {
        **_names(base),
        "_steer_base": base,
        "_steer_fwd": (),
        "_steer_call": (),
        # In the namespace, not set afterwards: transformers wraps it there for gradient checkpointing.
        "forward": _run_forward(base),
        "_apply": _follow_device(base),
        "__reduce_ex__": _plain_reduce(base),
        "__deepcopy__": _plain_deepcopy(base),
    }
    metaclass: Any = type(base)
    steered = metaclass(base.__name__, (base,), namespace)
    base._steer_class = steered  # type: ignore[attr-defined]
    return steered


def _calling_class(steered: type[nn.Module]) -> type[nn.Module]:
    """The subclass whose `__call__` steers too; apart, because a `__call__` in Python makes every call slower."""
    known = steered.__dict__.get("_steer_calling")
    if known is not None:
        return known
    # What stands on top of a steered class, such as that of a parametrized module, is what the module goes back to.
    base = steered.__dict__.get("_steer_base", steered)
    namespace = {**_names(steered), "_steer_base": base, "_steer_calls": True, "__call__": _run_call(steered)}
    metaclass: Any = type(steered)
    calling = metaclass(steered.__name__, (steered,), namespace)
    steered._steer_calling = calling  # type: ignore[attr-defined]
    return calling


def _names(base: type[nn.Module]) -> dict[str, Any]:
    return {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}


def _swap_class(module: nn.Module, key: str) -> None:
    own = type(module)
    # With a steered class anywhere among the bases (FSDP or parametrize on top), swapping again would steer twice.
    wanted = own if hasattr(own, "_steer_base") else _steered_class(own)
    if key == "_steer_call" and not hasattr(wanted, "_steer_calls"):
        wanted = _calling_class(wanted)
    if wanted is not own:
        object.__setattr__(module, "__class__", wanted)


def _restore_class(module: nn.Module) -> None:
    base = type(module).__dict__.get("_steer_base")
    if base is not None:
        object.__setattr__(module, "__class__", base)


def _get(module: nn.Module, key: str) -> tuple[Any, ...]:
    return module.__dict__.get(key, ())


def _set(module: nn.Module, key: str, entries: tuple[Any, ...]) -> None:
    # Not setattr: OptimizedModule passes that on to the module it wraps.
    if entries:
        _swap_class(module, key)
        module.__dict__[key] = entries
        return
    module.__dict__.pop(key, None)
    if not any(_get(module, other) for other in _KEYS):
        _restore_class(module)


def _inner(module: nn.Module) -> nn.Module:
    """The module inside a `torch.compile(module)` wrapper, else the module itself."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds; without it there is no wrapper
    return module._orig_mod if dynamo is not None and isinstance(module, dynamo.OptimizedModule) else module


def _settle(outer: nn.Module) -> None:
    """Hold the entries where they run: in `forward`, or in `__call__` when the instance has a `forward` of its own."""
    inner = _inner(outer)
    if "forward" not in inner.__dict__:
        return
    entries = _get(inner, "_steer_fwd") + _get(inner, "_steer_call")
    if outer is not inner:
        # A compiled wrapper keeps the bound `__call__` that it found, so a later one of the inner module is not seen.
        entries += _get(outer, "_steer_call")
        _set(inner, "_steer_call", ())
    _set(outer, "_steer_call", entries)
    _set(inner, "_steer_fwd", ())


def _refuse_bypassed(chain: list[tuple[str, nn.Module]], path: str, name: str) -> None:
    """Raise for modules whose owner reads their weights without calling them, and for classes that cannot be swapped.

    Args:
        chain: (child name, module) from the root down to the target.
    """
    target = _inner(chain[-1][1])
    if isinstance(target, (torch.fx.GraphModule, torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise InputError(
            f"site {name} is a traced or scripted module",
            value=f"{type(target).__name__} at {path!r}",
            allowed="a plain nn.Module",
            fix="attach before tracing or scripting, or attach to the module around it",
        )
    child = chain[-1][0]
    parents = [_inner(module) for _, module in chain[:-1]]
    parent = parents[-1] if parents else None
    reason, fix = "", "attach to the module around it"
    if any(isinstance(module, nn.MultiheadAttention) for module in parents):
        reason = "MultiheadAttention uses the weights of its children without calling them"
    elif any(isinstance(m, nn.TransformerEncoderLayer) for m in parents) and torch.backends.mha.get_fastpath_enabled():
        reason = "TransformerEncoderLayer skips its children on the fast path"
        fix = "attach to the layer, or call torch.backends.mha.set_fastpath_enabled(False) first"
    elif child in _FUSED and getattr(parent, "fused_projections", False):
        reason, fix = "its projections are fused and this one is never called", "unfuse the projections first"
    if reason:
        raise InputError(f"site {name} would never run: {reason}", value=path, fix=fix)


def _locate(root: nn.Module, path: str, name: str) -> list[tuple[str, nn.Module]]:
    """(child name, module) from the root to `path`, after checking that the last can be steered; an OptimizedModule
    stays as it is.
    """
    chain = [("", root)]
    for child in path.split(".") if path else []:
        module = getattr(chain[-1][1], child, None)
        if not isinstance(module, nn.Module):
            children = [key for key, _ in chain[-1][1].named_children()]
            raise InputError(
                f"site {name}: no module {child!r} on the way",
                value=path,
                allowed=", ".join(children[:12]) + (", ..." if len(children) > 12 else ""),
                fix=did_you_mean(child, children),
            )
        chain.append((child, module))
    _refuse_bypassed(chain, path, name)
    return chain


_Link = tuple[dict[str, nn.Module | None], str, nn.Module]  # children of a module, name of a child, the child


@dataclass
class _Point:
    """One thing attached at one place; `entry` is found again by identity.

    `links` led from the root to the module, when last looked at; empty where that has to be looked at every time.
    `fusing` may fuse its projections, the module among them.
    """

    name: str
    path: str
    entry: tuple[Applier, int | str | None]
    module: nn.Module
    holders: list[nn.Module] = field(default_factory=list)
    links: tuple[_Link, ...] = ()
    fusing: nn.Module | None = None

    def remember(self, chain: list[tuple[str, nn.Module]]) -> None:
        """Keep the way to the module, if nothing but its modules decides that it can be steered."""
        owners = [_inner(module) for _, module in chain[:-1]]
        steps = zip(owners, chain[1:], strict=True)
        links = tuple((owner._modules, child, module) for owner, (child, module) in steps)
        known = all(children.get(child) is module for children, child, module in links)
        switched = any(isinstance(owner, nn.TransformerEncoderLayer) for owner in owners)  # by a global setting
        self.links = links if known and not switched else ()
        self.fusing = owners[-1] if chain[-1][0] in _FUSED else None


@dataclass(frozen=True)
class _Seen:
    """What was found at the last look, side by side, so that looking whether it is still so takes a few calls in all.

    Attributes:
        children, names, there: `children[i].get(names[i]) is there[i]`, the links of all points, each once.
        modules, classes: the modules of the points, and their classes.
        own: their `__dict__`, in which a `forward` would hide that of the class.
        fusing: modules that may fuse projections, which then do not run.
    """

    children: tuple[dict[str, nn.Module | None], ...]
    names: tuple[str, ...]
    there: tuple[nn.Module, ...]
    modules: tuple[nn.Module, ...]
    classes: tuple[type[nn.Module], ...]
    own: tuple[dict[str, Any], ...]
    fusing: tuple[nn.Module, ...]

    @classmethod
    def at(cls, points: list[_Point]) -> "_Seen | None":
        """What is there now; None where a point has to be looked at every time."""
        modules = tuple(point.module for point in points)
        classes = tuple(map(type, modules))
        if not all(point.links or not point.path for point in points):
            return None
        if not all(hasattr(each, "_steer_base") for each in classes) or any("forward" in vars(m) for m in modules):
            return None
        every = [link for point in points for link in point.links]
        links = {(id(children), name): (children, name, module) for children, name, module in every}.values()
        children, names, there = zip(*links, strict=True) if links else ((), (), ())
        fusing = {id(point.fusing): point.fusing for point in points if point.fusing is not None}
        return cls(children, names, there, modules, classes, tuple(map(vars, modules)), tuple(fusing.values()))

    def holds(self) -> bool:
        """Whether all of it is still so."""
        return (
            all(map(is_, map(dict.get, self.children, self.names), self.there))
            and all(map(is_, map(type, self.modules), self.classes))
            and not any(map(contains, self.own, repeat("forward")))
            and not any(getattr(module, "fused_projections", False) for module in self.fusing)
        )


class Attachment:
    """What `attach` attached; `detach()` takes it away again, also as a context manager."""

    def __init__(self, root: nn.Module, points: list[_Point]) -> None:
        self._root = root
        self._points = points
        self._seen: _Seen | None = None

    def ensure(self) -> None:
        """Notice what others did to the modules since: follow a replaced `forward`, report a module that is gone.

        Raises:
            PysteerError: another module is at the place of a site now, so the site would never run.
        """
        # Done at every run, where a look at the way to every module would cost a percent of a step.
        if self._seen is not None and self._seen.holds():
            return
        for point in self._points:
            chain = _locate(self._root, point.path, point.name)
            outer = chain[-1][1]
            if _inner(outer) is not point.module:
                raise PysteerError(
                    f"site {point.name}: the module at {point.path!r} was replaced by a {type(outer).__name__} after "
                    "steering was attached; fix: leave the context, make the replacement, and steer again"
                )
            if outer not in point.holders:
                point.holders.append(outer)
            if not hasattr(type(point.module), "_steer_base") and _get(point.module, "_steer_fwd"):
                _swap_class(point.module, "_steer_fwd")  # somebody put the original class back
            _settle(outer)
            point.remember(chain)
        self._seen = _Seen.at(self._points)

    def detach(self) -> None:
        """Take away what was attached; harmless when done twice."""
        for point in self._points:
            for holder in point.holders:
                for key in _KEYS:
                    entries = _get(holder, key)
                    if entries:
                        _set(holder, key, tuple(entry for entry in entries if entry is not point.entry))
        self._points, self._seen = [], None

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def attach(root: nn.Module, entries: Mapping[Any, Applier] | Iterable[tuple[Site | str, Applier]]) -> Attachment:
    """Attach appliers to modules of `root`; several at one place run in the order given.

    Args:
        root: the module that paths start from.
        entries: (site or module path, applier) pairs, or a mapping. With a plain path the module returns one tensor.

    Returns:
        The attachment; call `detach()` or use it as a context manager.

    Raises:
        InputError: no module at the path, or one that would never run; nothing is attached then.
    """
    pairs = entries.items() if isinstance(entries, Mapping) else entries
    points: list[_Point] = []
    for where, applier in pairs:
        site = where if isinstance(where, Site) else Site(name=where or "root", path=where)
        outer = _locate(root, site.path, site.name)[-1][1]
        entry = (applier, site.element)
        points.append(_Point(site.name, site.path, entry, _inner(outer), [_inner(outer)]))
    for point in points:
        _set(point.module, "_steer_fwd", (*_get(point.module, "_steer_fwd"), point.entry))
    attachment = Attachment(root, points)
    attachment.ensure()
    return attachment
