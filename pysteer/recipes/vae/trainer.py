"""One training of the autoencoder: a fixed order of images and noise, checkpoints, and everything that looks on.

All that is random is drawn from the seed and the number of the step or epoch, so a run that goes on from a checkpoint
is the run that was not interrupted, bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pysteer import files
from pysteer.errors import InputError
from pysteer.recipes.progress import Show
from pysteer.recipes.vae.checkpoint import (
    checkpoints,
    load_optimizer,
    optimizer_tensors,
    read_checkpoint,
    save_checkpoint,
)
from pysteer.recipes.vae.config import VaeDynamicsConfig
from pysteer.recipes.vae.data import Images
from pysteer.recipes.vae.losses import Discriminator, FeatureLoss, divergence, hinge
from pysteer.recipes.vae.model import build_model, plant
from pysteer.recipes.vae.observers import Observers

Say = Callable[..., None]


def _seed(*keys: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "little") >> 1


def make_accelerator(config: VaeDynamicsConfig, folder: Path, say: Say) -> Any:
    """The accelerator of a training.

    Raises:
        InputError: accelerate is missing, or the device cannot do the precision.
    """
    try:
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError("training needs accelerate", fix="pip install 'pysteer-core[dynamics]'") from error
    cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    if config.training.mixed_precision == "fp16" and cpu:
        raise InputError("training.mixed_precision", value="fp16", allowed="no, bf16 on a CPU", fix="use bf16")
    AcceleratorState._reset_state(reset_partial_state=False)  # a second training may have another precision
    trackers = _usable_trackers(config.logging.report_to, say)
    precision = config.training.mixed_precision
    return Accelerator(mixed_precision=precision, cpu=cpu, log_with=trackers or None, project_dir=str(folder / "logs"))


def _usable_trackers(wanted: str, say: Say) -> list[str]:
    """The trackers that are asked for and installed; a warning for the others."""
    from importlib.util import find_spec

    names = {"none": [], "all": ["tensorboard", "wandb"]}.get(wanted, [wanted])
    modules = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
    usable = [name for name in names if any(find_spec(module) is not None for module in modules[name])]
    for name in names:
        if name not in usable:
            say("logging.report_to: %s is not installed, its figures are in the tables only", name)
    return usable


class Trainer:
    """Trains one autoencoder in one folder.

    Args:
        config: the configuration.
        condition: "baseline", or "nudge": interventions are made.
        seed: of weights, order and noise.
        folder: where everything goes.
        images: to train on.
        held: to validate on, or None.
        say: called with a line and its arguments for the log.
    """

    def __init__(
        self,
        config: VaeDynamicsConfig,
        condition: str,
        seed: int,
        folder: Path,
        images: Images,
        held: Images | None,
        say: Say = lambda *_: None,
    ) -> None:
        self.config, self.condition, self.seed, self.folder = config, condition, seed, folder
        self.images, self.held, self.say = images, held, say
        self.accelerator = make_accelerator(config, folder, say)
        part = config.training
        model = build_model(config.model, seed)
        self.planted = plant(model, config.model.plant)
        self.model = self.accelerator.prepare(_Reconstruction(model))
        self.plain = self.accelerator.unwrap_model(self.model).vae
        self.optimizer = torch.optim.AdamW(
            self.plain.parameters(),
            lr=part.learning_rate,
            betas=(part.adam_beta1, part.adam_beta2),
            weight_decay=part.adam_weight_decay,
            eps=part.adam_epsilon,
        )
        self.scaler = self.accelerator.scaler
        device = self.accelerator.device
        self.features = FeatureLoss().to(device) if part.perceptual_weight else None
        self.judge, self.judge_optimizer = self._make_judge()
        self.average = [p.detach().clone() for p in self.plain.parameters()] if part.ema_decay else []
        nudge = condition == "nudge"
        main = self.accelerator.is_main_process
        self.observers = Observers(config, self.plain, self.optimizer, folder if main else None, nudge, seed)
        self.step, self.seconds = 0, 0.0
        self.log_rows: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def _make_judge(self) -> tuple[Any, Any]:
        if not self.config.training.adversarial_weight:
            return None, None
        torch.manual_seed(_seed(self.seed, "judge"))
        judge = self.accelerator.prepare(Discriminator())
        rate = self.config.training.learning_rate
        return judge, torch.optim.AdamW(judge.parameters(), lr=rate, betas=(0.5, 0.9))

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch, of every process."""
        return math.ceil(len(self.images) / (self.config.data.batch_size * self.accelerator.num_processes))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.config.training.gradient_accumulation_steps)

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        part = self.config.training
        steps = part.num_train_epochs * self.steps_per_epoch
        return steps if part.max_train_steps is None else min(steps, part.max_train_steps)

    def batches(self, step: int) -> list[Tensor]:
        """The batches of step `step` (from 1), in the order that the seed and the epoch fix."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_seed(self.seed, "order", epoch))
            self._order = (epoch, torch.randperm(len(self.images), generator=generator))
        order = self._order[1]
        size, ranks = self.config.data.batch_size, self.accelerator.num_processes
        many = self.config.training.gradient_accumulation_steps
        found = []
        for number in range(within * many, min((within + 1) * many, self.batches_per_epoch)):
            part = order[number * size * ranks : (number + 1) * size * ranks][self.accelerator.process_index :: ranks]
            part = part if len(part) else order[:1]  # every process needs a batch
            found.append(self.images.batch(part.tolist()).to(self.accelerator.device))
        return found

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, from 1."""
        part, done = self.config.training, step - 1
        if done < part.lr_warmup_steps:
            return part.learning_rate * (done + 1) / part.lr_warmup_steps
        if part.lr_scheduler_type == "constant":
            return part.learning_rate
        along = (done - part.lr_warmup_steps) / max(1, self.total - part.lr_warmup_steps)
        falling = 1 - along if part.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * along))
        return part.learning_rate * max(0.0, falling)

    def run(self, show: Show = lambda *_: None) -> None:
        """Train to the end, from the newest checkpoint if there is one; `show` is told steps and total."""
        self.resume()
        show(self.step, self.total)
        start = time.monotonic() - self.seconds
        trackers = self._start_trackers()
        monitor = self.observers.monitor
        if monitor is not None:
            monitor.attach()
        try:
            while self.step < self.total:
                self.train_step()
                self.seconds = time.monotonic() - start
                self._after_step(trackers)
                show(self.step, self.total)
        finally:
            if monitor is not None:
                monitor.detach()
            for tracker in self.accelerator.trackers:
                tracker.finish()  # end_training would also leave the process group, which later trainings need
        self.finish()

    def _start_trackers(self) -> bool:
        if not self.accelerator.log_with:
            return False
        config = self.config
        settings = {"wandb": {"name": config.run_name or None, "entity": config.logging.entity or None}}
        self.accelerator.init_trackers(config.project_name, init_kwargs=settings)
        return True

    def train_step(self) -> None:
        """One step of the optimizer."""
        self.step += 1
        part = self.config.training
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        batches = self.batches(self.step)
        sums: dict[str, Tensor] = {}
        for number, images in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, parts = self._loss(images, number)
                self.accelerator.backward(loss / len(batches))
            for name, value in parts.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / len(batches)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.plain.parameters(), part.max_grad_norm)
        self.scaler.step(self.optimizer) if self.scaler is not None else self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.plain.parameters()], 1 - part.ema_decay)
        if self.step % self.config.logging.log_interval == 0 or self.step == self.total:
            self._log(sums, norm)

    def _loss(self, images: Tensor, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its parts."""
        part = self.config.training
        generator = torch.Generator().manual_seed(
            _seed(self.seed, "noise", self.step, number, self.accelerator.process_index)
        )
        mean, logvar, made = self.model(images, generator)
        error, kl = (made.float() - images).square().mean(), divergence(mean, logvar)
        loss = error + part.kl_weight * kl
        parts = {"mse": error.detach(), "kl": kl.detach()}
        if self.features is not None:
            parts["perceptual"] = (value := self.features(made, images)).detach()
            loss = loss + part.perceptual_weight * value
        if self.judge is not None and self.step > part.adversarial_start:
            value, own = self._against_judge(made, images)
            loss = loss + part.adversarial_weight * value
            parts |= {"adversarial": value.detach(), "discriminator": own}
        return loss, {"loss": loss.detach(), **parts}

    def _against_judge(self, made: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The term of the autoencoder; the discriminator learns one step on the way."""
        own = hinge(self.judge(images), self.judge(made.detach().float()))
        self.judge_optimizer.zero_grad(set_to_none=True)
        own.backward()
        self.judge_optimizer.step()
        self.judge.requires_grad_(False)
        value = -self.judge(made.float()).mean()
        self.judge.requires_grad_(True)
        return value, own.detach()

    def _log(self, parts: dict[str, Tensor], norm: Tensor) -> None:
        values = {name: float(self.accelerator.reduce(value, "mean")) for name, value in parts.items()}
        if not math.isfinite(values["loss"]):
            fix = "a smaller training.learning_rate, or training.mixed_precision=no"
            raise InputError(f"loss at step {self.step}", value=values["loss"], allowed="a finite number", fix=fix)
        row = {"step": self.step, **values, "grad_norm": float(norm), "learning_rate": self.rate(self.step)}
        self.log_rows.append(row)

    def _after_step(self, trackers: bool) -> None:
        self.observers.after(self.step)
        config = self.config
        if trackers and self.log_rows and self.log_rows[-1]["step"] == self.step:
            self.accelerator.log({**self.log_rows[-1], "inactive": self.observers.inactive}, step=self.step)
        lens = config.logit_lens
        if lens.enabled and self.step % lens.visualization_interval == 0 and self.accelerator.is_main_process:
            from pysteer.recipes.vae.pictures import draw_lens

            draw_lens(self)
        if self._validates():
            self.validate()
        if self.step % config.saving.every == 0 and self.step < self.total:
            self.save()

    def _validates(self) -> bool:
        part = self.config.training
        by_step = part.validation_steps > 0 and self.step % part.validation_steps == 0
        by_epoch = part.validation_epochs > 0 and self.step % (self.steps_per_epoch * part.validation_epochs) == 0
        wanted = (
            by_step or by_epoch or (self.step == self.total and bool(part.validation_steps or part.validation_epochs))
        )
        return self.held is not None and wanted

    @torch.no_grad()
    def validate(self) -> None:
        """Mean squared error and KL of the held-out images through the mode of the posterior."""
        assert self.held is not None
        self.plain.eval()
        size = self.config.data.validation_batch_size
        sums = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        for start in range(rank * size, len(self.held), size * ranks):
            images = self.held.batch(range(start, min(start + size, len(self.held)))).to(sums.device)
            with self.accelerator.autocast():
                posterior = self.plain.encode(images).latent_dist
                made = self.plain.decode(posterior.mode()).sample
            error = (made.float() - images).square().mean()
            kl = divergence(posterior.mean, posterior.logvar)
            sums += torch.stack([error, kl, torch.ones_like(error)]).double() * len(images)
        sums = self.accelerator.reduce(sums, "sum")
        mse, kl = (sums[:2] / sums[2]).tolist()
        total = mse + self.config.training.kl_weight * kl
        self.validations.append({"step": self.step, "mse": mse, "kl": kl, "loss": total})
        self.plain.train()

    def save(self) -> None:
        """Write a checkpoint."""
        if self.observers.monitor is not None:
            self.observers.monitor.history.flush()
        watched = self.observers.tensors()  # merged over the processes, so all take part
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, Any] = {
            "model": dict(self.plain.state_dict()),
            "optimizer": optimizer_tensors(self.optimizer, self.plain),
            **watched,
        }
        if self.average:
            tensors["ema"] = {str(i): value for i, value in enumerate(self.average)}
        if self.judge is not None:
            inner = self.accelerator.unwrap_model(self.judge)
            tensors["judge"] = dict(inner.state_dict())
            tensors["judge_optimizer"] = optimizer_tensors(self.judge_optimizer, inner)
        state = {
            "log": self.log_rows,
            "validations": self.validations,
            "seconds": self.seconds,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "observers": self.observers.state(),
        }
        saving = self.config.saving
        save_checkpoint(self.folder, saving.checkpoint_dir_prefix, self.step, tensors, state, saving.keep)

    def resume(self) -> None:
        """Go on from the newest checkpoint; without one, from the start."""
        found = checkpoints(self.folder, self.config.saving.checkpoint_dir_prefix)
        if not found:
            if self.observers.monitor is not None:
                self.observers.monitor.history.rewind(0)
            return
        self.step, path = found[-1]
        tensors, state = read_checkpoint(path)
        self.say("goes on from %s", path)
        self.plain.load_state_dict(tensors["model"])
        load_optimizer(self.optimizer, self.plain, tensors["optimizer"])
        for average, held in zip(self.average, (tensors["ema"][str(i)] for i in range(len(self.average))), strict=True):
            average.copy_(held)
        if self.judge is not None:
            inner = self.accelerator.unwrap_model(self.judge)
            inner.load_state_dict(tensors["judge"])
            load_optimizer(self.judge_optimizer, inner, tensors["judge_optimizer"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.log_rows, self.validations, self.seconds = state["log"], state["validations"], state["seconds"]
        self.observers.restore(self.step, tensors, state["observers"], self.accelerator.is_main_process)

    def finish(self) -> None:
        """Write the trained model and the tables."""
        if self.observers.monitor is not None:
            self.observers.monitor.history.flush()
        if not self.accelerator.is_main_process:
            return
        from pysteer.recipes.vae.tables import write_tables

        _save_model(self.plain, self.folder / "final_model/vae")
        if self.average:
            held = [p.detach().clone() for p in self.plain.parameters()]
            self._set(self.average)
            _save_model(self.plain, self.folder / "final_model/vae_ema")
            self._set(held)
        write_tables(self)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.plain.parameters(), values, strict=True):
            parameter.copy_(value)


class _Reconstruction(nn.Module):
    """Posterior and reconstruction in one forward pass, which is what DDP and autocast wrap."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        made = self.vae.decode(posterior.sample(generator)).sample
        return posterior.mean, posterior.logvar, made


def _save_model(model: Any, folder: Path) -> None:
    """Write an autoencoder as diffusers does, whole or not at all."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    files.write_safetensors(folder / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
    config = {"_class_name": type(model).__name__, **{k: v for k, v in model.config.items() if not k.startswith("_")}}
    files.write_json(folder / "config.json", config)
