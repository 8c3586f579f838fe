"""Pickles: tensors come in, code does not run, and a few bytes cannot claim terabytes."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pysteer.convert.reading import natural, read_pickle
from pysteer.errors import InputError

LARGEST = 10_000_000


def archive(path: Path, program: bytes, *, storages: dict[str, bytes] | None = None, packed: bool = False) -> Path:
    """A file of torch.save with another pickle in it."""
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr("a/data.pkl", program)
        out.writestr("a/byteorder", "little")
        out.writestr("a/version", "3\n")
        for name, data in (storages or {}).items():
            out.writestr(f"a/data/{name}", data)
    return path


def program_of(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    with zipfile.ZipFile(stream) as held:
        return held.read(next(name for name in held.namelist() if name.endswith("data.pkl")))


class Runs:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def test_plain_values_and_tensors_are_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    value = {"state": module.state_dict(), "views": torch.arange(12.0).view(3, 4)[1:, ::2], "k": 3, "none": [None, "x"]}
    torch.save(value, tmp_path / "a.pt")
    data = read_pickle(tmp_path / "a.pt", "file", largest=LARGEST)
    assert torch.equal(data["state"]["weight"], module.weight)
    assert torch.equal(data["views"], value["views"])
    assert (data["k"], data["none"]) == (3, [None, "x"])
    torch.save(torch.nn.Parameter(torch.ones(2)), tmp_path / "b.pt")
    assert torch.equal(read_pickle(tmp_path / "b.pt", "file", largest=LARGEST), torch.ones(2))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_is_named_and_does_not_run(protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for attack in (
        Runs(os.system, f"touch {canary}"),
        Runs(eval, f"open({str(canary)!r}, 'w')"),
        Runs(open, str(canary), "w"),
        Runs(os.mkdir, str(canary)),
    ):
        program = pickle.dumps({"w": attack}, protocol=protocol)
        path = archive(tmp_path / "a.pt", program)
        with pytest.raises(InputError, match=r"holds more than tensors: got .*(posix|builtins|io|STACK_GLOBAL)"):
            read_pickle(path, "file", largest=LARGEST)
        path.write_bytes(program)  # without the zip around it
        with pytest.raises(InputError, match="not a PyTorch file"):
            read_pickle(path, "file", largest=LARGEST)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Runs(os.mkdir, str(canary))))  # the attack does work where nothing stops it
    assert canary.exists()


def test_functions_that_reserve_memory_are_refused(tmp_path: Path) -> None:
    for function, arguments in ((bytearray, (10**12,)), (torch.FloatTensor, (10**12,)), (set, ((1, 2),))):
        program = pickle.dumps(Runs(function, *arguments), protocol=2)
        with pytest.raises(InputError, match="holds more than tensors"):
            read_pickle(archive(tmp_path / "a.pt", program), "file", largest=LARGEST)


def test_tensors_are_no_larger_than_their_file(tmp_path: Path) -> None:
    small = torch.ones(1)
    for made in (small.expand(10**12), small.expand(10**6, 10**6), small.as_strided((50, 50), (0, 0))):
        torch.save({"w": made}, tmp_path / "a.pt")
        with pytest.raises(InputError, match="no larger than what the file holds"):
            read_pickle(tmp_path / "a.pt", "file", largest=LARGEST)
    program = program_of(torch.arange(4.0))
    for grown in (program.replace(b"K\x04", b"J\x00\x00\x00\x40"), program.replace(b"K\x04", b"J\xff\xff\xff\xff")):
        path = archive(tmp_path / "a.pt", grown, storages={"0": bytes(16)})
        with pytest.raises(InputError, match="truncated or not a PyTorch file"):
            read_pickle(path, "file", largest=LARGEST)
    assert torch.equal(
        read_pickle(archive(tmp_path / "a.pt", program, storages={"0": bytes(16)}), "file", largest=LARGEST),
        torch.zeros(4),
    )


def test_files_that_are_no_archives_of_torch_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(InputError, match="file not found"):
        read_pickle(path, "file", largest=LARGEST)
    torch.save(torch.zeros(9), path)
    whole = path.read_bytes()
    with pytest.raises(InputError, match=r"size of file a.pt: got .*; allowed: at most 100"):
        read_pickle(path, "file", largest=100)
    for damaged in (b"", whole[:-30], whole[:200], b"PK\x03\x04" + bytes(50)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="truncated or not a PyTorch file"):
            read_pickle(path, "file", largest=LARGEST)
    with pytest.raises(InputError, match="compressed or oversized"):
        read_pickle(archive(path, program_of([1]) + bytes(9_000_000), packed=True), "file", largest=LARGEST)
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a/readme", "nothing")
    with pytest.raises(InputError, match="0 pickles"):
        read_pickle(path, "file", largest=LARGEST)


def test_names_are_ordered_by_their_numbers() -> None:
    names = ["h.10.b", "h.2.b", "h.2.a", "h", "h.2"]
    assert sorted(names, key=natural) == ["h", "h.2", "h.2.a", "h.2.b", "h.10.b"]
