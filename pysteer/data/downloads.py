"""Data sets that cannot be shipped: where they come from, fetched once and checked.

A data set with a published checksum is refused when the file does not have it. Where none is published, the SHA-256 of
the first download is written beside the file (`checksums.json`), and later downloads have to agree with it.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from pysteer import files
from pysteer.errors import InputError
from pysteer.methods.base import did_you_mean

_CHUNK = 1 << 20
Progress = Callable[[int, int | None], object]


@dataclass(frozen=True)
class Dataset:
    """A file on the web and what is taken out of it.

    Attributes:
        name: its name, and its folder.
        url: where it is; empty where its licence wants it fetched by hand.
        note: what it is, its licence, how to get it by hand.
        algorithm: of the published checksum; empty for none.
        checksum: as hexadecimal digits.
        members: files taken out of an archive, by their path in it, and their names here; empty keeps the file itself.
        needs: file that has to be there in the end, for a data set fetched by hand.
    """

    name: str
    url: str
    note: str
    algorithm: str = ""
    checksum: str = ""
    members: dict[str, str] = field(default_factory=dict)
    needs: str = ""


DATASETS = {
    each.name: each
    for each in (
        Dataset(
            "coco",
            "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
            "COCO 2017 captions (241 MB; CC BY 4.0), for coco_styles and coco_concepts",
            "sha1",
            "8551ee4bb5860311e79dace7e79cb91e432e78b3",
            {
                "annotations/captions_train2017.json": "annotations/captions_train2017.json",
                "annotations/captions_val2017.json": "annotations/captions_val2017.json",
            },
        ),
        Dataset(
            "rtp",
            "https://ai2-public-datasets.s3.amazonaws.com/realtoxicityprompts/realtoxicityprompts-data.tar.gz",
            "RealToxicityPrompts (Apache-2.0), for evaluation.names=toxicity; no checksum is published",
            members={"realtoxicityprompts-data/prompts.jsonl": "prompts.jsonl"},
        ),
        Dataset(
            "jigsaw",
            "",
            "Jigsaw toxic comments (CC0), for the task toxicity: put train.csv of "
            "kaggle.com/c/jigsaw-toxic-comment-classification-challenge there, after signing in",
            needs="train.csv",
        ),
    )
}


def find_dataset(name: str) -> Dataset:
    """The data set of that name.

    Raises:
        InputError: there is none.
    """
    if name not in DATASETS:
        raise InputError("data set", value=name, allowed=", ".join(DATASETS), fix=did_you_mean(name, DATASETS))
    return DATASETS[name]


def digest(path: Path, algorithm: str) -> str:
    """The checksum of a file as hexadecimal digits."""
    found = hashlib.new(algorithm)
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            found.update(block)
    return found.hexdigest()


def here(data: Dataset, folder: Path) -> bool:
    """Whether all of a data set is in `folder`."""
    wanted = list(data.members.values()) or [data.needs or Path(data.url).name]
    return all((folder / data.name / name).is_file() for name in wanted)


def get(data: Dataset, folder: Path, *, url: str = "", progress: Progress = lambda done, total: None) -> Path:
    """Fetch a data set into `folder/name`, unless it is there; returns that folder.

    Args:
        data: the data set.
        folder: of all data sets.
        url: a mirror; the checksum stays the same.
        progress: told bytes so far and in all.

    Raises:
        InputError: no network, a wrong checksum (nothing is kept then), an archive without what it should hold, or a
            data set that has to be fetched by hand.
    """
    target = folder / data.name
    if here(data, folder):
        return target
    source = url or data.url
    if not source:
        raise InputError(f"data set {data.name}", value=str(target / data.needs), fix=data.note)
    target.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(target / f"download-{Path(source).name}") as temporary:
        _fetch(source, temporary, progress)
        _check(data, temporary, target)
        if data.members:
            _take_out(data, temporary, target)
        else:
            shutil.copyfile(temporary, target / Path(data.url).name)
    (target / f"download-{Path(source).name}").unlink()
    return target


def _fetch(url: str, path: Path, progress: Progress) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as stream:
            size = answer.headers.get("Content-Length")
            total, done = int(size) if size else None, 0
            while block := answer.read(_CHUNK):
                stream.write(block)
                done += len(block)
                progress(done, total)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise InputError(f"download ({error})", value=url, fix="check the network, or give --url MIRROR") from error


def _check(data: Dataset, path: Path, target: Path) -> None:
    known = target / "checksums.json"
    if data.checksum:
        found, wanted = digest(path, data.algorithm), data.checksum
    else:
        found = digest(path, "sha256")
        wanted = files.read_json(known, "checksums").get(data.name, found) if known.is_file() else found
    if found != wanted:
        what = f"checksum of {data.name}"
        raise InputError(
            what, value=found, allowed=wanted, fix="fetch it again; if it changed for good, remove " + known.name
        )
    files.write_json(known, {data.name: found})


def _take_out(data: Dataset, path: Path, target: Path) -> None:
    """Take the wanted files out of an archive, under our own names: no path of the archive is trusted."""
    for inside, name in data.members.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"file of {data.name}", value=name, allowed="a path inside its folder")
        try:
            with files.atomic_path(target / name) as temporary, temporary.open("wb") as out:
                _copy_member(path, inside, out)
        except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise InputError(
                f"archive of {data.name} lacks a file ({error})", value=inside, fix="give --url MIRROR"
            ) from error


def _copy_member(path: Path, inside: str, out: IO[bytes]) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive, archive.open(inside) as stream:
            shutil.copyfileobj(stream, out)
        return
    with tarfile.open(path) as bundle:
        found = bundle.extractfile(inside)
        if found is None:
            raise KeyError(inside)
        shutil.copyfileobj(found, out)
