"""What the stages of a dream share: the pipeline, the features of the site, prompts, results of other stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files, zoo
from pysteer.capture.taps import choose_sites
from pysteer.dream.analysis import Analysis
from pysteer.dream.features import RAW, SAE, Features
from pysteer.dream.parts import Parts, Share, digest_of, sha256
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.models.load import load_model
from pysteer.models.sae import SparseAutoencoder
from pysteer.recipes.dreaming.config import DreamRecipeConfig
from pysteer.recipes.dreaming.prompts import Captions, find_captions
from pysteer.recipes.folder import MARK
from pysteer.recipes.frame import Run
from pysteer.recipes.prototype.generator import choose_device
from pysteer.steering.site import Site


@dataclass
class Studio:
    """One process of a dream run.

    Attributes:
        config: of the recipe.
        run: the run.
        share: which part of the work this process does.
    """

    config: DreamRecipeConfig
    run: Run
    share: Share

    @cached_property
    def pipe(self) -> Any:
        """The pipeline, on its device."""
        device = choose_device(self.config.device)
        pipe = load_model(self.config.model)
        if not hasattr(pipe, "pipe") or find_family(pipe).name != "diffusers":
            raise InputError("model", value=self.config.model, allowed="a pipeline of diffusers")
        pipe.pipe.set_progress_bar_config(disable=True)
        return pipe if device.type == "cpu" else pipe.to(device)

    @cached_property
    def sae(self) -> SparseAutoencoder | None:
        """The autoencoder, where latents are looked at."""
        if not self.config.use_sae:
            return None
        name = self.config.sae
        found: SparseAutoencoder
        if name in zoo.available()["autoencoders"]:
            found = zoo.load_autoencoder(name)
        else:
            found = SparseAutoencoder.from_pretrained(name)
        return found.to(self.pipe.device, torch.float32)

    @cached_property
    def site(self) -> Site:
        """The site that is looked at: the one of the configuration, else that of the autoencoder."""
        name = self.config.site or (self.sae.meta.get("site", "") if self.sae is not None else "")
        if not name:
            raise InputError("site", value="none", allowed="a site", fix="give site=NAME, the autoencoder does not say")
        (site,) = choose_sites(find_family(self.pipe), self.pipe, str(name))
        if not site.width:
            raise InputError("width of the site", value=site.name, fix="choose a site whose width is known")
        return site

    @cached_property
    def features(self) -> dict[str, Features]:
        """The features by kind: raw, sae."""
        found = {}
        if self.config.use_raw:
            found[RAW] = Features(self.site, self.site.width)
        if self.sae is not None:
            found[SAE] = Features(self.site, self.site.width, self.sae)
        return found

    @cached_property
    def captions(self) -> Captions:
        """The prompts."""
        return find_captions(
            self.config.prompts, self.config.capture.dev_n_prompts, self.config.seed, fixed=self.config.fixed
        )

    @property
    def timesteps(self) -> int:
        """Denoising steps of a run."""
        return int(self.pipe.steps(**self.config.settings))

    def folder(self, run_name: str) -> Path:
        """The folder of another run beside this one; of this one for "".

        Raises:
            InputError: there is no run of this recipe there.
        """
        if not run_name:
            return self.run.folder
        found = self.run.folder.parent / run_name
        if "/" in run_name or not (found / MARK).is_file():
            others = sorted(path.parent.name for path in self.run.folder.parent.glob(f"*/{MARK}"))
            raise InputError("run with earlier stages", value=run_name, allowed=", ".join(others) or "no run is there")
        return found

    def parts(self, run_name: str, stage: str, kind: str = "") -> Parts:
        """Parts that a stage wrote, complete and of the same features.

        Raises:
            InputError: the stage did not run, or looked at other features.
        """
        folder = self.folder(run_name) / stage / kind
        if not (folder / "items.json").is_file():
            raise InputError(f"results of stage {stage}", value=str(folder), fix=f"run with stage={stage} first")
        parts = Parts.open(folder)
        parts.check_whole()
        known = parts.identity.get("features", {})
        for name, features in self.features.items():
            if (not kind or name == kind) and known.get(name) != features.digest():
                raise InputError(
                    f"features of stage {stage} in {folder.parent.name}", value=known.get(name, f"no {name}"),
                    allowed=features.digest(), fix="use the same model, site and autoencoder in all stages",
                )  # fmt: skip
        return parts

    def analysis(self, run_name: str, kind: str) -> Analysis:
        """What the stage timestep_analysis found."""
        path = self.folder(run_name) / "timestep_analysis" / f"{kind}.safetensors"
        if not path.is_file():
            raise InputError("results of stage timestep_analysis", value=str(path), fix="run that stage first")
        mark = files.read_json(path.with_suffix(".json"), "mark of the analysis")
        if mark.get("features") != self.features[kind].digest():
            fix = "use the same model, site and autoencoder in all stages"
            raise InputError("features of the analysis", value=mark.get("features"), fix=fix)
        return Analysis.load(path)

    def analysis_hash(self, run_name: str) -> str:
        """A hash of the content of the analysis of all kinds."""
        folder = self.folder(run_name) / "timestep_analysis"
        paths = [folder / f"{kind}.{suffix}" for kind in self.features for suffix in ("safetensors", "parquet")]
        return digest_of([sha256(path) if path.is_file() else "" for path in paths])

    def chosen(
        self, run_name: str, kind: str, explicit: tuple[int, ...], first: int | None, last: int | None
    ) -> list[int]:
        """The features that priors and dreams are made of, in the order of their numbers.

        Args:
            run_name: whose analysis chooses.
            kind: raw or sae.
            explicit: the features themselves, where given.
            first, last: a range, both included, where given.
        """
        analysis, count = self.analysis(run_name, kind), self.features[kind].count
        for feature in (*explicit, *(each for each in (first, last) if each is not None)):
            if not 0 <= feature < count:
                raise InputError(f"{kind} feature", value=feature, allowed=f"0 to {count - 1}")
        live = analysis.live
        if explicit:
            return sorted(set(explicit))
        if first is not None or last is not None:
            wanted = range(first or 0, (count - 1 if last is None else last) + 1)
            return [feature for feature in wanted if live[feature]]
        order = self._scores(run_name, kind, analysis)
        ranked = [f for f in order.argsort(descending=True, stable=True).tolist() if live[f]]
        return sorted(ranked[: self.config.features or None])

    def _scores(self, run_name: str, kind: str, analysis: Analysis) -> Tensor:
        if self.config.choose == "selectivity":
            import pyarrow.parquet as pq

            path = self.folder(run_name) / "timestep_analysis" / f"{kind}.parquet"
            area = pq.read_table(path, columns=["area"]).to_pydict()["area"]
            if any(value > 0 for value in area):
                return torch.tensor(area)
        return analysis.activity()
