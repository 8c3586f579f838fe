"""Recipe `vae-dynamics`: an autoencoder trains, its channels are watched, dead ones are found and revived.

With `seeds` and two `conditions` it trains every seed with and without reviving, and says with a paired interval what
that changed. `stage=evaluate` measures a trained autoencoder.
"""

from __future__ import annotations

from typing import Any

from pysteer import files
from pysteer.errors import InputError
from pysteer.recipes.frame import Run, Summary, recipe
from pysteer.recipes.vae.cells import Cell, evaluate_folder, run_cells
from pysteer.recipes.vae.checkpoint import full_disk_is_said
from pysteer.recipes.vae.config import VaeDynamicsConfig, prepare
from pysteer.recipes.vae.data import open_images
from pysteer.recipes.vae.evaluate import METRICS
from pysteer.recipes.vae.page import sentence, write_report
from pysteer.recipes.vae.paired import Paired, compare_pairs


@recipe("vae-dynamics", VaeDynamicsConfig, prepare=prepare)
def run_vae_dynamics(config: VaeDynamicsConfig, run: Run) -> Summary:
    """Train an autoencoder, watch its channels, revive dead ones, evaluate; compare with and without."""
    if config.stage == "evaluate":
        return _evaluate(config, run)
    with run.stage("data") as stage:  # from here on, what is in the folder is kept whatever happens
        if not stage.done:
            images = open_images(config.data, config.data.train_split_name)
            if config.data.do_validation:
                open_images(config.data, config.data.validation_split_name, validation=True)
            stage.notes["images"] = len(images)
            run.log.info("%d images to train on: %s", len(images), images.about)
    with run.stage("train") as stage:
        cells = run_cells(config, run)
        stage.notes.setdefault("cells", len(cells))
    compared = compare(cells)
    run.log.info("%s", sentence(cells, compared))
    seconds = files.read_json(run.path("stages/train.json"), "stage marker")["seconds"]
    with full_disk_is_said("report", run.folder, cells[0].folder, config.saving.checkpoint_dir_prefix):
        run.write_parquet("metrics.parquet", [_row(cell) for cell in cells])
        write_report(run, config, cells, compared, seconds)
    return _summary(cells, compared)


def compare(cells: list[Cell]) -> dict[str, Paired]:
    """Nudge against baseline by measure, over the seeds that have both; empty where there is one condition."""
    by_seed: dict[int, dict[str, Cell]] = {}
    for cell in cells:
        by_seed.setdefault(cell.seed, {})[cell.condition] = cell
    both = [own for own in by_seed.values() if len(own) == 2]
    if not both:
        return {}
    found = {}
    for metric in METRICS:
        first, second = ([own[c].result["evaluation"][metric] for own in both] for c in ("baseline", "nudge"))
        if all(value is not None for value in (*first, *second)):
            found[metric] = compare_pairs(first, second)
    return found


def _row(cell: Cell) -> dict[str, Any]:
    result = cell.result
    names = ("steps", "train_seconds", "inactive", "nudges")
    planted = {f"planted_{key}": result["planted"][key] for key in ("total", "found", "revived")}
    own = {name: result[name] for name in names}
    return {"condition": cell.condition, "seed": cell.seed, **result["evaluation"], **own, **planted}


def _summary(cells: list[Cell], compared: dict[str, Paired]) -> Summary:
    rows = [_row(cell) for cell in cells]
    top = min(rows, key=lambda row: row["mse"])
    best = {name: top[name] for name in ("condition", "seed", "mse", "psnr", "ssim", "inactive")}
    headline: dict[str, Any] = {name: paired.as_dict() for name, paired in compared.items()}
    for condition in dict.fromkeys(cell.condition for cell in cells):
        own = [row for row in rows if row["condition"] == condition]
        keys = (*METRICS, "inactive", "planted_total", "planted_found", "planted_revived")
        headline[condition] = {key: sum(row[key] for row in own) / len(own) for key in keys}
    return Summary(best=best, headline=headline, tables={"trainings": rows})


def _evaluate(config: VaeDynamicsConfig, run: Run) -> Summary:
    from pathlib import Path

    place = Path(config.checkpoint_path).expanduser()
    if not place.is_dir():
        raise InputError("checkpoint_path", value=config.checkpoint_path, allowed="a folder with vae/ inside")
    split = config.eval_split or config.data.validation_split_name
    with run.progress.task("images", config.evaluation.samples) as advance:
        found = evaluate_folder(config, place, split, run.folder / f"eval_results_{split}", advance)
    run.write_parquet("metrics.parquet", [found])
    return Summary(best=dict(found), headline={"split": split})
