"""Everything a training run can be told, in one table: YAML keys, flags of `stellar-fast train`, their help."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stellar_fast.files import MARK, shown, write_atomically

if TYPE_CHECKING:
    import torch


def _about(help: str, exact: bool = True, section: str = "Run") -> dict[str, Any]:
    """What is known about an option. `exact` ones change the numbers of a run, so a resumed run must keep them."""
    return {"help": help, "exact": exact, "section": section}


def _option(default: Any, help: str, *, exact: bool = True, section: str = "Run") -> Any:
    return field(default=default, metadata=_about(help, exact, section))


@dataclass
class TrainConfig:
    """One training run. Unknown keys and values of the wrong kind are ValueErrors that name the key."""

    data: str = _option("", "Folder of images, nested folders included.", exact=False)
    out: str = _option("", "Folder of the run: config.yaml, metrics.jsonl, checkpoints/.", exact=False)
    seed: int = _option(0, "Seed of the weights, the order of the images, views, masks and colours.")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N.", exact=False)
    precision: str = _option("auto", "fp32, bf16 (autocast), or auto: bf16 on CUDA, fp32 on a CPU.")
    workers: int = _option(-1, "Processes that prepare images; -1: one per core but one, at most 8.", exact=False)
    compile: bool = _option(False, "Compile the model with torch.compile.")
    raise_allocator: bool = _option(
        True, "Let the CPU allocator keep large blocks (also switched by STELLAR_FAST_RAISE_MALLOC).", exact=False
    )

    max_unreadable: float = _option(0.1, "Share of the images that may be unreadable.", exact=False)
    value_range: tuple[float, float] | None = _option(
        None, "The numbers in the files that are black and white; not given: found for each file (docs/data.md)."
    )
    max_pixels: int = _option(0, "Pixels that an image may have; 0: what Pillow allows.", exact=False)

    decoder_only: bool = _option(
        False,
        "Train a fresh decoder on the frozen encoder of --weights, by the reconstruction alone. --preset then names "
        "the model of weights that hold several, and --decoder changes the published decoder.",
        section="Model",
    )
    preset: str = _option("", "Size of the model: tiny (if not given), s16, b16, l16, h16, b8, b24.", section="Model")
    encoder: dict[str, Any] = field(
        default_factory=dict, metadata=_about("Changes to the preset's EncoderConfig.", section="Model")
    )
    decoder: dict[str, Any] = field(
        default_factory=dict, metadata=_about("Changes to the preset's DecoderConfig.", section="Model")
    )
    model: dict[str, Any] = field(
        default_factory=dict, metadata=_about("Arguments of StellarModel, e.g. masking_ratio=0.8.", section="Model")
    )
    weights: str = _option("", "Start from these weights: folder, run, checkpoint or hub id.", section="Model")

    epochs: float = _option(100.0, "Passes over the data.", section="Optimisation")
    steps: int = _option(0, "Optimizer steps; 0 follows --epochs.", section="Optimisation")
    max_seconds: float = _option(
        0.0,
        "Stop after so many seconds, the learning rate following the clock; 0: no limit. Such a run is not repeatable.",
        section="Optimisation",
    )
    batch_size: int = _option(32, "Images in one pass of one process.", section="Optimisation")
    accumulate: int = _option(1, "Passes per optimizer step.", section="Optimisation")
    lr: float = _option(1.5e-4, "Peak learning rate.", section="Optimisation")
    final_lr: float = _option(0.0, "Learning rate at the end, as a share of the peak.", section="Optimisation")
    warmup: float = _option(0.05, "Share of the run in which the learning rate rises.", section="Optimisation")
    weight_decay: float = _option(0.04, "Weight decay of matrices and kernels.", section="Optimisation")
    beta1: float = _option(0.9, "AdamW's decay of the first moment.", section="Optimisation")
    beta2: float = _option(0.999, "AdamW's decay of the second moment.", section="Optimisation")
    clip: float = _option(3.0, "Largest norm of the gradient.", section="Optimisation")
    max_nonfinite: int = _option(
        10, "Stop after so many steps in a row without a finite loss.", exact=False, section="Optimisation"
    )

    log_every: int = _option(10, "Steps between lines of metrics.jsonl.", exact=False, section="Output")
    save_every: int = _option(1000, "Steps between checkpoints; 0: only at the end.", exact=False, section="Output")
    keep: int = _option(3, "Checkpoints to keep.", exact=False, section="Output")
    tensorboard: bool = _option(False, "Also write TensorBoard events (extra: log).", exact=False, section="Output")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            setattr(self, f.name, _coerce(f.name, getattr(self, f.name), str(f.type)))
        if not self.preset and not self.decoder_only:
            self.preset = "tiny"
        _require(self.precision in ("auto", "fp32", "bf16"), "precision", self.precision, "auto, fp32 or bf16")
        for name in ("batch_size", "accumulate", "log_every", "keep", "max_nonfinite"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("steps", "max_seconds", "save_every", "weight_decay", "final_lr", "max_pixels"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "zero or more")
        for name in ("epochs", "lr", "clip"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above zero")
        _require(0 <= self.max_unreadable <= 1, "max_unreadable", self.max_unreadable, "in [0, 1]")
        _require(abs(self.seed) < 2**63, "seed", self.seed, "a 64-bit number")
        for name in ("warmup", "beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(self.workers >= -1, "workers", self.workers, "-1 or more")

    @classmethod
    def load(
        cls, path: str | Path | None = None, defaults: Mapping[str, Any] | None = None, **overrides: Any
    ) -> TrainConfig:
        """Read a YAML file over `defaults` and let `overrides` win; nested tables merge key by key."""
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"{shown(path)} is not YAML: {error}") from error
            if not isinstance(values, dict):
                raise ValueError(f"{shown(path)} holds a {type(values).__name__}, not a table of `key: value` lines")
        check_keys([*values, *overrides], [f.name for f in dataclasses.fields(cls)], "training option")
        for name, value in overrides.items():
            merge = isinstance(value, Mapping) and isinstance(values.get(name), Mapping)
            values[name] = {**values[name], **value} if merge else value
        return cls(**{**(defaults or {}), **values})

    def save(self, path: str | Path) -> None:
        """Write the resolved configuration; paths become absolute so that the file works from any folder."""
        values = self._absolute() | {"data": os.path.abspath(self.data), "out": os.path.abspath(self.out)}
        write_atomically(path, f"# {MARK}\n{yaml.safe_dump(values, sort_keys=False)}".encode())

    def exact_values(self) -> dict[str, Any]:
        """The options that change the numbers of a run."""
        values = self._absolute()
        return {f.name: values[f.name] for f in dataclasses.fields(self) if f.metadata["exact"]}

    def _absolute(self) -> dict[str, Any]:
        """The options by name; of those that name weights, every path is absolute."""
        values = dataclasses.asdict(self)
        for table, name in ((values, "weights"), (values["model"], "vq_model"), (values["model"], "vit_pretrained")):
            if table.get(name) and os.path.exists(table[name]):  # else a hub id
                table[name] = os.path.abspath(table[name])
        return values


def resolve_device(name: str) -> torch.device:
    """The device called "auto", "cpu", "cuda" or "cuda:N"; ValueError for others and for one that is not there."""
    import torch  # here, so that `stellar-fast --help` does not wait for it

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and int(match.group(1) or 0) >= count:
        raise ValueError(f"device {name} is not there: torch {torch.__version__} sees {count} CUDA devices")
    return torch.device(name)


def check_keys(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ValueError for the first key of `given` that is not in `known`, with the nearest ones that are."""
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5) or sorted(known)
            raise ValueError(f"unknown {what} {key!r}; did you mean {', '.join(near)}?")


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _coerce(name: str, value: Any, kind: str) -> Any:
    """YAML reads `1e-4` as text and `1` as an integer: convert what converts without loss, refuse the rest."""
    if kind == "bool":
        if isinstance(value, bool):
            return value
    elif kind == "str":
        if isinstance(value, (str, Path)):
            return str(value)
        if value is None:
            return ""
    elif kind.startswith("dict"):
        if isinstance(value, Mapping):
            return dict(value)
        if value is None:
            return {}
    elif kind.startswith("tuple"):
        if value is None:
            return None
        if isinstance(value, (list, tuple)) and len(value) == 2:
            return tuple(_coerce(name, number, "float") for number in value)
    elif not isinstance(value, bool):
        try:
            number = float(value)
            if not math.isfinite(number):
                raise ValueError(f"{name} must be finite, got {value!r}")
            if kind == "float":
                return number
            if number.is_integer():
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(f"{name} must be {_KINDS[kind.split('[')[0]]}, got {value!r}")


_KINDS = {
    "bool": "true or false",
    "str": "text",
    "dict": "a table",
    "float": "a number",
    "int": "a whole number",
    "tuple": "two numbers",
}
