"""Formats of others, brought into ours and, for maps and vectors, back. Pickles are read here, with nothing to run.

A kind of conversion is an entry of `KINDS`; a folder that `Fitted.save_pretrained` wrote is converted back.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pysteer.convert import infinity
from pysteer.convert.control_vectors import (
    ControlVectorOptions,
    convert_control_vector,
    load_control_vector,
    save_control_vector,
)
from pysteer.convert.ml_act import MLActOptions, convert_ml_act, load_ml_act, save_ml_act
from pysteer.convert.saes import (
    DictionaryOptions,
    SAELensOptions,
    SparsifyOptions,
    UnboxOptions,
    finish,
    load_dictionary,
    load_saelens,
    load_sparsify,
    load_unbox,
)
from pysteer.errors import InputError
from pysteer.steering.site import did_you_mean


class Kind(NamedTuple):
    """A kind of conversion: the dataclass of its options, and what converts `source` to `out` and says what it did."""

    options: type
    run: Callable[[Path, Path, Any], str]


def _sae(load: Callable[..., Any]) -> Callable[[Path, Path, Any], str]:
    return lambda source, out, options: finish(load(source, **vars(options)), out)


KINDS = {
    "infinity-transformer": Kind(infinity.InfinityOptions, infinity.convert_transformer),
    "infinity-vae": Kind(infinity.InfinityVAEOptions, infinity.convert_vae),
    "ml-act": Kind(MLActOptions, convert_ml_act),
    "control-vector": Kind(ControlVectorOptions, convert_control_vector),
    "sae-sparsify": Kind(SparsifyOptions, _sae(load_sparsify)),
    "sae-saelens": Kind(SAELensOptions, _sae(load_saelens)),
    "sae-dictionary": Kind(DictionaryOptions, _sae(load_dictionary)),
    "sae-unbox": Kind(UnboxOptions, _sae(load_unbox)),
}


def find_kind(name: str) -> Kind:
    """The kind of conversion of that name.

    Raises:
        InputError: there is none.
    """
    if name not in KINDS:
        raise InputError("kind of weights", value=name, allowed=", ".join(KINDS), fix=did_you_mean(name, KINDS))
    return KINDS[name]


__all__ = [
    "KINDS",
    "Kind",
    "find_kind",
    "load_control_vector",
    "load_dictionary",
    "load_ml_act",
    "load_saelens",
    "load_sparsify",
    "load_unbox",
    "save_control_vector",
    "save_ml_act",
]
