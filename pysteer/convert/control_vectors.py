"""Control vectors in GGUF files, as repeng and llama.cpp write and read them, both ways.

A file holds a vector `direction.N` for the output of block N, counted from 0, which is added to it: the site `block.N`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.capture.fitted import Fitted
from pysteer.convert.ml_act import is_fitted
from pysteer.convert.reading import check_vector
from pysteer.errors import InputError
from pysteer.methods.vector_steering import VectorSteering
from pysteer.steering.plan import Plan, SiteParameters

_ARCHITECTURE = "controlvector"
_HINT = f"{_ARCHITECTURE}.model_hint"
_LARGEST_FILE = 1024 * 1024 * 1024
_MOST_LAYERS = 4096
_BLOCK = re.compile(r"(?:.*\.)?(?:block|blocks|layers|h)\.(\d{1,4})")


@dataclass(frozen=True)
class ControlVectorOptions:
    """Options of `load_control_vector` and `save_control_vector`.

    Attributes:
        model_hint: kind of model that the file is for, such as llama; for writing, where the parameters do not say.
    """

    model_hint: str = ""


def load_control_vector(path: str | Path) -> Fitted:
    """Read a GGUF file as vectors at the sites `block.N`; strength is the coefficient.

    Raises:
        InputError: no GGUF file, another kind of it, no directions, quantised ones, widths that differ, NaN.
    """
    fields, tensors = _read_gguf(Path(path))
    architecture = fields.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise InputError("kind of GGUF file", value=architecture, allowed=_ARCHITECTURE, fix="give a control vector")
    vectors: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"direction\.(\d{1,4})", name)
        if found is None or int(found[1]) >= _MOST_LAYERS:
            raise InputError("tensor of a control vector", value=name, allowed="direction.N with the number of a block")
        width = len(next(iter(vectors.values()))) if vectors else None
        if int(found[1]) in vectors:
            raise InputError("two directions of a block", value=name, allowed="one")
        vectors[int(found[1])] = check_vector(tensor, width, f"control vector {name}")
    if not vectors:
        raise InputError("control vector", value=str(path), allowed="at least one tensor direction.N")
    method = VectorSteering()
    parameters = []
    for layer, vector in sorted(vectors.items()):
        fit = method.given(vector)
        banks = {name: tensor[None] for name, tensor in fit.tensors.items()}
        parameters.append(SiteParameters(f"block.{layer}", method.op, None, banks, fit.options))
    return Fitted(method, parameters, {"source": "control vector", "model_hint": str(fields.get(_HINT, ""))})


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Text fields, and tensors by name, of a GGUF file."""
    import gguf

    if not path.is_file():
        raise InputError("control vector not found", value=str(path), fix="check the path")
    if path.stat().st_size > _LARGEST_FILE:
        raise InputError("size of a control vector", value=f"{path.stat().st_size} bytes", allowed=f"{_LARGEST_FILE}")
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    try:
        _walk(path.read_bytes())
        reader = gguf.GGUFReader(path)
        text = (gguf.GGUFValueType.STRING,)
        fields = {
            name: bytes(field.parts[-1]).decode("utf-8")
            for name, field in reader.fields.items()
            if tuple(field.types) == text
        }
        tensors = {}
        for tensor in reader.tensors:
            if tensor.tensor_type not in plain:
                raise InputError(f"type of {tensor.name}", value=tensor.tensor_type.name, allowed="F32, F16")
            tensors[tensor.name] = torch.from_numpy(tensor.data.copy())
    except InputError:
        raise
    # The reader trusts the file: a damaged one makes it fail in every way there is.
    except Exception as error:
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise InputError(
            f"control vector is truncated or not GGUF ({reason})",
            value=f"{path} ({path.stat().st_size} bytes)",
            allowed="a complete .gguf file",
            fix="fetch it again",
        ) from error
    return fields, tensors


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the types of a field
_TEXT, _ARRAY = 8, 9


def _walk(data: bytes) -> None:
    """Raise a ValueError where a field of the header is longer than the file, which the reader would count through."""

    def number(place: int, size: int) -> int:
        if place + size > len(data):
            raise ValueError("the header ends too early")
        return int.from_bytes(data[place : place + size], "little")

    def behind(place: int, kind: int, depth: int = 0) -> int:
        if kind == _TEXT:
            return place + 8 + number(place, 8)
        if kind != _ARRAY:
            return place + _SIZES[kind]
        inner, count = number(place, 4), number(place + 4, 8)
        place += 12
        if inner in _SIZES:
            return place + count * _SIZES[inner]
        if depth > 4 or count > len(data):
            raise ValueError("an array of too many")
        for _ in range(count):
            place = behind(place, inner, depth + 1)
            number(place, 0)
        return place

    tensors, fields, place = number(8, 8), number(16, 8), 24
    if tensors > _MOST_LAYERS or fields > len(data):
        raise ValueError("too many tensors or fields")
    for _ in range(fields):
        place = behind(place, _TEXT)
        place = behind(place + 4, number(place, 4))
        number(place, 0)


def save_control_vector(path: str | Path, fitted: Fitted | Plan, *, model_hint: str = "") -> Path:
    """Write vectors as a GGUF file.

    llama.cpp leaves out block 0; repeng takes it.

    Args:
        path: target, ending in `.gguf`.
        fitted: vectors that are added at `block.N` (or `model.layers.N` and the like) at all steps. Those of a plan are
            multiplied by their strength at conditional rows.
        model_hint: kind of model, such as llama; by default what a file that was read said.

    Raises:
        InputError: something else than an added vector, or a site that is not the output of a block.
    """
    import gguf

    plan = fitted if isinstance(fitted, Plan) else Plan.build(fitted.parameters)
    hint = model_hint or ("" if isinstance(fitted, Plan) else str(fitted.meta.get("model_hint", "")))
    vectors: dict[int, Tensor] = {}
    for entry in plan.entries:
        layer, vector = _vector_of(entry.parameters, entry.at(0)[0] if set(entry.schedule) == {None} else None)
        vectors[layer] = vectors[layer] + vector if layer in vectors else vector
    if not vectors or len({len(vector) for vector in vectors.values()}) != 1:
        found = {layer: len(vector) for layer, vector in vectors.items()}
        raise InputError("vectors of a control vector", value=found, allowed="at least one, all of the same width")
    with files.atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_string(_HINT, hint)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)


def _vector_of(entry: SiteParameters, strength: float | None) -> tuple[int, Tensor]:
    """Number of the block, and the vector that is added to its output."""
    where = f"site {entry.site}"
    block = _BLOCK.fullmatch(entry.site)
    if block is None:
        raise InputError("site of a control vector", value=entry.site, allowed="block.N, the output of a block")
    if (
        entry.op != "affine_shift"
        or set(entry.tensors) != {"gain", "bias"}
        or not bool((entry.tensors["gain"] == 1).all())
    ):
        found = f"{entry.op} with {', '.join(entry.tensors)}"
        raise InputError(f"control vector of {where}", value=found, allowed="a vector that is added: gain 1, no bounds")
    if entry.steps is not None or strength is None:
        raise InputError(f"steps of {where}", value=entry.steps, allowed="one vector and strength for all steps")
    entry.check()
    return int(block[1]), entry.tensors["bias"][0].detach().cpu().float() * strength


def convert_control_vector(source: Path, out: Path, options: ControlVectorOptions) -> str:
    """Convert a GGUF file to a folder of ours, or a folder of ours to a GGUF file."""
    if is_fitted(source):
        fitted = Fitted.from_pretrained(source)
        save_control_vector(out, fitted, model_hint=options.model_hint)
        return f"{len(fitted.parameters)} vectors in {out}"
    fitted = load_control_vector(source)
    fitted.save_pretrained(out)
    return f"vectors at {len(fitted.parameters)} blocks in {out}"
