"""The training loop."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stellar_fast import native
from stellar_fast.data import EpochSampler, TooManyUnreadable
from stellar_fast.files import lock_folder
from stellar_fast.models import StellarModel
from stellar_fast.train.build import build_dataset, build_model
from stellar_fast.train.checkpoint import Checkpoint, checkpoint_path, newest_checkpoint, save_checkpoint
from stellar_fast.train.config import TrainConfig, resolve_device
from stellar_fast.train.distributed import Ranks, process_group
from stellar_fast.train.loggers import JsonLines, Logger, Record, TensorBoard
from stellar_fast.train.optim import SkippingAdamW, learning_rate, parameter_groups
from stellar_fast.train.random_state import get_random_state, set_random_state
from stellar_fast.train.signals import Stop, leave_signals_to_the_parent, stop_on_signals


class NonFiniteLossError(RuntimeError):
    """The loss was not finite for `max_nonfinite` steps in a row. The weights are those before the first of them."""


@dataclass
class TrainResult:
    """What `train` returns. `history` holds the record of every `log_every`-th step (see `loggers`), in order."""

    model: StellarModel
    step: int
    seconds: float
    images_per_second: float
    skipped_steps: int
    history: list[Record]
    checkpoint: Path
    resume_command: str | None = None  # set where a signal ended the run early


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    loggers: Sequence[Logger] = (),
    model: StellarModel | None = None,
    dataset: Dataset | None = None,
) -> TrainResult:
    """Train a model and leave `config.out` with config.yaml, metrics.jsonl and checkpoints/.

    Args:
        config: the run. With `max_seconds` the learning rate follows the clock where that is ahead of the step count,
            and the run cannot be repeated or resumed exactly.
        resume: continue from the newest good checkpoint in `config.out`; a run without one starts from the beginning.
            On a CPU the continued run has the same losses bit for bit, for any number of workers.
        loggers: called with every step's record, on the first process alone.
        model: trained instead of the one that `config` describes.
        dataset: takes the place of `config.data`; maps (epoch, index) to `global_views` and `local_views`.

    Seeds torch's global random state. SIGINT and SIGTERM end the run after the step at hand, with a checkpoint; a
    second one ends it at once.

    Raises:
        ValueError: a run that cannot start or resume, with both values where two disagree.
        NonFiniteLossError: after `config.max_nonfinite` skipped steps in a row.
    """
    if not config.out:
        raise ValueError("out is empty: name a folder for the run (--out RUN)")
    if config.raise_allocator:
        native.raise_allocator_thresholds()
    device = resolve_device(config.device)
    with process_group(device) as ranks, stop_on_signals() as stop:
        if device.type == "cuda" and ranks.world > 1:
            device = torch.device("cuda", ranks.local)
            torch.cuda.set_device(device)
        torch.manual_seed(config.seed)
        if model is None:  # weights of a resumed run come from its checkpoint: those it started from may be gone
            start = config
            resumed = newest_checkpoint(Path(config.out) / "checkpoints")[0] if resume and config.weights else None
            if resumed and config.decoder_only:  # the encoder's sizes are those that its weights tell
                start = replace(config, preset="", weights=str(resumed.path))
            elif resumed:
                start = replace(config, weights="")
            model = build_model(start)
        dataset = build_dataset(config, model) if dataset is None else dataset
        return _Trainer(config, model, dataset, device, ranks).run(resume, loggers, stop)


_RUN_FILES = ("config.yaml", "metrics.jsonl")


class _Trainer:
    def __init__(
        self, config: TrainConfig, model: StellarModel, dataset: Dataset, device: torch.device, ranks: Ranks
    ) -> None:
        if config.max_seconds and ranks.world > 1:
            raise ValueError(f"max_seconds {config.max_seconds:g} needs a single process, but there are {ranks.world}")
        self.config, self.device, self.ranks = config, device, ranks
        self.out = Path(config.out)
        self.checkpoints = self.out / "checkpoints"
        self.model = model.to(device).train()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        groups = parameter_groups(model, config.weight_decay)
        self.optimizer = SkippingAdamW(groups, config.lr, (config.beta1, config.beta2))
        self.generator = torch.Generator(device).manual_seed(config.seed + ranks.rank)
        torch.manual_seed(config.seed + ranks.rank)
        self.precision = config.precision
        if self.precision == "auto":
            self.precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"

        self.dataset, num_images = dataset, len(dataset)  # type: ignore[arg-type]
        self.num_images = num_images
        self.sampler = EpochSampler(num_images, config.batch_size, config.seed, ranks.rank, ranks.world)
        self.epoch_batches = len(self.sampler)
        if not self.epoch_batches:
            raise ValueError(
                f"{num_images} images do not fill one batch: batch_size is {config.batch_size}"
                + (f" on each of {ranks.world} processes" if ranks.world > 1 else "")
            )
        passes = config.epochs * self.epoch_batches / config.accumulate
        self.total_steps = config.steps or max(1, math.ceil(passes))
        self.step = self.batches_seen = self.skipped = self.skipped_in_a_row = 0
        self.history: list[Record] = []

        self.forward: Any = torch.compile(model) if config.compile else model
        if ranks.world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward, broadcast_buffers=False)

    def run(self, resume: bool, loggers: Sequence[Logger], stop: Stop) -> TrainResult:
        config, checkpoints = self.config, self.checkpoints
        checkpoint, refused = newest_checkpoint(checkpoints)
        for reason in refused:
            warnings.warn(f"checkpoint refused: {reason}", stacklevel=3)
        if resume and checkpoint:
            self._load(checkpoint)
        elif resume and refused:
            raise ValueError(f"no good checkpoint in {checkpoints}: {refused[0]}")
        elif resume:
            warnings.warn(f"no checkpoint in {checkpoints}: the run starts from the beginning", stacklevel=3)
        elif checkpoint or refused or any((self.out / name).exists() for name in _RUN_FILES):
            raise ValueError(f"{self.out} already holds a run: continue it with --resume or name another --out")
        self.ranks.barrier()  # nobody writes before all have looked

        self.loggers: list[Logger] = []
        if self.ranks.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(self.out)
            config.save(self.out / "config.yaml")
            self.loggers = [JsonLines(self.out / "metrics.jsonl", config.log_every, self.step), *loggers]
            if config.tensorboard:
                self.loggers.append(TensorBoard(self.out / "tensorboard", config.log_every, self.step))
        self.started = time.perf_counter()
        self.clock = deque([(self.started, self.step)], maxlen=32)
        first_step, stopping = self.step, False
        pending: _Reading | None = None
        batches = self._batches()
        try:
            while self.step < self.total_steps and self._progress() < 1 and not stopping:
                reading = self._train_step(batches)
                if pending:  # the step before: its numbers have arrived, and this one keeps the device busy meanwhile
                    self._report(pending)
                pending = reading
                stopping = self.ranks.any(stop.requested)
                if stopping or (config.save_every and self.step % config.save_every == 0):
                    self._report(pending)
                    pending = None
                    self._save()
            if pending:
                self._report(pending)
                self._save()
        except NonFiniteLossError as error:
            self._save()  # the skipped steps left the weights as they were
            raise NonFiniteLossError(f"{error}; checkpoint {self.path}") from None
        finally:
            batches.close()  # ends the worker processes
            for logger in self.loggers:
                logger.close()
            if self.ranks.is_main:
                lock.close()
        seconds = time.perf_counter() - self.started
        images = (self.step - first_step) * self._images_per_step()
        return TrainResult(
            model=self.model,
            step=self.step,
            seconds=seconds,
            images_per_second=images / max(seconds, 1e-9),
            skipped_steps=self.skipped,
            history=self.history,
            checkpoint=self.path,
            resume_command=self._resume_command() if stopping and self.step < self.total_steps else None,
        )

    def _batches(self) -> Generator[dict[str, Tensor], None, None]:
        workers = self.config.workers
        if workers < 0:
            workers = min(8, len(os.sched_getaffinity(0)) - 1)
        epoch, batch = divmod(self.batches_seen, self.epoch_batches)
        self.sampler.load_state_dict({"epoch": epoch, "batch": batch})
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # the loader draws from it, and not from the run's global state
        )
        try:
            while True:
                for views in loader:
                    self.batches_seen += 1
                    yield {name: tensor.to(self.device, non_blocking=True) for name, tensor in views.items()}
        except TooManyUnreadable as error:  # from a worker it comes wrapped in the worker's traceback
            raise TooManyUnreadable(str(error).strip().rpartition("TooManyUnreadable: ")[2]) from None
        finally:  # the workers ignore SIGTERM, by which the interpreter's exit would end them: without this it hangs
            iterator: Any = getattr(loader, "_iterator", None)
            if iterator is not None:
                iterator._shutdown_workers()

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> _Reading:
        """One optimizer step. The host waits for nothing here; what the step gave is read from the result later."""
        config = self.config
        lr = learning_rate(self._progress(0.5), config.lr, config.warmup, config.final_lr)
        self.optimizer.set_lr(lr)
        self.model.update_teacher()
        generator = None if config.compile else self.generator  # a compiled model draws from the global state
        sums: dict[str, Tensor] = {}
        for i in range(config.accumulate):
            batch = next(batches)
            if i:  # the passes of one step share one teacher: an update by nothing
                self.model.update_teacher(momentum=1.0)
            last = i == config.accumulate - 1
            with nullcontext() if last or self.ranks.world == 1 else self.forward.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    predictions = self.forward(batch, generator=generator)["predictions"]
                    total, parts = self.model.loss(predictions)
                (total / config.accumulate).backward()
            for name, value in {"loss": total, **parts}.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / config.accumulate
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip)
        losses = {"grad_norm": norm, **sums}
        found = losses | predictions["metrics"]
        values = self.ranks.mean(torch.cat([v.detach().float().flatten() for v in found.values()]))
        skip = 1 - torch.isfinite(values[: len(losses)]).all().float()
        self.optimizer.step_unless(skip)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        sizes = {name: v.numel() if v.dim() else 0 for name, v in found.items()}
        return _Reading(self.step, self.batches_seen / self.epoch_batches, lr, list(losses), sizes, values)

    def _report(self, reading: _Reading) -> None:
        values = reading.values()
        now = time.perf_counter()
        (then, step), images = self.clock[0], self._images_per_step()
        self.clock.append((now, reading.step))
        record: Record = {
            "step": reading.step,
            "epoch": round(reading.epoch, 4),
            "progress": min(1.0, self._progress(reading.step - self.step)),
            "seconds": round(now - self.started, 3),
            "images_per_second": round(images * (reading.step - step) / (now - then), 3),
            "lr": reading.lr,
            **values,
        }
        broken = [name for name in reading.losses if not math.isfinite(values[name])]
        # One bad term spoils the sum and the gradient: name these two only where no term explains them.
        broken = [name for name in broken if name not in ("loss", "grad_norm")] or broken
        if broken:
            record["skipped"] = broken
            self.skipped += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if broken else 0
        if reading.step % self.config.log_every == 0:
            self.history.append(record)
        for logger in self.loggers:
            logger.log(record)
        if self.skipped_in_a_row >= self.config.max_nonfinite:
            count, terms = self.skipped_in_a_row, ", ".join(broken)
            raise NonFiniteLossError(f"{count} steps in a row were not finite, up to step {reading.step}: {terms}")

    def _progress(self, steps_ahead: float = 0) -> float:
        """Share of the run that is over `steps_ahead` steps from now: steps, or the clock where that is further."""
        progress = (self.step + steps_ahead) / self.total_steps
        if self.config.max_seconds:
            progress = max(progress, (time.perf_counter() - self.started) / self.config.max_seconds)
        return progress

    def _images_per_step(self) -> int:
        return self.config.batch_size * self.config.accumulate * self.ranks.world

    # --- checkpoints

    def _resume_command(self) -> str:
        program = ["stellar-fast"]
        if self.ranks.world > 1:
            program = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "stellar_fast.cli"]
        command = "train-decoder" if self.config.decoder_only else "train"
        return shlex.join([*program, command, "--config", os.path.abspath(self.out / "config.yaml"), "--resume"])

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a resumed run to be the same run, as JSON would give it back."""
        paths = [str(path) for path in getattr(getattr(self.dataset, "folder", None), "paths", [])]
        shared = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
        names = "\n".join(os.path.relpath(path, shared) for path in paths)
        run = self.config.exact_values() | {
            "precision": self.precision,
            "device": self.device.type,
            "processes": self.ranks.world,
            "total_steps": self.total_steps,
            "images": self.num_images,
            "image_names": hashlib.sha256(names.encode()).hexdigest()[:16],
        }
        return json.loads(json.dumps(run))

    def _save(self) -> None:
        rng = self.ranks.gather(get_random_state(self.generator))
        if self.ranks.is_main:
            counters = ("step", "batches_seen", "skipped", "skipped_in_a_row")
            state = {
                "optimizer": self.optimizer.state_dict(),
                "counters": {name: getattr(self, name) for name in counters},
                "rng": rng,
            }
            run = {"identity": self._identity(), "config": asdict(self.config)}
            save_checkpoint(self.checkpoints, self.step, self.model, state, run, self.config.keep)
        self.path = checkpoint_path(self.checkpoints, self.step)
        self.ranks.barrier()

    def _load(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.meta["run"]["identity"]
        for name, value in self._identity().items():
            if saved.get(name) != value:
                raise ValueError(
                    f"{checkpoint.path} was made with {name} {saved.get(name)!r}, this run has {value!r}: "
                    f"give the same, or start a new run with --weights {checkpoint.path}"
                )
        state = checkpoint.state()
        self.model.load_upstream_state_dict(checkpoint.weights())
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        set_random_state(self.generator, state["rng"][self.ranks.rank])
        self.path = checkpoint.path


class _Reading:
    """The numbers of one step on their way from the device; `sizes` of those that are lists, 0 for a number alone."""

    def __init__(
        self, step: int, epoch: float, lr: float, losses: list[str], sizes: dict[str, int], values: Tensor
    ) -> None:
        self.step, self.epoch, self.lr, self.losses = step, epoch, lr, losses
        self._sizes = sizes
        self._values = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived:
            self._arrived.record()

    def values(self) -> dict[str, Any]:
        if self._arrived:
            self._arrived.synchronize()
        values = iter(self._values.tolist())
        return {name: [next(values) for _ in range(n)] if n else next(values) for name, n in self._sizes.items()}
