"""Run folders: one configuration each, one process at a time."""

import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pysteer
from pysteer import files
from pysteer.errors import InputError
from pysteer.recipes.config import identity_values

MARK = "run.json"


def marked(recipe: str, config: Any) -> dict[str, Any]:
    """What the marker file of a run folder holds: recipe, package version and configuration."""
    values = {"recipe": recipe, "pysteer": pysteer.__version__, "config": identity_values(config)}
    return json.loads(json.dumps(values))


def has_results(folder: Path) -> bool:
    """Whether at least one stage of the run in `folder` finished."""
    return (folder / "summary.json").is_file() or any((folder / "stages").glob("*.json"))


def claim_folder(out: Path, name: str, mark: Mapping[str, Any], overwrite: bool) -> Path:
    """Make the run folder `out/name`, or make sure that the one there belongs to the same run.

    A folder of another run is replaced when `overwrite` is set, or when that run never finished a stage.

    Raises:
        InputError: a name that is not a plain file name, a folder of something else, or of another run.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError("run name", value=name, allowed="letters, digits, '.', '-' and '_'")
    folder = out / name
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise InputError("run folder cannot be made, a file is in the way", value=str(part))
    if (folder / MARK).is_file():
        before = files.read_json(folder / MARK, "marker of the run folder")
        if before != mark:
            with locked(folder):
                if has_results(folder) and not overwrite:
                    raise InputError(
                        f"run folder {folder} belongs to another run ({_difference(before, mark)})",
                        fix="give --name NEW to keep both, or --overwrite to replace it",
                    )
                shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise InputError("run folder holds other files", value=str(folder), fix="choose another --name or --out")
    for leftover in folder.rglob(".*.tmp*"):  # of a process that was killed while writing
        leftover.unlink()
    files.write_json(folder / MARK, mark)
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock goes with the process, however it ends.

    Raises:
        InputError: another process holds it.
    """
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                "run folder is in use by another process", value=str(folder), fix="wait for it, or give --name NEW"
            ) from error
        yield


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    for key in ("recipe", "pysteer"):
        if before.get(key) != now[key]:
            return f"{key}: {before.get(key)} there, {now[key]} now"
    old, new = before.get("config") or {}, now["config"]
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    shown = "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} now" for key in changed[:3])
    return shown + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
