"""Control vectors: the layout of the file, both ways, through a model, damaged and foreign files."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_language as tiny
import torch

import pysteer
from pysteer.capture import Fitted
from pysteer.convert import load_control_vector, save_control_vector
from pysteer.errors import InputError
from pysteer.methods import LinearAcT, MeanDifference
from pysteer.steering import Plan, SiteParameters


def write(path: Path, tensors: dict[str, np.ndarray], arch: str = "controlvector", hint: str | None = "llama") -> Path:
    """A file as repeng writes it."""
    writer = gguf.GGUFWriter(path, arch)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def directions(width: int = 6, layers: tuple[int, ...] = (10, 2)) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {f"direction.{layer}": generator.standard_normal(width).astype(np.float32) for layer in layers}


def shift(site: str, vector: torch.Tensor) -> SiteParameters:
    return SiteParameters(site, "affine_shift", None, {"gain": torch.ones_like(vector)[None], "bias": vector[None]})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_directions_become_vectors_at_blocks(dtype: type, tmp_path: Path) -> None:
    held = {name: vector.astype(dtype) for name, vector in directions().items()}
    fitted = load_control_vector(write(tmp_path / "v.gguf", held))
    assert [entry.site for entry in fitted.parameters] == ["block.2", "block.10"]
    assert fitted.meta["model_hint"] == "llama"
    for entry in fitted.parameters:
        assert entry.steps is None
        assert torch.equal(entry.tensors["gain"], torch.ones(1, 6))
        wanted = torch.from_numpy(held[f"direction.{entry.site.partition('.')[2]}"]).float()
        assert torch.equal(entry.tensors["bias"][0], wanted)


def test_written_and_read_vectors_are_the_same(tmp_path: Path) -> None:
    fitted = load_control_vector(write(tmp_path / "v.gguf", directions()))
    save_control_vector(tmp_path / "back.gguf", fitted)
    back = load_control_vector(tmp_path / "back.gguf")
    assert back.meta == fitted.meta
    for before, after in zip(fitted.parameters, back.parameters, strict=True):
        assert before.site == after.site
        assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    reader = gguf.GGUFReader(tmp_path / "back.gguf")
    assert {tensor.name: list(tensor.shape) for tensor in reader.tensors} == {"direction.2": [6], "direction.10": [6]}
    assert reader.fields["controlvector.layer_count"].contents() == 2
    assert reader.fields["general.architecture"].contents() == "controlvector"
    fitted.save_pretrained(tmp_path / "ours")
    assert Fitted.from_pretrained(tmp_path / "ours").method == fitted.method


def test_a_plan_is_written_with_its_strengths(tmp_path: Path) -> None:
    one, two = torch.arange(4.0), torch.ones(4)
    plan = Plan.build([shift("block.1", one)], strength=3.0) + Plan.build([shift("model.layers.1", two)], strength=-1.0)
    save_control_vector(tmp_path / "v.gguf", plan, model_hint="gpt2")
    fitted = load_control_vector(tmp_path / "v.gguf")
    assert torch.equal(fitted.parameters[0].tensors["bias"][0], 3 * one - two)
    assert fitted.meta["model_hint"] == "gpt2"


def test_vectors_steer_the_output_of_their_blocks(tmp_path: Path) -> None:
    model = tiny.build("llama")
    held = directions(tiny.WIDTH, (1, 2))
    fitted = load_control_vector(write(tmp_path / "v.gguf", held))
    with torch.no_grad():
        before = model(tiny.IDS).logits
        with pysteer.steer(model, fitted.plan(), strength=0.5):
            steered = model(tiny.IDS).logits
        handles = []
        for layer in (1, 2):
            vector = 0.5 * torch.from_numpy(held[f"direction.{layer}"])
            module = model.model.layers[layer]
            handles.append(
                module.register_forward_hook(
                    lambda m, i, out, v=vector: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v
                )
            )
        wanted = model(tiny.IDS).logits
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(steered, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered, before, atol=1e-3)


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    vector = torch.ones(4)
    gain = SiteParameters("block.1", "affine_shift", None, {"gain": 2 * vector[None], "bias": vector[None]})
    stepped = SiteParameters("block.1", "affine_shift", (0,), {"gain": vector[None], "bias": vector[None]})
    for entries, message in (
        ([gain], "a vector that is added"),
        ([stepped], "steps of site block.1"),
        ([shift("mlp.1", vector)], "site of a control vector: got 'mlp.1'"),
        ([shift("block.1", vector), shift("block.2", torch.ones(5))], "all of the same width"),
        ([], "at least one"),
    ):
        with pytest.raises(InputError, match=message):
            save_control_vector(tmp_path / "v.gguf", Fitted(MeanDifference(), entries))
    with pytest.raises(InputError, match="steps of site"):
        save_control_vector(tmp_path / "v.gguf", Plan([shift("block.1", vector)], {"block.1": {0: (1.0, 1.0)}}))
    fit = LinearAcT(support="0-100").fit_site(torch.randn(9, 4), torch.randn(9, 4))
    bounded = SiteParameters("block.1", "affine_shift", None, {name: t[None] for name, t in fit.tensors.items()})
    with pytest.raises(InputError, match="gain 1, no bounds"):
        save_control_vector(tmp_path / "v.gguf", Fitted(LinearAcT(), [bounded]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "arch", "message"),
    [
        ({"direction.1": np.ones(4, np.float32)}, "llama", "kind of GGUF file: got 'llama'; allowed: controlvector"),
        ({"direction.x": np.ones(4, np.float32)}, "controlvector", "tensor of a control vector: got 'direction.x'"),
        ({"../direction.1": np.ones(4, np.float32)}, "controlvector", "tensor of a control vector"),
        ({}, "controlvector", "at least one tensor"),
        ({"direction.1": np.ones((2, 4), np.float32)}, "controlvector", "shape of control vector direction.1"),
        ({"direction.1": np.full(4, np.nan, np.float32)}, "controlvector", "NaN or infinity"),
        ({"direction.1": np.ones(4, np.int8)}, "controlvector", "type of direction.1: got 'I8'; allowed: F32, F16"),
        (
            {"direction.1": np.ones(4, np.float32), "direction.2": np.ones(5, np.float32)},
            "controlvector",
            r"shape of control vector direction.2: got \[5\]; allowed: \[4\]",
        ),
    ],
)
def test_foreign_files_are_named(tensors: dict, arch: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_control_vector(write(tmp_path / "v.gguf", tensors, arch))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "v.gguf", directions())
    whole = path.read_bytes()
    for part in (b"", b"GGUF", whole[:40], whole[:-20], b"x" * 100):
        path.write_bytes(part)
        with pytest.raises(InputError, match="truncated or not GGUF"):
            load_control_vector(path)
    with pytest.raises(InputError, match="not found"):
        load_control_vector(tmp_path / "none.gguf")
