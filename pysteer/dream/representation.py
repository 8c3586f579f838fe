"""What is known about the features of a model, in one folder that can be moved, browsed and searched.

    index.json        format, model, site, kinds, timesteps of the schedule
    features.parquet  kind, feature, live, activity, mean, largest, peaks, peak_heights, intervals, label, area, cover
    profiles.parquet  kind, feature, timesteps, frequency, mean, most (lists, by rising timestep)
    images.parquet    kind, feature, role, variant, timestep, seed, step, rank, value, text, figures, map, image
    images/ab/*.png   named by the SHA-256 of their content

`role` is example (a captured image), prior, dream or snapshot (a dream on its way); `variant` of dreams is `noise` or
`no_noise`. `image` and `cover` are paths inside the folder, with `/`. `figures` is JSON: activation, penalties, loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.dream.analysis import Analysis
from pysteer.errors import InputError

FORMAT = "pysteer-features-1"
INDEX, FEATURES, PROFILES, IMAGES = "index.json", "features.parquet", "profiles.parquet", "images.parquet"
ROLES = ("example", "prior", "dream", "snapshot")


def _image_schema() -> Any:
    import pyarrow as pa

    text, whole, number = pa.string(), pa.int64(), pa.float64()
    kinds = {
        "kind": text, "feature": whole, "role": text, "variant": text, "timestep": number, "seed": whole, "step": whole,
        "rank": whole, "value": number, "text": text, "figures": text, "map": pa.list_(pa.float32()), "image": text,
    }  # fmt: skip
    return pa.schema(list(kinds.items()))


@dataclass
class RepresentationWriter:
    """Puts a representation together; `finish` makes it count.

    Attributes:
        folder: where it goes.
    """

    folder: Path
    _features: list[dict[str, Any]] = field(default_factory=list)
    _profiles: list[dict[str, Any]] = field(default_factory=list)
    _images: list[dict[str, Any]] = field(default_factory=list)
    _covers: dict[tuple[str, int], str] = field(default_factory=dict)

    def add_features(self, found: Analysis, rows: Iterable[Mapping[str, Any]]) -> None:
        """Features of a kind: rows of the table of the analysis, and profiles of those that are live."""
        times = found.timesteps.tolist()
        for row in rows:
            self._features.append({"kind": found.kind, **row})
            number = int(row["feature"])
            if row["live"]:
                lists = {n: getattr(found, n)[number].tolist() for n in ("frequency", "mean", "most")}
                self._profiles.append({"kind": found.kind, "feature": number, "timesteps": times, **lists})

    def add_image(self, png: bytes, *, kind: str, feature: int, role: str, cover: bool = False, **more: Any) -> str:
        """One image with what is known of it (columns of `images.parquet`); returns its path inside the folder."""
        if role not in ROLES:
            raise InputError("role of an image", value=role, allowed=", ".join(ROLES))
        name = hashlib.sha256(png).hexdigest()
        path = f"images/{name[:2]}/{name}.png"
        if not (self.folder / path).is_file():
            files.write_bytes(self.folder / path, png)
        figures = json.dumps(files.plain(more.pop("figures", {})))
        self._images.append({"kind": kind, "feature": feature, "role": role, "figures": figures, "image": path, **more})
        if cover:
            self._covers.setdefault((kind, feature), path)
        return path

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write the tables, and `index.json` last.

        Args:
            about: plain values: model, site and so on.
        """
        import pyarrow as pa

        rows = [{**row, "cover": self._covers.get((row["kind"], row["feature"]), "")} for row in self._features]
        files.write_parquet(self.folder / FEATURES, rows)
        files.write_parquet(self.folder / PROFILES, self._profiles)
        files.write_parquet(self.folder / IMAGES, pa.Table.from_pylist(self._images, schema=_image_schema()))
        kinds = sorted({row["kind"] for row in rows})
        files.write_json(self.folder / INDEX, {"format": FORMAT, "kinds": kinds, **about})


@dataclass(frozen=True)
class Representation:
    """A representation on disk, read as it is asked for.

    Attributes:
        folder: where it is.
        about: `index.json`.
    """

    folder: Path
    about: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Representation:
        """Open a folder that the stage representation wrote.

        Raises:
            InputError: it is not one.
        """
        about = files.read_json(Path(folder) / INDEX, "index of a representation")
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            found = about.get("format") if isinstance(about, dict) else type(about).__name__
            raise InputError("format of the representation", value=found, allowed=FORMAT)
        return cls(Path(folder), about)

    def features(self, kind: str = "", live: bool = True) -> list[dict[str, Any]]:
        """Rows of `features.parquet`, of one kind where it is given, only live ones unless told otherwise."""
        return [
            row
            for row in self._read(FEATURES, [("kind", "==", kind)] if kind else None)
            if row["live"] or not live
        ]  # fmt: skip

    def profile(self, kind: str, feature: int) -> dict[str, Any]:
        """Timesteps, frequency, mean and most of a live feature.

        Raises:
            InputError: there is no such feature.
        """
        found = self._read(PROFILES, [("kind", "==", kind), ("feature", "==", feature)])
        if not found:
            raise InputError("feature", value=f"{kind} {feature}", allowed="a live feature of the representation")
        return found[0]

    def images(self, kind: str, feature: int, role: str = "") -> list[dict[str, Any]]:
        """Rows of `images.parquet` of a feature, of one role where it is given; `figures` as a mapping."""
        wanted = [("kind", "==", kind), ("feature", "==", feature)] + ([("role", "==", role)] if role else [])
        return [{**row, "figures": json.loads(row["figures"])} for row in self._read(IMAGES, wanted)]

    def path(self, image: str) -> Path:
        """The file of an image.

        Raises:
            InputError: a path that leads out of the folder, or to nothing.
        """
        path = self.folder / image
        if not path.resolve().is_relative_to(self.folder.resolve()) or not path.is_file():
            raise InputError("image of the representation", value=image, allowed="a path of images.parquet")
        return path

    def _read(self, name: str, filters: Any) -> list[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows: list[dict[str, Any]] = pq.read_table(self.folder / name, filters=filters).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"table {name} of the representation", value=str(error), fix="make it again") from error
        return rows
