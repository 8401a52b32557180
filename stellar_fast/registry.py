"""What there is to know about an operator beside its code: `kernels/<op>/spec.py` holds one OpSpec, named SPEC.

Tests, benchmarks, the ahead-of-time inspection and the tuner read it; the operator itself does not.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stellar_fast.backend import OPS

Shape = Mapping[str, int]


@dataclass(frozen=True)
class OpSpec:
    """An operator's inputs, costs and oracle.

    Attributes:
        name: of the operator, as everywhere.
        shapes: named shapes, letters to sizes; "small" is for tests, the others are those of real models.
        make_inputs: (shape, dtype, device, generator) -> keyword arguments of the operator, drawn at random.
        reference: the plain formula with the operator's arguments; differentiable where the operator is.
        gradients: names of the arguments that have a gradient.
        flops: of the forward at a shape.
        bytes: that the forward must move at least: (shape, bytes an element) -> every input read, every output written.
        backward: FLOPs and bytes of the backward, as a multiple of the forward's.
        odd_shapes: further shapes for tests: sizes of one, primes, what no tile divides, an empty batch.
        dtypes: of the inputs, that tests and benchmarks go through.
        eager: the formula as it is written without this package, computing in the dtype of its inputs: what "no worse
            than eager" means in 16 bits, where `reference` widens to fp32. None takes `reference`.
        public: name of the function in `stellar_fast.ops`, where it is not `name`.
        integer_tolerance: how far an integer output may be from the reference's.
        devices: types of device that its tensors may be on.
    """

    name: str
    shapes: Mapping[str, Shape]
    make_inputs: Callable[[Shape, torch.dtype, torch.device, torch.Generator], dict[str, Any]]
    reference: Callable[..., Any]
    gradients: Sequence[str] = ()
    flops: Callable[[Shape], float] = lambda shape: 0.0
    bytes: Callable[[Shape, int], float] = lambda shape, itemsize: 0.0
    backward: float = 2.0
    odd_shapes: Sequence[Shape] = field(default_factory=tuple)
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    eager: Callable[..., Any] | None = None
    public: str = ""
    integer_tolerance: int = 0
    devices: Sequence[str] = ("cpu", "cuda")

    @property
    def backends(self) -> tuple[str, ...]:
        return OPS[self.name]

    @property
    def function(self) -> Callable[..., Any]:
        """The public operator."""
        return getattr(importlib.import_module("stellar_fast.ops"), self.public or self.name)


def draw(generator: torch.Generator, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A normal tensor, the same on every device: drawn on the CPU in fp64, then converted."""
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)


def by_argument(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A formula whose parameters end in shape letters (`query_BPD`), called by the operator's names (`query`)."""
    letters = {re.sub("_[A-Z0-9]+$", "", name): name for name in inspect.signature(formula).parameters}
    return lambda **arguments: formula(**{letters.get(name, name): value for name, value in arguments.items()})


def load(op: str) -> OpSpec:
    """The spec of an operator. Raises ValueError for an unknown name."""
    if op not in OPS:
        raise ValueError(f"unknown operator {op!r}; operators: {', '.join(OPS)}")
    return importlib.import_module(f"stellar_fast.kernels.{op}.spec").SPEC
