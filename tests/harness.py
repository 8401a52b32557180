"""What holds for every operator, checked in one call; tests/ops/test_<op>.py says at which shapes and dtypes.

    @each_backend("lowrank_product")
    @each_dtype("lowrank_product")
    @each_shape("lowrank_product")
    def test_no_worse_than_eager(backend, device, shape, dtype):
        check_op("lowrank_product", backend, shape, dtype, device)

    @each_backend("lowrank_product")
    def test_registration(backend, device):
        check_registered("lowrank_product", backend, device=device)

"No worse than eager": |ours - fp64| <= 1.5 |eager - fp64| + a few roundings, in the largest and in the mean error, for
every output and for the gradient of every argument named in the operator's spec, each output with a random cotangent.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from stellar_fast import backend as backends
from stellar_fast.registry import OpSpec, Shape, load

SLACK = 1.5
# Roundings allowed on top, relative to the size of the tensor: in fp32 sums in another order, in 16 bits the one of the
# result itself or of an operand of a product.
ROUNDINGS = {torch.float64: 64, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}
LAYOUTS = ("contiguous", "transposed", "sliced")
REQUIRES_GRAD = " requires grad"
INLINE = ("reference", "torch")  # computed by torch itself: nothing of ours reports that it ran

Named = dict[str, Tensor]


def backends_here(op: str, device: str = "cpu") -> list[str]:
    """The backends of `op` that work on `device` now; on "cpu" Triton is among them under TRITON_INTERPRET=1."""
    return [name for name in backends.OPS[op] if not backends.refusal(name, device)]


def each_backend(op: str, *names: str) -> Callable[[Any], Any]:
    """Parametrise a test by (backend, device): all of the operator's backends, or those named.

    On the CPU Triton's are marked `interpreter`, on a GPU all are marked `cuda`. Backends of optional packages are left
    out where the package is.
    """
    optional = ("flash_attn", "xformers")
    cases = []
    for name in names or backends.OPS[op]:
        devices = set(backends.DEVICES.get(name, ("cpu", "cuda"))) & set(load(op).devices)
        if name == "triton":
            cases.append(pytest.param(name, "cpu", marks=pytest.mark.interpreter, id="triton-interpreter"))
        elif "cpu" in devices:
            cases.append(pytest.param(name, "cpu", id=name))
        if "cuda" in devices and not (name in optional and backends.why_not(name)):
            cases.append(pytest.param(name, "cuda", marks=pytest.mark.cuda, id=f"{name}-cuda"))
    return pytest.mark.parametrize(("backend", "device"), cases)


def each_shape(op: str, *shapes: Shape) -> Callable[[Any], Any]:
    """Parametrise a test by shape: the spec's "small" and odd ones, and those given."""
    spec = load(op)
    cases = [spec.shapes["small"], *spec.odd_shapes, *shapes]
    return pytest.mark.parametrize("shape", [pytest.param(case, id=_describe(case)) for case in cases])


def each_dtype(op: str) -> Callable[[Any], Any]:
    """Parametrise a test by the dtypes of the spec."""
    return pytest.mark.parametrize(
        "dtype", [pytest.param(d, id=str(d).removeprefix("torch.")) for d in load(op).dtypes]
    )


def check_op(
    op: str | OpSpec,
    backend: str,
    shape: str | Shape = "small",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    layouts: Sequence[str] = LAYOUTS,
    slack: float = SLACK,
    seed: int = 0,
    **changed: Any,
) -> None:
    """Outputs and gradients no worse than eager's, on contiguous inputs and on views, in memory that was NaN before.

    Args:
        op: name or spec.
        backend: that has to run, and no other.
        shape: of the spec by name, or letters to sizes.
        dtype: of the inputs.
        device: of the inputs.
        layouts: "contiguous"; "transposed": the last dimension is not the innermost; "sliced": rows of a wider tensor,
            one element off.
        slack: factor on eager's error.
        seed: of the inputs.
        changed: arguments that differ from the spec's, such as ``temperature=None``.
    """
    case = _Case(op, shape, dtype, device, seed, changed)
    exact, eager = case.exact(), case.eager()
    wrong = []
    for layout in layouts:
        inputs = tree_map(lambda x, layout=layout: _lay_out(x, layout), case.inputs)
        with poisoned_memory():
            ours = case.ours(backend, inputs, layout=layout)
        wrong += [f"{layout}: {text}" for text in _worse(ours, eager, exact, case, slack)]
        wrong += [f"{layout}: changed its input {name}" for name in case.changed_inputs(inputs)]
    assert not wrong, case.describe(backend) + "\n  " + "\n  ".join(wrong)


def check_registered(
    op: str | OpSpec,
    backend: str,
    shape: str | Shape = "small",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    slack: float = SLACK,
    **changed: Any,
) -> None:
    """What torch needs of an operator: opcheck of the registered ones under it, and torch.compile(fullgraph=True).

    Also each gradient and each output's cotangent alone, and the same values without any gradient.
    """
    case = _Case(op, shape, dtype, device, 0, changed)
    with _Calls() as calls:
        found = case.ours(backend, case.inputs)
    if backend not in INLINE:
        assert calls.seen, f"{case.describe(backend)}: calls no registered operator"
    for function, args, kwargs in calls.distinct():
        torch.library.opcheck(function, args, kwargs)

    torch._dynamo.reset()
    compiled = torch.compile(case.spec.function, fullgraph=True, backend="aot_eager")
    variants: dict[str, dict[str, Any]] = {"compiled": {"function": compiled}, "without gradients": {"gradients": ()}}
    if len(case.gradients) > 1:
        variants |= {f"gradient of {name} alone": {"gradients": (name,)} for name in case.gradients}
    outputs = [
        name.removesuffix(REQUIRES_GRAD) for name, value in found.items() if name.endswith(REQUIRES_GRAD) and value
    ]
    if len(outputs) > 1:
        variants |= {f"cotangent of {name} alone": {"cotangents": (name,)} for name in outputs}
    wrong = []
    for name, options in variants.items():
        only = {key: value for key, value in options.items() if key != "function"}
        with poisoned_memory():
            ours = case.ours(backend, case.inputs, **options)
        wrong += [f"{name}: {text}" for text in _worse(ours, case.eager(**only), case.exact(**only), case, slack)]
    torch._dynamo.reset()
    assert not wrong, case.describe(backend) + "\n  " + "\n  ".join(wrong)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """What torch.empty returns is NaN (the largest value in integers): an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Case:
    """One operator at one shape and dtype: its inputs, and the three ways to compute it."""

    def __init__(
        self,
        op: str | OpSpec,
        shape: str | Shape,
        dtype: torch.dtype,
        device: str,
        seed: int,
        changed: Mapping[str, Any],
    ) -> None:
        self.spec = load(op) if isinstance(op, str) else op
        self.shape = self.spec.shapes[shape] if isinstance(shape, str) else shape
        self.dtype, self.device, self.changed = dtype, device, dict(changed)
        generator = torch.Generator().manual_seed(seed)
        self.inputs = self.spec.make_inputs(self.shape, dtype, torch.device(device), generator) | self.changed
        self.gradients = tuple(name for name in self.spec.gradients if isinstance(self.inputs.get(name), Tensor))
        self.copies = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.inputs)

    def ours(
        self,
        backend: str,
        inputs: Mapping[str, Any],
        function: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Named:
        """Run the operator; forward and backward each have to be the named backend's work."""
        op, phases = self.spec.name, []
        with backends.use_backend(**{op: backend}):
            found = self._run(function or self.spec.function, inputs, phases=phases, **options)
        for phase, seen in phases:
            ran = {name for key, name in seen if key == op}
            expected = set() if backend in INLINE else {backend}
            assert ran == expected, f"{self.describe(backend)}: the {phase} ran {sorted(ran) or 'no kernel of ours'}"
        return found

    def eager(self, **only: Any) -> Named:
        return self._run(self.spec.eager or self.spec.reference, self.inputs, **only)

    def exact(self, **only: Any) -> Named:
        doubles = tree_map(lambda x: x.double() if _is_floating(x) else x, self.inputs)
        return self._run(self.spec.reference, doubles, **only)

    def _run(
        self,
        function: Callable[..., Any],
        inputs: Mapping[str, Any],
        gradients: Sequence[str] | None = None,
        cotangents: Sequence[str] | None = None,
        layout: str = "contiguous",
        phases: list[tuple[str, set[tuple[str, str]]]] | None = None,
    ) -> Named:
        """Outputs and gradients: of the arguments in `gradients`, along the outputs in `cotangents`, or of all."""
        wanted = self.gradients if gradients is None else tuple(gradients)
        arguments = {
            name: value.detach().requires_grad_(name in wanted) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        phases = [] if phases is None else phases
        with backends.observe() as seen:
            outputs = _named(function(**arguments))
        phases.append(("forward", set(seen)))
        found = {name: out.detach() for name, out in outputs.items()}
        used = {
            name: out
            for name, out in outputs.items()
            if out.requires_grad and (cotangents is None or name in cotangents)
        }
        if wanted and used:
            along = [_lay_out(self._cotangent(i, out), layout) for i, out in enumerate(used.values())]
            with backends.observe() as seen:
                grads = torch.autograd.grad(
                    list(used.values()), [arguments[name] for name in wanted], along, allow_unused=True
                )
            phases.append(("backward", set(seen)))
            found |= {f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True) if g is not None}
        found |= {f"{name}{REQUIRES_GRAD}": torch.tensor(out.requires_grad) for name, out in outputs.items()}
        return found

    def _cotangent(self, index: int, out: Tensor) -> Tensor:
        """The same values whatever dtype the output has."""
        generator = torch.Generator().manual_seed(1000 + index)
        values = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        return values.to(self.dtype if self.dtype.is_floating_point else out.dtype).to(out.device, out.dtype)

    def changed_inputs(self, inputs: Mapping[str, Any]) -> list[str]:
        def same(x: Any, copy: Any) -> bool:
            return torch.equal(x, copy) if isinstance(x, Tensor) else x == copy

        return [
            name
            for name, value in inputs.items()
            if not all(map(same, tree_leaves(value), tree_leaves(self.copies[name])))
        ]

    def describe(self, backend: str) -> str:
        changes = "".join(f" {k}={v if not isinstance(v, Tensor) else tuple(v.shape)}" for k, v in self.changed.items())
        return f"{self.spec.name} by {backend} on {self.device}, {self.dtype}, {_describe(self.shape)}{changes}"


def _worse(ours: Named, eager: Named, exact: Named, case: _Case, slack: float) -> list[str]:
    """Why `ours` is worse than eager, a line for each tensor that is."""
    wrong = []
    gradients = [x.abs().mean().item() for name, x in exact.items() if name.startswith("gradient") and x.numel()]
    for name in exact.keys() | ours.keys():
        have, want = ours.get(name), exact.get(name)
        if have is None or want is None:
            wrong.append(f"{name}: {'missing' if have is None else 'not in the reference'}")
        elif have.shape != want.shape:
            wrong.append(f"{name}: shape {tuple(have.shape)} is not {tuple(want.shape)}")
        elif not want.is_floating_point():
            differ = (have.double() - want.double()).abs() > case.spec.integer_tolerance
            allowed = (eager[name].double() - want.double()).abs() > case.spec.integer_tolerance
            if differ.sum() > slack * allowed.sum():
                wrong.append(f"{name}: {differ.sum().item()} values differ, eager's in {allowed.sum().item()}")
        elif want.numel():
            error, eagers = (
                (have.double() - want).abs(),
                (eager[name].double() - want).abs().nan_to_num(0.0, posinf=0.0),
            )
            coarsest = max((case.dtype, have.dtype), key=lambda dtype: torch.finfo(dtype).eps)
            rounding = ROUNDINGS[coarsest] * torch.finfo(coarsest).eps
            # a gradient may be zero but for rounding, as that of the only token's logit is
            floor = 0.01 * max(gradients, default=0.0) if name.startswith("gradient") else 0.0
            for norm, measure in (("largest", Tensor.max), ("mean", Tensor.mean)):
                allowed = slack * measure(eagers).item() + rounding * max(measure(want.abs()).item(), floor)
                if not measure(error).item() <= allowed:  # NaN is worse
                    wrong.append(
                        f"{name}: {norm} error {measure(error).item():.3g} is over {allowed:.3g} "
                        f"(eager {measure(eagers).item():.3g}, values up to {want.abs().max().item():.3g})"
                    )
    return sorted(wrong)


def _describe(shape: Shape) -> str:
    return "-".join(f"{letter}{size}" for letter, size in shape.items())


def _named(result: Any) -> Named:
    """Output tensors by name; None for an output that was not asked for is left out."""
    if isinstance(result, Mapping):
        pairs = [(f"output {name}", value) for name, value in result.items()]
    else:
        values = result if isinstance(result, (tuple, list)) else (result,)
        pairs = [(f"output {i}", value) for i, value in enumerate(values)]
    return {name: value for name, value in pairs if isinstance(value, Tensor)}


def _lay_out(value: Any, layout: str) -> Any:
    """The same values with other strides."""
    if not isinstance(value, Tensor) or layout == "contiguous" or value.dim() == 0:
        return value
    if layout == "transposed" and value.dim() > 1:
        return value.mT.contiguous().mT
    wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1] + 3)
    if value.dim() == 1:  # every second element
        view = wide[1 : 1 + 2 * value.shape[0] : 2]
    else:
        view = wide[..., 1 : 1 + value.shape[-1]]
    return view.copy_(value)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Calls(TorchDispatchMode):
    """Records the calls of this package's registered operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, tuple[tuple, dict]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "stellar_fast":
            self.seen[function] = args, kwargs or {}
        return function(*args, **(kwargs or {}))

    def distinct(self) -> Iterator[tuple[Any, tuple, dict]]:
        """The last call of each operator, with leaves; a backward has no gradient of its own."""
        for function, call in self.seen.items():
            needs = not function.name().endswith("_backward")

            def leaf(x: Any, needs: bool = needs) -> Any:
                return (
                    x.detach().clone().requires_grad_(needs and x.is_floating_point()) if isinstance(x, Tensor) else x
                )

            yield function, *tree_map(leaf, call)
