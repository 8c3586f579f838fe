"""A generator that is steered by hand: sliders move strengths in an attached plan, nothing is built again."""

from __future__ import annotations

import io
import json
import math
import threading
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pysteer.errors import InputError

MOST_PROMPTS, LONGEST_PROMPT, MOST_STRENGTH, MOST_PAIRS = 8, 300, 20.0, 256
SLIDE = 4.0  # how far a slider goes; the field beside it takes up to MOST_STRENGTH


@dataclass
class Part:
    """Fitted parameters that sliders act on.

    Attributes:
        name: folder name in an export, letters, digits and dashes.
        fitted: the parameters.
        groups: names of the sliders, a site kind each: `ca` for `ca.0`, `ca.1`, ...
    """

    name: str
    fitted: Any
    groups: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        sites = [entry.site for entry in self.fitted.parameters]
        self.groups = list(dict.fromkeys(group_of(site) for site in sites))


def group_of(site: str) -> str:
    """The slider a site belongs to: its kind, without the number of a layer."""
    head, _, last = site.rpartition(".")
    return head if head and last.isdigit() else site


@dataclass(frozen=True)
class Shown:
    """One answer: PNG bytes of steered and unsteered images, seconds, and how often the plan was attached."""

    steered: list[bytes]
    plain: list[bytes]
    seconds: float
    attached: int


class Live:
    """The model behind the page; one request at a time.

    Args:
        model: a generator of the zoo, a folder, or a name of the hub; loaded when it is first needed.
        fitted: folders of fitted parameters to begin with.

    Raises:
        InputError: one of the folders holds none.
    """

    def __init__(self, model: str = "infinity-shapes", fitted: Sequence[str | Path] = ()) -> None:
        self.model, self.attached = model, 0
        self.parts: list[Part] = []
        self._pipe: Any = None
        self._handle: Any = None
        self._plain: dict[Any, list[bytes]] = {}
        self._lock = threading.Lock()
        if fitted:  # their sliders are there from the start, and a wrong folder is an error before anything is served
            from pysteer.capture import Fitted

            for folder in fitted:
                self._add(Path(folder).resolve().name, Fitted.from_pretrained(folder))

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._pipe is not None

    def load(self) -> Any:
        """The pipeline, loaded once.

        Raises:
            InputError: the model is none of images.
        """
        if self._pipe is None:
            from pysteer.models.load import load_model

            pipe = load_model(self.model)
            if hasattr(pipe, "read"):
                raise InputError("model of the live page", value=self.model, allowed="a generator of images")
            if hasattr(pipe, "pipe"):
                pipe.pipe.set_progress_bar_config(disable=True)
            self._pipe = pipe
        return self._pipe

    def _add(self, name: str, fitted: Any) -> Part:
        plain = "".join(c if c.isalnum() else "-" for c in name).strip("-")[:60] or "fitted"
        taken = {part.name for part in self.parts}
        unique = next(n for n in (plain, *(f"{plain}-{i}" for i in range(2, 99))) if n not in taken)
        part = Part(unique, fitted)
        self.parts.append(part)
        self._detach()
        return part

    def add_fit(self, pair: str, method: str, site: str, pairs: int, seed: int) -> Part:
        """Fit a method to a pair of classes of the captioned shapes; at a place as the recipe `methods` names
        them: "" or visual for where the class is drawn, text, or sites.

        Raises:
            InputError: an unknown class, method or site, or too many pairs.
        """
        import pysteer
        from pysteer.methods import create
        from pysteer.recipes.comparison.places import find_place
        from pysteer.recipes.prototype.data import parse_pair
        from pysteer.zoo.shapes.captions import sample_pairs

        if not 2 <= pairs <= MOST_PAIRS:
            raise InputError("prompt pairs", value=pairs, allowed=f"2 to {MOST_PAIRS}")
        if len(self.parts) >= 6:
            raise InputError("fits on one page", value=len(self.parts) + 1, allowed="6", fix="remove one")
        found = parse_pair(pair, 1)
        options = {"clusters": max(1, min(16, pairs // 2))} if method == "prototype" else {}
        made = create(method, **options)
        with self._lock:
            pipe = self.load()
            self._detach()
            drawn = sample_pairs(pairs, found.attribute, found.source, found.target, seed=seed)
            texts = [first.caption for first, _ in drawn], [second.caption for _, second in drawn]
            place = find_place(site or "visual", pipe, found.attribute)
            fitted = pysteer.fit(
                pipe, made, *texts, sites=list(place.sites), steps=place.steps, sequential=place.sequential, seeds=seed
            )
            return self._add(f"{found.source}-to-{found.target}-{method}", fitted)

    def add_folder(self, folder: Path) -> Part:
        """Parameters that were fitted before.

        Raises:
            InputError: they are damaged, or for another model.
        """
        from pysteer.capture import Fitted

        with self._lock:
            self.load()
            return self._add(folder.name, Fitted.from_pretrained(folder))

    def remove(self, name: str) -> None:
        """Take a fit away."""
        with self._lock:
            self.parts = [part for part in self.parts if part.name != name]
            self._detach()

    # -- steering

    def plan(self, strengths: Mapping[str, float]) -> Any:
        """The plan at strengths by `part/group`; what is not named is off."""
        from pysteer.steering.plan import Plan, PlanEntry

        plan = Plan()
        for part in self.parts:
            one = part.fitted.plan()
            factors = {g: checked(strengths.get(f"{part.name}/{g}", 0.0), f"{part.name}/{g}") for g in part.groups}
            one.entries = [
                PlanEntry(entry.parameters, {step: (cond * factors[group_of(entry.parameters.site)],
                                                    uncond * factors[group_of(entry.parameters.site)])
                                             for step, (cond, uncond) in entry.schedule.items()})
                for entry in one.entries
            ]  # fmt: skip
            plan = plan + one
        return plan

    def show(self, prompts: Sequence[str], seed: int, strengths: Mapping[str, float]) -> Shown:
        """Images of the prompts with and without steering.

        Raises:
            InputError: too many or too long prompts, or a strength that is none.
        """
        import pysteer

        texts = [" ".join(text.split()) for text in prompts if text.strip()]
        if not 1 <= len(texts) <= MOST_PROMPTS or any(len(text) > LONGEST_PROMPT for text in texts):
            raise InputError(
                "prompts", value=f"{len(texts)} of up to {max(map(len, texts), default=0)} characters",
                allowed=f"1 to {MOST_PROMPTS} of up to {LONGEST_PROMPT} characters",
            )  # fmt: skip
        if not 0 <= seed < 2**31:
            raise InputError("seed", value=seed, allowed="0 to 2147483647")
        with self._lock:
            pipe, start = self.load(), time.monotonic()
            plan = self.plan(strengths)
            key = (tuple(texts), seed)
            if key not in self._plain:
                self._detach()
                self._plain = {key: self._paint(pipe, texts, seed)}  # one set is enough: the sliders move more often
            if not self.parts:
                return Shown([], self._plain[key], time.monotonic() - start, self.attached)
            if self._handle is None:
                self._handle = pysteer.steer(pipe, plan).__enter__()
                self.attached += 1
            else:
                self._handle.update(plan)  # copies into the tensors that are there
            steered = self._paint(pipe, texts, seed)
            return Shown(steered, self._plain[key], time.monotonic() - start, self.attached)

    def _paint(self, pipe: Any, prompts: Sequence[str], seed: int) -> list[bytes]:
        from PIL import Image

        found = []
        for pixels in pipe(list(prompts), seeds=seed).images:
            out = io.BytesIO()
            image = Image.fromarray(pixels.cpu().numpy())
            image.save(out, "png")
            found.append(out.getvalue())
        return found

    def _detach(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.detach()

    def close(self) -> None:
        """Give the model back as it was."""
        with self._lock:
            self._detach()

    # -- export

    def code(self, prompts: Sequence[str], seed: int, strengths: Mapping[str, float]) -> str:
        """A program that makes the steered images from the exported files."""
        lines = [
            '"""Steered images, exported from the inspector of pysteer."""',
            "",
            "import pysteer",
            "from pysteer.models.load import load_model",
            "",
            f"pipe = load_model({self.model!r})",
            "plan = pysteer.Plan()",
        ]
        for part in self.parts:
            name = "".join(c if c.isalnum() else "_" for c in part.name)
            lines.append(f"{'fit_' + name} = pysteer.Fitted.from_pretrained({part.name!r})")
            for group in part.groups:
                factor = checked(strengths.get(f"{part.name}/{group}", 0.0), f"{part.name}/{group}")
                lines.append(f"plan += fit_{name}.select([{group!r}]).plan(strength={factor!r})")
        return "\n".join([
            *lines,
            f"prompts = {[' '.join(text.split()) for text in prompts if text.strip()]!r}",
            "with pysteer.steer(pipe, plan) as handle:",
            f"    images = pipe(prompts, seeds={seed}).images  # uint8 [B, H, W, 3]",
            "    print(handle.report())",
            "",
        ])  # fmt: skip

    def archive(self, prompts: Sequence[str], seed: int, strengths: Mapping[str, float]) -> bytes:
        """A zip file with the program, `plan.json` and the fitted parameters."""
        import tempfile

        out = io.BytesIO()
        facts = {"model": self.model, "prompts": list(prompts), "seed": seed, "strengths": dict(strengths)}
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, tempfile.TemporaryDirectory() as folder:
            archive.writestr("steer.py", self.code(prompts, seed, strengths))
            archive.writestr("plan.json", json.dumps({"format": "pysteer-live-1", **facts}, indent=2))
            for part in self.parts:
                part.fitted.save_pretrained(Path(folder) / part.name)
                for path in sorted((Path(folder) / part.name).iterdir()):
                    archive.write(path, f"{part.name}/{path.name}")
        return out.getvalue()


def checked(value: float, name: str) -> float:
    """A strength that is finite and not absurd.

    Raises:
        InputError: another one.
    """
    if not math.isfinite(value) or abs(value) > MOST_STRENGTH:
        raise InputError(f"strength of {name}", value=value, allowed=f"-{MOST_STRENGTH:g} to {MOST_STRENGTH:g}")
    return float(value)
