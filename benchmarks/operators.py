"""One operator at a time: this package's backends against `plain` and libraries (benchmarks/ops/), verified in fp64."""

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.measure import Call
from benchmarks.model.pair import FP32_TOLERANCE, REDUCED_FACTOR, Case, Check, relative_errors
from stellar_fast import backend
from stellar_fast.registry import OpSpec, load

# Inputs are rotated through copies that together are larger than the caches, so that each call reads from memory.
ROTATED_BYTES = 128 * 2**20
# Integers may differ from fp64's in this share of the values: near ties.
INTEGER_TOLERANCE = 1e-3

Provider = Callable[..., Any]
Arguments = dict[str, Any]


def fast_backends(op: str, device: str) -> list[str]:
    """Backends of `op` that run here and are not the reference."""
    return [name for name in backend.OPS[op] if name != "reference" and not backend.refusal(name, device)]


def functions(op: str) -> list[str]:
    """What is timed of an operator's room: the operator, and the FUNCTIONS of its module in benchmarks/ops/."""
    return [op, *_further(op)]


def build_cases(
    op: str,
    shape_name: str,
    dtype: torch.dtype,
    device: torch.device,
    say: Callable[[str], object],
    function: str = "",
    groups: Sequence[str] = ("stellar_fast", "libraries"),
) -> list[Case]:
    """Verify the providers of an operator, and return what to time: forward, and with backward where it has one.

    `function` is one of `functions(op)`, by default the operator. Of the providers plain runs in any case; `groups` may
    ask for "stellar_fast", "libraries" and "plain_compiled". One that does not take this shape or dtype, or whose own
    kernel would not run, is left out, with a word by `say`.
    """
    formula, module = load(op), _module(op)
    spec, as_formula = _further(op).get(function, (formula, None))
    shape = spec.shapes[shape_name]
    inputs = spec.make_inputs(shape, dtype, device, torch.Generator().manual_seed(0))
    inputs |= getattr(module, "ARGUMENTS", {})
    gradients = [name for name in spec.gradients if isinstance(inputs.get(name), Tensor)]
    plain: Provider = module.PROVIDERS["plain"]
    providers: dict[str, Provider] = {"plain": plain}
    if "plain_compiled" in groups:
        providers["plain_compiled"] = _compiled(plain)
    if "libraries" in groups:
        providers |= module.PROVIDERS
    if "stellar_fast" in groups:
        backends = fast_backends(op, device.type) or ["reference"]
        providers |= {f"stellar_fast.{name}": _ours(spec, name) for name in backends}

    exact = _tensors(formula.reference, _doubled(inputs), gradients)
    errors: dict[str, dict[str, float]] = {}
    left_out = []
    for name, provider in list(providers.items()):
        verified = _then(provider, as_formula) if as_formula and name.startswith("stellar_fast.") else provider
        try:
            errors[name] = _errors(_tensors(verified, inputs, gradients), exact, formula.integer_tolerance)
        except DoesNotRun as reason:
            left_out.append(f"{name} ({reason})")
            del providers[name]
    if left_out:
        say(f"left out: {', '.join(left_out)}")
    copies = _rotation(inputs, gradients)
    return [
        Case(
            suite="ops",
            op=function or op,
            direction=direction,
            preset=shape_name,
            shape=" ".join(f"{letter}={size}" for letter, size in shape.items()),
            batch=shape.get("B", shape.get("N", 1)),
            flops=spec.flops(shape) * work,
            bytes=int(spec.bytes(shape, dtype.itemsize) * work),
            calls={name: _call(provider, copies, wanted) for name, provider in providers.items()},
            checks={name: _checks(found, errors["plain"], exact, dtype) for name, found in errors.items()},
        )
        for direction, wanted, work in (
            ("forward", [], 1.0),
            ("forward+backward", gradients, 1 + spec.backward),
        )
        if wanted or direction == "forward"
    ]


class DoesNotRun(Exception):
    """Raised by a provider that does not take this device, shape or dtype: it is reported and gets no time."""


def _module(op: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.ops.{op}")


def _further(op: str) -> Mapping[str, tuple[OpSpec, Provider]]:
    return getattr(_module(op), "FUNCTIONS", {})


def _then(provider: Provider, convert: Provider) -> Provider:
    return lambda **arguments: convert(provider(**arguments), **arguments)


def _compiled(plain: Provider) -> Provider:
    compiled = torch.compile(plain, dynamic=False)

    def run(**arguments: Any) -> Any:
        if not any(isinstance(x, Tensor) and x.is_floating_point() for x in arguments.values()):
            raise DoesNotRun("nothing to compile in what torch does not compute")
        return compiled(**arguments)

    return run


def _ours(spec: OpSpec, name: str) -> Provider:
    def run(**arguments: Any) -> Any:
        try:
            with backend.use_backend(**{spec.name: name}), backend.observe() as seen:
                result = spec.function(**arguments)
        except ValueError as error:
            raise DoesNotRun(error) from None
        if name not in ("reference", "torch") and (spec.name, name) not in seen:
            raise DoesNotRun("its own kernel does not take this call")
        return result

    return run


def _doubled(inputs: Arguments) -> Arguments:
    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tree_map(double, inputs)


def _leaves(inputs: Arguments, gradients: list[str]) -> Arguments:
    return inputs | {name: inputs[name].detach().clone().requires_grad_() for name in gradients}


def _outputs(result: Any) -> list[Tensor]:
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)]


def _cotangents(outputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(out.shape, generator=generator).to(dtype or out.dtype).to(out.device, out.dtype)
        for out in outputs
        if out.requires_grad
    ]


def _tensors(provider: Provider, inputs: Arguments, gradients: list[str]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = _leaves(inputs, gradients)
    outputs = _outputs(provider(**leaves))
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    used = [out for out in outputs if out.requires_grad]
    if gradients:
        # in bf16 whatever the outputs' dtype, so that all providers get the same values
        grads = torch.autograd.grad(used, [leaves[name] for name in gradients], _cotangents(used, torch.bfloat16))
        found |= {f"gradient.{name}": grad for name, grad in zip(gradients, grads, strict=True)}
    return found


def _errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], integer_tolerance: int) -> dict[str, float]:
    """Relative error of each tensor; for integers the share that differs."""
    integers = {name for name, want in exact.items() if not want.is_floating_point()}
    errors = relative_errors(*({n: x for n, x in side.items() if n not in integers} for side in (found, exact)))
    for name in integers:
        differ = (found[name].double() - exact[name].double()).abs() > integer_tolerance
        errors[name] = differ.double().mean().item() if differ.numel() else 0.0
    return errors


def _checks(
    errors: Mapping[str, float], plain: Mapping[str, float], exact: Mapping[str, Tensor], dtype: torch.dtype
) -> list[Check]:
    checks = []
    for name, error in errors.items():
        if name in exact and not exact[name].is_floating_point():
            tolerance = INTEGER_TOLERANCE
        elif dtype == torch.float32:
            tolerance = FP32_TOLERANCE["gradient" if name.startswith("gradient.") else "output"]
        else:
            tolerance = REDUCED_FACTOR * plain.get(name, 0.0) + torch.finfo(dtype).eps
        checks.append(Check(name, error / tolerance))
    return checks


def _rotation(inputs: Arguments, gradients: list[str]) -> list[Arguments]:
    size = sum(x.numel() * x.element_size() for x in tree_leaves(inputs) if isinstance(x, Tensor))
    copies = min(16, -(-ROTATED_BYTES // max(size, 1)))

    def clone(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) else x

    return [_leaves(tree_map(clone, inputs), gradients) for _ in range(copies)]


def _call(provider: Provider, copies: list[Arguments], gradients: list[str]) -> Call:
    rotation = itertools.cycle(copies)
    if not gradients:

        def forward() -> None:
            with torch.no_grad():
                provider(**next(rotation))

        return forward
    along: list[Tensor] = []

    def forward_backward() -> None:
        leaves = next(rotation)
        used = [out for out in _outputs(provider(**leaves)) if out.requires_grad]
        if not along:
            along.extend(_cotangents(used))
        torch.autograd.grad(used, [leaves[name] for name in gradients], along)

    return forward_backward
