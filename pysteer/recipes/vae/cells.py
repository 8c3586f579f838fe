"""Trainings of a run: one per condition and seed, in this process or several at a time, and what they found out."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pysteer import files
from pysteer.errors import InputError
from pysteer.recipes.config import build_config, config_values
from pysteer.recipes.frame import Run
from pysteer.recipes.progress import Show
from pysteer.recipes.vae.checkpoint import full_disk_is_said
from pysteer.recipes.vae.config import VaeDynamicsConfig
from pysteer.recipes.vae.data import open_images
from pysteer.recipes.vae.evaluate import evaluate, write_metrics
from pysteer.recipes.vae.model import load_model
from pysteer.recipes.vae.trainer import Trainer

RESULT = "result.json"


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation.

    Attributes:
        condition: baseline or nudge.
        seed: its seed.
        folder: where it is.
        result: what `train_and_evaluate` found; read from `result.json`.
    """

    condition: str
    seed: int
    folder: Path
    result: dict[str, Any]


def cell_folder(config: VaeDynamicsConfig, folder: Path, condition: str, seed: int) -> Path:
    """The run folder itself for a single training, else one of its own."""
    return folder if len(config.cells) == 1 else folder / f"runs/{condition}-seed{seed}"


def train_and_evaluate(
    config: VaeDynamicsConfig,
    condition: str,
    seed: int,
    folder: Path,
    say: Callable[..., None] = lambda *_: None,
    show: Show = lambda *_: None,
) -> dict[str, Any]:
    """Train one cell, evaluate it and write `result.json`; returns what is in it.

    Raises:
        InputError: something of the configuration does not fit, or the disk is full.
    """
    with full_disk_is_said("files of a training", folder, folder, config.saving.checkpoint_dir_prefix):
        return _train_and_evaluate(config, condition, seed, folder, say, show)


def _train_and_evaluate(
    config: VaeDynamicsConfig, condition: str, seed: int, folder: Path, say: Callable[..., None], show: Show
) -> dict[str, Any]:
    data = config.data
    images = open_images(data, data.train_split_name)
    held = open_images(data, data.validation_split_name, validation=True) if data.do_validation else None
    trainer = Trainer(config, condition, seed, folder, images, held, say)
    trainer.run(show)
    split = config.eval_split or data.validation_split_name
    place = folder / "final_model"
    found = evaluate_folder(config, place, split, place / f"eval_results_{split}")
    result = {
        "condition": condition,
        "seed": seed,
        "steps": trainer.step,
        "train_seconds": trainer.seconds,
        "parameters": sum(p.numel() for p in trainer.plain.parameters()),
        "images": images.about,
        "evaluation": found,
        "dead": trainer.observers.dead,
        "inactive": trainer.observers.inactive,
        "planted": planted_report(trainer),
        "nudges": 0 if trainer.observers.nudger is None else len(trainer.observers.nudger.rows()),
        "interventions": trainer.observers.interventions,
        "log": trainer.log_rows,
        "validations": trainer.validations,
    }
    files.write_json(folder / RESULT, result)
    return result


def planted_report(trainer: Trainer) -> dict[str, Any]:
    """Which planted channels were found by the classifier, when, and which of them are alive at the end."""
    seen = trainer.observers
    watched = {point.name for point in seen.monitor.points} if seen.monitor is not None else set()
    dead = {f"{row['layer']}[{row['channel']}]" for row in seen.dead}
    rows = []
    for path, channels in trainer.planted.items():
        for channel, kind in channels.items():
            name = f"{path}.output[{channel}]"
            if f"{path}.output" not in watched or seen.classifier is None:
                continue
            rows.append(
                {
                    "channel": name,
                    "kind": kind,
                    "found": seen.first_seen.get(name),
                    "dead_until": seen.last_seen.get(name),
                    "alive": name not in dead,
                }
            )
    return {"channels": rows, "found": sum(row["found"] is not None for row in rows), "total": len(rows),
            "revived": sum(row["alive"] for row in rows)}  # fmt: skip


def evaluate_folder(
    config: VaeDynamicsConfig,
    place: Path | str,
    split: str,
    folder: Path,
    advance: Callable[[float], None] = lambda _: None,
) -> dict[str, float]:
    """Evaluate a saved autoencoder and write its metrics and pictures into `folder`."""
    part = config.evaluation
    held = config.data.validation_dataset_name
    images = open_images(_without_limit(config), split, validation=bool(held)).first(part.samples)
    model = load_model(str(place))
    save = part.num_samples_to_save
    found = evaluate(model, images, batch_size=part.batch_size, save=save, folder=folder, advance=advance)
    write_metrics(folder, split, str(place), len(images), found)
    return found


def _without_limit(config: VaeDynamicsConfig) -> Any:
    from dataclasses import replace

    samples = config.evaluation.samples
    return replace(config.data, max_samples=samples, validation_max_samples=samples)


def run_cells(config: VaeDynamicsConfig, run: Run) -> list[Cell]:
    """All trainings, those that finished before left out."""
    wanted = []
    done: list[Cell] = []
    for condition, seed in config.cells:
        folder = cell_folder(config, run.folder, condition, seed)
        if (folder / RESULT).is_file():
            done.append(Cell(condition, seed, folder, files.read_json(folder / RESULT, "result of a training")))
        else:
            wanted.append((condition, seed, folder))
    if len(wanted) < len(config.cells):
        run.log.info("%d of %d trainings finished before", len(done), len(config.cells))
    workers = min(config.workers, len(wanted))
    if workers > 1:
        _run_beside(config, run, wanted, workers)
    else:
        for condition, seed, folder in wanted:
            _run_here(config, run, condition, seed, folder)
    cells = []
    for condition, seed in config.cells:
        folder = cell_folder(config, run.folder, condition, seed)
        cells.append(Cell(condition, seed, folder, files.read_json(folder / RESULT, "result of a training")))
    return cells


def _run_here(config: VaeDynamicsConfig, run: Run, condition: str, seed: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with run.progress.follow(f"{condition}, seed {seed}: steps") as show:
        result = train_and_evaluate(config, condition, seed, folder, run.log.info, show)
    run.log.info("%s", _line(condition, seed, result))


def _line(condition: str, seed: int, result: dict[str, Any]) -> str:
    found = result["evaluation"]
    text = f"{condition}, seed {seed}: MSE {found['mse']:.5f}, PSNR {found['psnr']:.2f} dB, {result['inactive']} dead"
    return f"{text}, {result['train_seconds']:.0f} s"


def _work(values: dict[str, Any], condition: str, seed: int, folder: str, threads: int) -> dict[str, Any]:
    """One training in a process of its own."""
    torch.set_num_threads(threads)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return train_and_evaluate(build_config(VaeDynamicsConfig, values), condition, seed, Path(folder))


def _run_beside(config: VaeDynamicsConfig, run: Run, wanted: list[tuple[str, int, Path]], workers: int) -> None:
    """Several trainings at a time; each is one thread, or a share of them."""
    threads = max(1, torch.get_num_threads() // workers)
    values = config_values(config)
    # The environment is what a library reads when it is loaded, long before `_work` runs.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        with (
            ProcessPoolExecutor(workers, get_context("spawn")) as pool,
            run.progress.task("trainings", len(wanted)) as advance,
        ):
            waiting: dict[Future[dict[str, Any]], tuple[str, int]] = {
                pool.submit(_work, values, condition, seed, str(folder), threads): (condition, seed)
                for condition, seed, folder in wanted
            }
            while waiting:
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for each in finished:
                    run.log.info("%s", _line(*waiting.pop(each), _result(each, waiting)))
                    advance(1)
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


def _result(finished: Future[dict[str, Any]], others: Any) -> dict[str, Any]:
    try:
        return finished.result()
    except BaseException as error:
        for other in others:
            other.cancel()
        # An InputError of another process arrives with its line alone.
        raise InputError(str(error)) if isinstance(error, InputError) else error from None
