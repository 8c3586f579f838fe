"""Watching the channels of a model while it trains, cheaply enough to leave on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pysteer.dynamics.accumulator import Accumulator
from pysteer.dynamics.history import History
from pysteer.dynamics.points import Layers, Point, choose_points, first_tensor
from pysteer.dynamics.window import PHASES, Window, stat_name
from pysteer.errors import InputError
from pysteer.ops.channel_moments import merge_moments

MAP = "full_activation_map"
WINDOWS = ("all", "last")


class _Watch:
    """One point while the monitor is attached: an accumulator a phase, and the map that is kept."""

    def __init__(self, point: Point, monitor: Monitor, device: torch.device) -> None:
        self.point, self.monitor = point, monitor
        self.sums: dict[str, Accumulator] = {}
        self.kept: dict[str, Tensor] = {}
        self.keeps_map = False
        if point.width:
            self.prepare(point.width, device)

    def prepare(self, width: int, device: torch.device) -> None:
        make = (self.monitor.eps, self.point.channel_dim, device)
        self.sums = {phase: Accumulator(width, *make) for phase in PHASES}

    @property
    def width(self) -> int:
        return self.sums["train"].moments.shape[1] if self.sums else 0

    def see(self, training: bool, value: Any) -> None:
        """Add what the module took or returned, unless the forward pass is run again for checkpointed gradients."""
        x = value if type(value) is Tensor else first_tensor(value)
        if x is None or torch._C._current_graph_task_id() != -1:
            return
        phase = self.monitor._phase or ("train" if training else "validation")
        if not self.sums:
            dim = self.point.channel_dim
            dim = dim if dim is not None else 1 if x.dim() >= 4 else -1
            self.prepare(x.shape[dim], x.device)
        self.sums[phase].add(x)
        if self.keeps_map and phase not in self.kept:
            self.kept[phase] = x.detach()[: self.monitor.map_samples].clone()

    def hook(self, module: nn.Module) -> Any:
        """Have the module report; returns the handle of the hook."""
        monitor, see = self.monitor, self.see

        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            if monitor._armed:
                see(module.training, output)

        def before(module: nn.Module, arguments: Any, keywords: Any) -> None:
            if monitor._armed:
                see(module.training, arguments[0] if arguments else next(iter(keywords.values()), None))

        if self.point.capture == "output":
            return module.register_forward_hook(after)
        return module.register_forward_pre_hook(before, with_kwargs=True)


class Monitor:
    """Count, mean, variance, minimum, maximum, mean |x|, near-zero and zero counts of every channel at chosen layers.

        with Monitor(vae, layers="conv+GroupNorm", every=20) as monitor:
            for step, batch in enumerate(batches, start=1):
                ...  # forward, backward, optimizer
                for window in monitor.step(step):
                    print(window.step, window.phase, window.stat("mean_abs"))

    The sums stay on the device and cross to the CPU once per interval. Forward passes in `eval()` mode go to a window
    of their own, so validation does not blur training; forward passes that gradient checkpointing repeats are counted
    once; those of gradient accumulation all count. Under `torch.distributed` the windows of all ranks are merged, in
    the order of the ranks, and every rank gets the same result.

    Args:
        model: any module; a DDP wrapper is looked through.
        layers: which, see `choose_points`. Mappings may carry `metrics`, as in `stats`.
        stats: statistics that `window.table(monitor.metrics)` lists, see `pysteer.dynamics.window.STATS`; the windows
            hold all eight. `full_activation_map` keeps the activations of the first forward pass of each window.
        every: steps between two windows.
        window: "all": every forward pass since the window before; "last": only those of the step that closes it.
        eps: |x| < eps counts as near zero.
        folder: where the history goes; None keeps it in memory.
        map_samples: rows of the maps that are kept.
        merge: whether to merge over the ranks of `torch.distributed`.

    Attributes:
        points: what is watched.
        history: all windows, see `History`.
        metrics: names of the statistics by point.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = "all",
        stats: Sequence[str] = ("mean_abs",),
        every: int = 100,
        window: str = "all",
        *,
        eps: float = 1e-6,
        folder: str | Path | None = None,
        map_samples: int = 4,
        merge: bool = True,
    ) -> None:
        if every < 1 or map_samples < 1:
            raise InputError("every, map_samples", value=f"{every}, {map_samples}", allowed="whole numbers from 1")
        if window not in WINDOWS:
            raise InputError("window", value=window, allowed=", ".join(WINDOWS))
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.every, self.window, self.eps = every, window, eps
        self.map_samples, self.merge = map_samples, merge
        self.points = choose_points(self.model, layers)
        self.metrics = _metrics(self.points, layers, stats)
        self.history = History(folder)
        weight = next(self.model.parameters(), None)
        device = weight.device if weight is not None else torch.device("cpu")
        self._watches = [_Watch(point, self, device) for point in self.points]
        for watch in self._watches:
            watch.keeps_map = MAP in self.metrics[watch.point.name]
        self._phase: str | None = None
        self._hooks: list[Any] = []
        self._armed = window == "all" or every == 1

    def attach(self) -> Monitor:
        """Start to watch."""
        if not self._hooks:
            modules = dict(self.model.named_modules())
            self._hooks = [watch.hook(modules[watch.point.path]) for watch in self._watches]
        return self

    def detach(self) -> None:
        """Stop to watch; the model is as before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Monitor:
        return self.attach()

    def __exit__(self, *_: Any) -> None:
        self.detach()
        self.history.flush()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Put all forward passes of the block into the window of a phase, whatever mode the modules are in."""
        if name not in PHASES:
            raise InputError("phase", value=name, allowed=", ".join(PHASES))
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out all forward passes of the block."""
        before, self._armed = self._armed, False
        try:
            yield
        finally:
            self._armed = before

    def step(self, step: int) -> list[Window]:
        """Say that training step `step` (counted from 1) is over; the windows that closed with it, often none."""
        closed = self.close(step) if step % self.every == 0 else []
        self._armed = self.window == "all" or (step + 1) % self.every == 0
        return closed

    def close(self, step: int) -> list[Window]:
        """Close the windows now, whatever the interval; phases without a forward pass have none."""
        ready = [watch for watch in self._watches if watch.sums]
        names = [watch.point.name for watch in ready]
        widths = [watch.width for watch in ready]
        closed = []
        for phase in PHASES if ready else ():
            sums = [watch.sums[phase] for watch in ready]
            if not _distributed(self.merge) and not any(each.touched for each in sums):
                continue
            moments = merged_over_ranks(torch.cat([each.moments for each in sums], 1), self.merge).cpu()
            for each in sums:
                each.clear()
            if not bool(moments[0].any()):
                continue
            maps = {w.point.name: w.kept.pop(phase).cpu() for w in ready if phase in w.kept}
            closed.append(Window(step, phase, names, widths, moments, maps))
            self.history.add(closed[-1])
        return closed

    def state_dict(self, merged: bool = False) -> dict[str, Tensor]:
        """The sums of windows that are still open, and whether the next forward pass counts.

        With `merged`, the sums of all ranks together: every rank has to call it, and one alone may load it.
        """
        held = {f"{w.point.name}/{phase}": w.sums[phase].moments for w in self._watches if w.sums for phase in PHASES}
        if merged and _distributed(self.merge):
            held = {key: merged_over_ranks(moments) for key, moments in held.items()}
        return {"armed": torch.tensor(self._armed), **{key: moments.clone() for key, moments in held.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            InputError: it is of other points or widths.
        """
        own = {watch.point.name: watch for watch in self._watches}
        self._armed = bool(state["armed"])
        for key, moments in state.items():
            name, _, phase = key.rpartition("/")
            if key == "armed":
                continue
            watch = own.get(name)
            if watch is None or phase not in PHASES or (watch.sums and watch.width != moments.shape[1]):
                raise InputError("state of a monitor, point", value=key, allowed=", ".join(own), fix="same layers")
            if not watch.sums:
                watch.prepare(moments.shape[1], moments.device)
            into = watch.sums[phase]
            into.reset(moments.to(into.moments.device, torch.float64, copy=True).contiguous())


def _distributed(merge: bool) -> bool:
    return merge and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def merged_over_ranks(moments: Tensor, merge: bool = True) -> Tensor:
    """`[8, D]` moments of all ranks together, merged in the order of the ranks; as they are without a process group."""
    if not _distributed(merge):
        return moments
    gathered = [torch.empty_like(moments) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, moments.contiguous())
    total = gathered[0]
    for part in gathered[1:]:
        total = merge_moments(total, part)
    return total


def _metrics(points: Iterable[Point], layers: Layers, stats: Sequence[str]) -> dict[str, list[str]]:
    """Statistics by point: those of its mapping where it has some, else `stats`."""
    stats = [stats] if isinstance(stats, str) else list(stats)
    own: dict[str, list[str]] = {}
    asked = [layers] if isinstance(layers, (str, Mapping)) else list(layers)
    for item in asked:
        if isinstance(item, Mapping):
            name = f"{item.get('name')}.{item.get('capture_point', 'output')}"
            own.setdefault(name.removeprefix("vae."), []).extend(item.get("metrics") or stats)
    found = {point.name: own.get(point.name.removeprefix("vae."), stats) for point in points}
    check: Callable[[str], str] = stat_name
    for name in {name for names in found.values() for name in names} - {MAP}:
        check(name)
    return found
