"""Fixtures shared by all tests: the golden tensors, and models small enough for any machine."""

import functools
import getpass
import inspect
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# before torch starts its threads: tests are many small products, which more threads only slow down
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # of the terminal that started the tests: consoles would keep it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # some tests take more, which would spin where cores are shared
os.environ["STELLAR_FAST_TUNE"] = "off"  # what was tuned on this machine is no part of the tests
if _capability := os.environ.get(
    "ATEN_CPU_CAPABILITY"
):  # inductor takes vectors of this width from its cache as it finds them
    _folder = f"torchinductor_{getpass.getuser()}_{_capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / _folder))

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from stellar_fast import DecoderConfig, EncoderConfig, StellarModel, VQGANConfig
from stellar_fast.backend import interpreting

GOLDEN = Path(__file__).parent / "golden"
CASES = ("mse", "momentum", "no_cls_scaled_sk", "no_temperature", "vq", "vq_patch14")
SMALL_ENCODER = EncoderConfig(48, 2, 3, 96, image_size=32, patch_size=8)
SMALL_DECODER = DecoderConfig(32, 1, 2, 64, image_size=32, patch_size=8)
SMALL_KWARGS: dict[str, Any] = {
    "num_sparse_tokens": 4,
    "num_clusters": 64,
    "prototype_dim": 16,
    "predictor_hidden_dim": 64,
    "num_masks": 2,
    "num_local_crops": 2,
    "masking_ratio": 0.5,
}


DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run in this process, as deselected and so in the count.

    That is `cuda` without a GPU, `onednn_bf16` on a processor without AVX-512, and `interpreter` unless
    TRITON_INTERPRET=1: test_interpreter.py starts those.
    """
    for item in items:
        given = getattr(item, "callspec", None)
        if given and given.params.get("backend") == "onednn" and given.params.get("dtype") == torch.bfloat16:
            item.add_marker("onednn_bf16")
    here = {
        "cuda": torch.cuda.is_available(),
        "onednn_bf16": torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "interpreter": interpreting(),
    }
    absent = [mark for mark, is_here in here.items() if not is_here]
    left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in absent)]
    config.hook.pytest_deselected(items=left_out)
    dropped = set(left_out)
    kept = [item for item in items if item not in dropped]
    items[:] = sorted(kept, key=lambda item: item.path.name != "test_interpreter.py")  # the longest of all begins


def remember_builtins() -> None:
    """Triton's interpreter looks for builtins among all names of its language at every call of a device function.

    That is a third of these tests' time. The names are the same each time.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins(namespace: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(namespace) if is_builtin(member)]

    def patch_builtins(namespace: Any, *rest: Any) -> None:
        for name in builtins(namespace):
            if is_builtin(member := getattr(namespace, name)):
                interpreter._patch_attr(namespace, name, member, *rest)

    interpreter._patch_builtin = patch_builtins


if interpreting():
    remember_builtins()


MOST_WORKERS = 8  # each takes up to a GiB


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes of `pytest -n auto`: one a core that this one may use, and this one alone where a GPU is shared."""
    if torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """As a terminal starts a process, whatever started this one (nohup ignores HUP)."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@dataclass(frozen=True)
class GoldenCase:
    """One file of golden tensors: sizes, and tensors by the first part of their name."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix + "."): t for name, t in self.tensors.items() if name.startswith(prefix + ".")}

    def model(self, **changed: Any) -> StellarModel:
        """With the golden weights; what `changed` arguments bring beside them is drawn."""
        kwargs = dict(self.meta["kwargs"], color_augmentation=False) | changed
        if self.meta["vqgan"] is not None:
            kwargs["vq_model"] = VQGANConfig(**self.meta["vqgan"])
        model = StellarModel(
            encoder=EncoderConfig(**self.meta["encoder"]),
            decoder=DecoderConfig(**self.meta["decoder"]),
            predictor_hidden_dim=self.meta["predictor_hidden_dim"],
            **kwargs,
        )
        model.load_upstream_state_dict(self.part("weights"), strict=not changed)
        return model


@functools.cache
def read_golden(name: str) -> GoldenCase:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        return GoldenCase(json.loads(metadata["meta"]), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


@pytest.fixture(scope="session")
def golden_ops() -> dict[str, Tensor]:
    return read_golden("ops").tensors


@pytest.fixture
def small_model() -> StellarModel:
    torch.manual_seed(0)
    return StellarModel(SMALL_ENCODER, SMALL_DECODER, color_augmentation=False, **SMALL_KWARGS)


@pytest.fixture
def small_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "global_views": torch.rand(2, 2, 3, 32, 32, generator=generator),
        "local_views": torch.rand(2, 2, 3, 16, 16, generator=generator),
    }


def mismatches(
    actual: dict[str, Tensor], expected: dict[str, Tensor], absolute: float = 1e-5, relative: float = 1e-4
) -> list[str]:
    """Names, with the largest error, of tensors that are missing, misshapen, or further off than the tolerance."""
    wrong = []
    for name, want in expected.items():
        have = actual.get(name)
        if have is None or have.shape != want.shape:
            wrong.append(f"{name}: {None if have is None else tuple(have.shape)} is not {tuple(want.shape)}")
        elif torch.equal(have, want):
            continue
        elif not want.is_floating_point():
            wrong.append(f"{name}: {(have != want).sum().item()} values differ")
        else:
            error = (have.double() - want.double()).abs()
            if not bool((error <= absolute + relative * want.double().abs()).all()):
                wrong.append(f"{name}: off by {error.max().item():.3g}")
    return wrong
