"""A worker: runs batches of cells, keeps what they gave, and evaluates it while the next batch is being generated."""

from __future__ import annotations

import gc
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import pysteer
from pysteer import files
from pysteer.errors import InputError, PysteerError
from pysteer.recipes.config import build_config
from pysteer.sweep.cells import Cell
from pysteer.sweep.rows import column_of, column_types, table_of
from pysteer.sweep.store import SCHEMA, Store, StoreFull, guarded
from pysteer.sweep.tasks.base import Engine, Outputs, Task

_SAME_ERROR = 48  # cells that fail alike one after the other, none having gone well, before the sweep gives up


@dataclass
class Generated:
    """Cells that ran together, and what they gave."""

    cells: list[Cell]
    outputs: Outputs
    seconds: float
    provenance: dict[str, Any] = field(default_factory=dict)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on the host or on a device."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in str(error).lower() or "can't allocate memory" in str(error))
    )


class Worker:
    """Runs batches one after the other.

    Args:
        store: where results go.
        task: what the cells are.
        name: of this worker, letters and digits; it alone writes shards of that name.
        advance: told about every n cells that have a row.
        overlap: whether a batch is evaluated while the next one is generated.
    """

    def __init__(
        self,
        store: Store,
        task: Task,
        name: str = "w0",
        *,
        advance: Callable[[int], object] = lambda n: None,
        overlap: bool = True,
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self.store, self.task, self.name, self.advance, self.alive = store, task, name, advance, alive
        self.kinds = column_types(task.setting)
        self.engines: dict[tuple[Any, ...], Engine] = {}
        self.limit = 1 << 30  # rows that fit, once memory ran out
        self.done = self.failed = self.batches = 0
        self.work = [0.0, 0.0]
        self.seconds = {"generate": 0.0, "evaluate": 0.0}
        self.started = time.time()
        self._number = max((int(p.stem.split("-")[1]) for p in store.pending(f"{name}-")), default=-1) + 1
        self._pool = ThreadPoolExecutor(1) if overlap else None
        self._waiting: Future[None] | None = None
        self._repeated: tuple[str, int] = ("", 0)

    # -- running

    def run(self, batches: Iterable[Sequence[Cell]]) -> None:
        """Run all batches and wait until the last one is evaluated.

        Raises:
            StoreFull: results could not be written.
            InputError: several batches failed as a whole and for the same reason.
        """
        try:
            for cells in batches:
                self.run_batch(cells)
            self.finish()
        finally:
            self.close()

    def run_batch(self, cells: Sequence[Cell]) -> None:
        """Generate a batch; it is evaluated behind the next one."""
        for generated in self.generate(list(cells)):
            path = self._keep(generated)
            self.finish()
            if self._pool is None:
                self._evaluate(generated, path)
            else:
                self._waiting = self._pool.submit(self._evaluate, generated, path)

    def finish(self) -> None:
        """Wait for what is being evaluated."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.result()

    def close(self) -> None:
        """End the thread; what is being evaluated is finished first."""
        if self._pool is not None:
            self._pool.shutdown()
        self.tell("stopped")

    def generate(self, cells: list[Cell]) -> list[Generated]:
        """Run cells: in halves when memory runs out, and apart from each other when one of them spoils the batch."""
        if len(cells) > self.limit:
            return self._halves(cells)
        start = time.perf_counter()
        try:
            settings = [self.setting(cell) for cell in cells]
            engine = self._engine(settings[0])
            outputs = engine.generate(settings)
        except (KeyboardInterrupt, SystemExit, StoreFull):
            raise
        except Exception as error:  # whatever it is, it must not take the other cells with it
            return self._after(error, cells)
        seconds = time.perf_counter() - start
        self.seconds["generate"] += seconds
        self._repeated = ("", 0)
        for i, column in enumerate((outputs.work[0], outputs.work[1])):
            self.work[i] += column
        return [Generated(cells, outputs, seconds, engine.provenance())]

    def _after(self, error: Exception, cells: list[Cell]) -> list[Generated]:
        if out_of_memory(error):
            error.__traceback__ = None  # it holds the tensors of the batch
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(cells) > 1:
                self.limit = max(1, len(cells) // 2)
                return self._halves(cells)
        if len(cells) > 1:
            return self._halves(cells)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._repeated = (reason, self._repeated[1] + 1 if self._repeated[0] == reason else 1)
        if self._repeated[1] >= _SAME_ERROR and self.done == self.failed:
            raise PysteerError(f"every cell so far failed alike: {reason}") from error
        return [Generated(cells, Outputs(failed={0: reason}), 0.0)]

    def _halves(self, cells: list[Cell]) -> list[Generated]:
        middle = (len(cells) + 1) // 2
        return [*self.generate(cells[:middle]), *self.generate(cells[middle:])]

    def setting(self, cell: Cell) -> Any:
        """The setting of a cell."""
        return build_config(self.task.setting, cell.config)

    def _engine(self, setting: Any) -> Engine:
        group = tuple(repr(getattr(setting, name)) for name in self.task.group)
        if group not in self.engines:
            self.engines.clear()  # one model at a time
            self.engines[group] = self.task.open(setting, self.store.folder)
        return self.engines[group]

    # -- keeping

    def _keep(self, generated: Generated) -> Path:
        """Write down what a batch gave, so that it need not run again if this process ends before it is evaluated."""
        outputs = generated.outputs
        notes = {
            "cells": [[cell.key, cell.config] for cell in generated.cells], "texts": outputs.texts,
            "columns": outputs.columns, "failed": {str(row): why for row, why in outputs.failed.items()},
            "seconds": generated.seconds, "provenance": generated.provenance,
        }  # fmt: skip
        tensors = {"images": outputs.images if outputs.images is not None else torch.zeros(0, dtype=torch.uint8)}
        path = self.store.path("pending", f"{self.name}-{self._number:06d}.safetensors")
        self._number += 1
        guarded(files.write_safetensors, path, tensors, {"batch": json.dumps(files.plain(notes))})
        return path

    def write_rows(self, generated: Generated) -> None:
        """Evaluate cells and write their rows at once."""
        self._evaluate(generated, self._keep(generated))

    def _evaluate(self, generated: Generated, path: Path) -> None:
        start = time.perf_counter()
        if not self.alive():
            return
        rows = self.rows(generated, path.stem)
        self.store.write(self.name, table_of(rows, self.kinds))
        path.unlink(missing_ok=True)
        self.seconds["evaluate"] += time.perf_counter() - start
        self.batches += 1
        self.done += len(rows)
        self.failed += sum(row["status"] == "failed" for row in rows)
        if self.batches % 32 == 0:
            self.store.merge(self.name)
        self.tell("running")
        self.advance(len(rows))

    def rows(self, generated: Generated, batch: str) -> list[dict[str, Any]]:
        """The rows of a batch, measured."""
        cells, outputs = generated.cells, generated.outputs
        settings = [self.setting(cell) for cell in cells]
        failed = dict(outputs.failed)
        good = [i for i in range(len(cells)) if i not in failed]
        measures: list[dict[str, Any]] = [{} for _ in cells]
        if good:
            try:
                found = self._engine_of(settings[0]).evaluate([settings[i] for i in good], _only(outputs, good))
                for i, measured in zip(good, found, strict=True):
                    measures[i] = measured
            except Exception as error:  # a cell without measures is a failed one, with the reason in its row
                failed |= dict.fromkeys(good, f"evaluation: {type(error).__name__}: {' '.join(str(error).split())}")
        made = {
            "worker": self.name, "batch": f"{batch}", "batch_rows": len(cells), "schema": SCHEMA,
            "seconds": generated.seconds / len(cells), "time": time.time(), "pysteer": pysteer.__version__,
            "torch": torch.__version__, **generated.provenance,
        }  # fmt: skip
        kept = [i for i in range(len(cells)) if i not in failed]
        names: dict[int, str] = {}
        if outputs.images is not None:
            names = dict(zip(kept, self.store.put_images([outputs.images[i] for i in kept]), strict=True))
        rows = []
        for i, cell in enumerate(cells):
            row = {
                **{column_of(name): value for name, value in cell.config.items()},
                **made,
                "key": cell.key,
                "status": "ok",
                "error": None,
            }
            row |= {**(outputs.columns[i] if outputs.columns else {}), **measures[i]}
            row["image"] = names.get(i)
            if i in failed:
                row |= {"status": "failed", "error": failed[i]}
            if outputs.texts is not None and i not in failed:
                row["text"] = outputs.texts[i]
            rows.append(row)
        return rows

    def _engine_of(self, setting: Any) -> Engine:
        """The engine of a group from the other thread: the model may have been given up for the next group's."""
        group = tuple(repr(getattr(setting, name)) for name in self.task.group)
        return self.engines.get(group) or self.task.open(setting, self.store.folder)

    def recover(self, finished: set[str], prefix: str = "") -> int:
        """Evaluate batches that processes which ended had generated; returns how many cells.

        Args:
            finished: keys with a row, to which those of these batches are added.
            prefix: of the names of the batches.
        """
        count = 0
        for path in self.store.pending(prefix):
            try:
                tensors, metadata = files.read_safetensors(path, "pending batch")
                notes = json.loads(metadata["batch"])
            except (InputError, KeyError, ValueError) as error:
                self.store.set_aside(path, str(error))
                continue
            cells = [Cell(key, config) for key, config in notes["cells"]]
            open_rows = [i for i, cell in enumerate(cells) if cell.key not in finished]
            if open_rows:
                images = tensors["images"] if tensors["images"].numel() else None
                failed = {int(row): why for row, why in notes["failed"].items()}
                whole = Outputs(images, notes["texts"], notes["columns"], failed)
                generated = Generated(
                    [cells[i] for i in open_rows], _only(whole, open_rows), notes["seconds"], notes["provenance"]
                )
                self._evaluate(generated, path)
                finished.update(cell.key for cell in cells)
                count += len(open_rows)
            path.unlink(missing_ok=True)
        return count

    def tell(self, state: str) -> None:
        """Note how far this worker is."""
        now = time.time()
        self.store.tell(
            self.name,
            {
                "state": state, "host": socket.gethostname(), "pid": os.getpid(), "started": self.started,
                "updated": now, "done": self.done, "failed": self.failed, "batches": self.batches,
                "rate": self.done / max(now - self.started, 1e-9), "seconds": self.seconds, "work": self.work,
                "batch_limit": self.limit if self.limit < 1 << 30 else None,
            },
        )  # fmt: skip


def _only(outputs: Outputs, rows: Sequence[int]) -> Outputs:
    """The same for some of the rows."""
    index = list(rows)
    place = {row: i for i, row in enumerate(index)}
    return Outputs(
        None if outputs.images is None else outputs.images[index],
        None if outputs.texts is None else [outputs.texts[i] for i in index],
        [outputs.columns[i] for i in index] if outputs.columns else [],
        {place[row]: why for row, why in outputs.failed.items() if row in place},
    )
