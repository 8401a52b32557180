"""The training loop."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from stellar_fast import native
from stellar_fast.checkpoint import Checkpoint, checkpoint_path, read_checkpoint
from stellar_fast.data import EpochSampler
from stellar_fast.data.loader import EndlessBatches
from stellar_fast.files import command_line, shown
from stellar_fast.models import StellarModel
from stellar_fast.train.build import build_dataset, build_model
from stellar_fast.train.checkpoint import save_checkpoint
from stellar_fast.train.config import TrainConfig, resolve_device
from stellar_fast.train.distributed import Ranks, process_group
from stellar_fast.train.errors import NonFiniteLossError, RunEndedError, sentence
from stellar_fast.train.loggers import Logger, Record
from stellar_fast.train.optim import SkippingAdamW, learning_rate, parameter_groups
from stellar_fast.train.random_state import get_random_state, set_random_state
from stellar_fast.train.run_folder import CONFIG, RunFolder
from stellar_fast.train.signals import Stop, leave_signals_to_the_parent, stop_on_signals

OF_A_MACHINE = ("data", "out", "device", "workers", "raise_allocator")  # options that may differ between processes


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
    signal: int | None = None  # the number of that signal


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

    Seeds torch's global random state. INT, TERM, HUP, USR1, USR2 and XCPU end the run after the step at hand, with a
    checkpoint; a second one of INT, TERM, HUP, USR1 or USR2, a second or more later, ends it at once.

    Raises:
        ValueError: a run that cannot start or resume, with both values where two disagree. The folder is as it was.
        RunEndedError: one that had to end early: a full disk, images or data workers that are gone, no memory. What
            was done is in a checkpoint, where it can be written.
        NonFiniteLossError: one of these, after `config.max_nonfinite` skipped steps in a row.
    """
    if config.raise_allocator:
        native.raise_allocator_thresholds()
    with process_group(config.device) as ranks, RunFolder(config) as folder:
        device = ranks.together(lambda: _device(config, ranks))
        checkpoint = _find(folder, resume, ranks)

        def build() -> _Trainer:
            torch.manual_seed(config.seed)
            whole = build_model(_start(config, checkpoint)) if model is None else model
            views = build_dataset(config, whole) if dataset is None else dataset
            return _Trainer(config, whole, views, device, ranks)

        return ranks.together(build).run(folder, checkpoint, loggers, resume)


def _device(config: TrainConfig, ranks: Ranks) -> torch.device:
    device = resolve_device(config.device)
    if device.type == "cuda" and ranks.world > 1:
        device = torch.device("cuda", ranks.local)
        torch.cuda.set_device(device)
    return device


def _find(folder: RunFolder, resume: bool, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint to resume from. The first process holds the folder and looks; the others take its word."""
    found = ranks.together(lambda: folder.claim(resume) if ranks.is_main else None)
    step = ranks.gather(found.step if found else None)[0]
    if step is None:
        return None
    return ranks.together(lambda: found or read_checkpoint(checkpoint_path(folder.checkpoints, step)))


def _start(config: TrainConfig, checkpoint: Checkpoint | None) -> TrainConfig:
    """What the model is built from: weights that a resumed run started from may be gone."""
    if not checkpoint or not config.weights:
        return config
    if config.decoder_only:  # the encoder's sizes are those that its weights tell
        return replace(config, preset="", weights=str(checkpoint.path))
    return replace(config, weights="")


_FAILED = 1 << 16  # in the place of a signal's number


class _Trainer:
    def __init__(
        self, config: TrainConfig, model: StellarModel, dataset: Dataset, device: torch.device, ranks: Ranks
    ) -> None:
        if config.max_seconds and ranks.world > 1:
            raise ValueError(f"max_seconds {config.max_seconds:g} needs a single process, but there are {ranks.world}")
        self.config, self.device, self.ranks = config, device, ranks
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
        self.teacher_ahead = False  # the teacher was updated for a step that has not come about
        self.consistent = True  # weights, moments and teacher are those between two steps
        self.history: list[Record] = []
        self.pending: deque[_Reading] = deque()  # steps whose numbers are on their way
        self.path: Path | None = None  # of the newest checkpoint
        self.saved_step: int | None = None
        self.save_error: Exception | None = None
        self.forward: Any = torch.compile(model) if config.compile else model

    def run(
        self, folder: RunFolder, checkpoint: Checkpoint | None, loggers: Sequence[Logger], resume: bool
    ) -> TrainResult:
        ranks = self.ranks
        self.checkpoints = folder.checkpoints
        self.identity = ranks.together(self._identity)
        shared = {f.name: getattr(self.config, f.name) for f in fields(TrainConfig) if f.name not in OF_A_MACHINE}
        hashes = checkpoint and checkpoint.meta["sha256"]
        ranks.same(shared | self.identity | {"resume": resume, "checkpoint": hashes})
        if checkpoint:
            ranks.together(lambda: self._load(checkpoint))
        if ranks.world > 1:
            # one of its two names, by the release of torch: buffers are constant, and forward need not send them
            names = signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
            options: dict[str, Any] = {name: False}
            self.forward = DistributedDataParallel(self.forward, **options)
        with stop_on_signals() as stop:
            self.loggers = ranks.together(lambda: folder.begin(self.step, loggers) if ranks.is_main else [])
            return self._train(stop)

    def _train(self, stop: Stop) -> TrainResult:
        self.started = time.perf_counter()
        self.clock = deque([(self.started, self.step)], maxlen=32)
        self.random_state = get_random_state(self.generator)
        first_step, number = self.step, 0
        failure: Exception | None = None
        batches = self._batches()
        try:
            while not self._over():
                views, failure = self._prepare(batches, stop)
                number, failure = self._go_on(stop, failure)
                if number or failure or (self._save_is_due() and (failure := self._try_to_save())):
                    break
                try:
                    reading = self._train_step(iter(views))
                except Exception as error:
                    if self.ranks.world > 1:  # the others are in the middle of the step, and cannot join in a save
                        raise
                    failure = error
                    break
                self.pending.append(reading)
                self.random_state = get_random_state(self.generator)
            failure = self._finish(failure, number)
        except BaseException:
            batches.close(0)
            raise
        finally:
            batches.close()
            closing = self._close_loggers()
        failure = failure or closing
        seconds = time.perf_counter() - self.started
        if failure:
            self._end(failure, self.step > first_step)
        images = (self.step - first_step) * self._images_per_step()
        stopped = bool(number) and not self._over()
        assert self.path is not None
        return TrainResult(
            model=self.model,
            step=self.step,
            seconds=seconds,
            images_per_second=images / max(seconds, 1e-9),
            skipped_steps=self.skipped,
            history=self.history,
            checkpoint=self.path,
            resume_command=self._resume_command() if stopped else None,
            signal=number if stopped else None,
        )

    def _over(self) -> bool:
        return self.step >= self.total_steps or self._progress() >= 1

    def _prepare(self, batches: EndlessBatches, stop: Stop) -> tuple[list[dict[str, Tensor]], Exception | None]:
        """Report the last step but one and take the views of the next: what may fail on one process alone."""
        try:
            self._report_pending(0 if stop.requested or self._save_is_due() else 1)
            batches.start()
            return stop.wait_for(lambda: list(islice(batches, self.config.accumulate))) or [], None
        except Exception as error:
            return [], error

    def _go_on(self, stop: Stop, failure: Exception | None) -> tuple[int, Exception | None]:
        """What ends the run on all processes, if anything does: a signal's number, or the error of one of them."""
        number = self.ranks.max(_FAILED if failure else stop.signal or 0)
        return (number, None) if number != _FAILED else (0, self.ranks.share(failure))

    def _finish(self, failure: Exception | None, number: int) -> Exception | None:
        """Report and save the steps done, whatever ended the run. The first error is the one to tell."""
        try:
            self._report_pending(0)
        except Exception as error:
            failure = failure or error
        if (self.step or number) and self.saved_step != self.step and self.consistent and not self.save_error:
            unsaved = self._try_to_save()  # whatever failed before
            failure = failure or unsaved
        return failure

    def _end(self, failure: Exception, worked: bool) -> NoReturn:
        reason = sentence(failure)
        if isinstance(failure, ValueError) and not worked:
            raise failure  # input that no step can be made of: the run has not begun
        parts = [f"checkpoint {shown(self.path)}" if self.path else "no checkpoint"]
        if self.save_error and self.save_error is not failure:
            parts.insert(0, sentence(self.save_error) or repr(self.save_error))
        if reason is None:
            warnings.warn("; ".join(parts), stacklevel=2)
            raise failure
        kind = type(failure) if isinstance(failure, RunEndedError) else RunEndedError
        raise kind("; ".join([reason, *parts]), self.path) from failure

    def _close_loggers(self) -> Exception | None:
        first = None
        for logger in self.loggers:
            try:
                logger.close()
            except Exception as error:
                first = first or error
        return first

    def _batches(self) -> EndlessBatches:
        """Views in the memory of the host."""
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
        return EndlessBatches(loader)

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> _Reading:
        """One optimizer step. The host waits for nothing here; what the step gave is read from the result later."""
        config = self.config
        lr = learning_rate(self._progress(0.5), config.lr, config.warmup, config.final_lr)
        self.optimizer.set_lr(lr)
        self.consistent = False
        self.model.update_teacher(momentum=1.0 if self.teacher_ahead else None)
        self.teacher_ahead = self.consistent = True
        generator = None if config.compile else self.generator  # a compiled model draws from the global state
        sums: dict[str, Tensor] = {}
        for i in range(config.accumulate):
            batch = {name: views.to(self.device, non_blocking=True) for name, views in next(batches).items()}
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
        self.consistent = False
        self.optimizer.step_unless(skip)
        self.step += 1
        self.batches_seen += config.accumulate
        self.teacher_ahead, self.consistent = False, True
        self.optimizer.zero_grad(set_to_none=True)
        sizes = {name: v.numel() if v.dim() else 0 for name, v in found.items()}
        return _Reading(self.step, self.batches_seen / self.epoch_batches, lr, list(losses), sizes, values)

    def _report_pending(self, leave: int) -> None:
        """Report the steps done but for the newest `leave`, whose numbers the device may still work on."""
        while len(self.pending) > leave:
            self._report(self.pending.popleft())

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
        path = os.path.abspath(Path(self.config.out, CONFIG))
        return command_line([*program, command, "--config", path, "--resume"])

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a resumed run to be the same run, as JSON would give it back."""
        run = self.config.exact_values() | {
            "precision": self.precision,
            "device": self.device.type,
            "processes": self.ranks.world,
            "total_steps": self.total_steps,
            "images": self.num_images,
            "image_names": _fingerprint(getattr(self.dataset, "folder", None)),
        }
        return json.loads(json.dumps(run))

    def _save_is_due(self) -> bool:
        every = self.config.save_every
        return bool(every and self.step) and self.step % every == 0 and self.saved_step != self.step

    def _try_to_save(self) -> Exception | None:
        try:
            self._save()
        except Exception as error:
            self.save_error = error
        return self.save_error

    def _save(self) -> None:
        counters = ("step", "batches_seen", "skipped", "skipped_in_a_row", "teacher_ahead")
        random_states = self.ranks.gather(self.random_state)

        def write() -> None:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "counters": {name: getattr(self, name) for name in counters},
                "rng": random_states,
            }
            run = {"identity": self.identity, "config": asdict(self.config)}
            save_checkpoint(self.checkpoints, self.step, self.model, state, run, self.config.keep)

        self.ranks.together(write if self.ranks.is_main else lambda: None)
        self.path, self.saved_step = checkpoint_path(self.checkpoints, self.step), self.step

    def _load(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.meta["run"]["identity"]
        for name, value in self.identity.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"{shown(checkpoint.path)} was made with {name} {saved.get(name)!r}, this run has {value!r}: "
                    f"give the same, or start a new run with --weights {shown(checkpoint.path)}"
                )
        state = checkpoint.state()
        self.model.load_upstream_state_dict(checkpoint.weights())
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        set_random_state(self.generator, state["rng"][self.ranks.rank])
        self.path, self.saved_step = checkpoint.path, self.step


def _fingerprint(folder: Any) -> str:
    """Of the names of a folder's files, wherever the folder lies."""
    found = getattr(folder, "fingerprint", None)
    if found is not None:
        return found
    paths = [str(path) for path in getattr(folder, "paths", [])]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    names = "\n".join(os.path.relpath(path, shared) for path in paths)
    return hashlib.sha256(os.fsencode(names)).hexdigest()[:16]


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
