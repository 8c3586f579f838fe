"""`pysteer convert`: both ways from the command line, with the options of each kind."""

from pathlib import Path

import autoencoders
import pytest
import torch

from pysteer.capture import Fitted
from pysteer.cli import run_command
from pysteer.models.sae import SparseAutoencoder


def test_maps_and_vectors_go_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    source.mkdir()
    torch.save({"auroc": torch.linspace(0.4, 1, 4)}, source / "model.layers.1:0.statedict")
    assert run_command(["convert", str(source), str(ours), "--kind", "ml-act", "map=aura"]) == 0
    assert "aura at 1 sites" in capsys.readouterr().out
    assert Fitted.from_pretrained(ours).parameters[0].site == "model.layers.1"
    assert run_command(["convert", str(ours), str(back), "--kind", "ml-act"]) == 0
    assert [path.name for path in back.iterdir()] == ["model.layers.1:0.statedict"]
    assert run_command(["convert", str(source), str(ours), "--kind", "ml-act", "map=linear_ot"]) == 2
    assert "map model.layers.1:0 is of another kind: got 'aura'" in capsys.readouterr().err
    # the same map as a vector is refused, a shift goes to GGUF and back
    assert run_command(["convert", str(ours), str(tmp_path / "v.gguf"), "--kind", "control-vector"]) == 2
    torch.save({name: torch.ones(4) for name in ("mu1", "std1", "std2")} | {"mu2": torch.arange(4.0)}, _only(source))
    assert run_command(["convert", str(source), str(ours), "--kind", "ml-act", "map=mean_ot"]) == 0
    assert (
        run_command(["convert", str(ours), str(tmp_path / "v.gguf"), "model_hint=x", "--kind", "control-vector"]) == 0
    )
    assert run_command(["convert", str(tmp_path / "v.gguf"), str(back), "--kind", "control-vector"]) == 0
    entry = Fitted.from_pretrained(back).parameters[0]
    assert entry.site == "block.1"
    assert torch.equal(entry.tensors["bias"][0], torch.arange(4.0) - 1)


def _only(folder: Path) -> Path:
    return next(folder.iterdir())


def test_autoencoders_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, write in (
        ("sae-sparsify", autoencoders.sparsify),
        ("sae-saelens", lambda folder: autoencoders.saelens(folder, "gated")),
        ("sae-dictionary", lambda folder: autoencoders.dictionary(folder, "BatchTopKSAE")),
        ("sae-unbox", autoencoders.unbox),
    ):
        source, out = tmp_path / f"{kind}-in", tmp_path / kind
        source.mkdir()
        write(source)
        assert run_command(["convert", str(source), str(out), "--kind", kind]) == 0
        assert "autoencoder of 12 latents of width 5" in capsys.readouterr().out
        assert SparseAutoencoder.from_pretrained(out).width == 5


def test_options_are_listed_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["convert", "--kind", "sae-saelens", "--keys"]) == 0
    assert "scale=" in capsys.readouterr().out
    for words, message in (
        (["convert", "a", "b", "scales=2", "--kind", "sae-saelens"], "did you mean scale?"),
        (["convert", "a", "b", "--kind", "sae-unbox", "--pn", "1M"], "options of sae-unbox"),
        (["convert", "--kind", "sae-unbox"], "missing source or target"),
        (["convert", "a", "b", "--kind", "mlact"], "did you mean ml-act"),
    ):
        assert run_command(words) == 2
        assert message in capsys.readouterr().err
