"""What holds for every operator, checked in one call; tests/ops/test_<op>.py says at which shapes and dtypes.

    @each_backend("lowrank_product")
    @each_dtype("lowrank_product")
    @each_shape("lowrank_product")
    def test_no_worse_than_eager(backend, device, shape, dtype):
        check_op("lowrank_product", backend, shape, dtype, device)

    @each_backend("lowrank_product")
    def test_registration(backend, device):
        check_registered("lowrank_product", backend, device=device)

"No worse than eager": every output, and the gradient of every argument named in the operator's spec along a random
cotangent, is as close to fp64 as torch's operations are with roundings drawn at random, see `tests/roundings.py`.
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
from tests.roundings import Allowance, Named, RandomRoundings, allowances, measures, reasons

LAYOUTS = ("contiguous", "transposed", "sliced")
REQUIRES_GRAD = " requires grad"
INLINE = ("reference", "torch")  # computed by torch itself: nothing of ours reports that it ran

_ALLOWED: dict[tuple, dict[str, Allowance]] = {}  # several backends of an operator are held against the same


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
        seed: of the inputs.
        changed: arguments that differ from the spec's, such as ``temperature=None``.
    """
    case = Case(op, shape, dtype, device, seed, changed)
    found, wrong = {}, []
    for layout in layouts:
        inputs = tree_map(lambda x, layout=layout: _lay_out(x, layout), case.inputs)
        with poisoned_memory():
            found[layout] = case.ours(backend, inputs, layout=layout)
        wrong += [f"{layout}: changed its input {name}" for name in case.changed_inputs(inputs)]
    exact, allowed = case.exact(), case.allowed()
    if backend == "torch":  # torch's kernels themselves, some of which sum in 16 bits: no draw stands for that
        eager = case._run(case.spec.eager or case.spec.reference, case.inputs)
        allowed = {
            name: drawn | Allowance(_doubled(eager[name], exact[name])) if drawn.limits else drawn
            for name, drawn in allowed.items()
        }
    wrong += [f"{layout}: {text}" for layout, ours in found.items() for text in _wrong(ours, exact, allowed, case)]
    assert not wrong, case.describe(backend) + "\n  " + "\n  ".join(wrong)


def check_registered(
    op: str | OpSpec,
    backend: str,
    shape: str | Shape = "small",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **changed: Any,
) -> None:
    """What torch needs of an operator: opcheck of the registered ones under it, and torch.compile(fullgraph=True).

    Also each gradient and each output's cotangent alone, and the same values without any gradient.
    """
    case = Case(op, shape, dtype, device, 0, changed)
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
        allowed = case.allowed(options.get("cotangents"))
        wrong += [f"{name}: {text}" for text in _wrong(ours, case.exact(**only), allowed, case)]
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


class Case:
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
        self.is_named = isinstance(op, str) and not any(isinstance(x, Tensor) for x in tree_leaves(changed))
        self.shape = self.spec.shapes[shape] if isinstance(shape, str) else shape
        self.dtype, self.device, self.changed, self.seed = dtype, device, dict(changed), seed
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

    def allowed(self, cotangents: Sequence[str] | None = None) -> dict[str, Allowance]:
        """How far from `exact` eager may be with all gradients, or the reference where eager does not err at all."""
        key = (self.spec.name, str(self.shape), self.dtype, self.device, str(self.changed), self.seed, cotangents)
        if self.is_named and key in _ALLOWED:
            return _ALLOWED[key]
        exact = self.exact(cotangents=cotangents)

        def of(formula: Callable[..., Any]) -> dict[str, Allowance]:
            def run(draw: RandomRoundings) -> Named:
                return self._run(formula, self.inputs, cotangents=cotangents, within=draw)

            return allowances(run, exact, self.spec.integer_tolerance)

        _ALLOWED[key] = found = of(self.spec.eager or self.spec.reference)
        if self.spec.eager and not all(x.some for x in found.values()):
            widened = of(self.spec.reference)
            found |= {name: found[name] | widened[name] for name in found}
        return found

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
        within: contextlib.AbstractContextManager | None = None,
    ) -> Named:
        """Outputs and gradients: of the arguments in `gradients`, along the outputs in `cotangents`, or of all."""
        wanted = self.gradients if gradients is None else tuple(gradients)
        arguments = {
            name: value.detach().requires_grad_(name in wanted) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        phases, within = [] if phases is None else phases, within or contextlib.nullcontext()
        with backends.observe() as seen, within:
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
            with backends.observe() as seen, within:
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


def _doubled(found: Tensor, exact: Tensor) -> dict[str, float]:
    return {key: 2 * value for key, value in measures(found, exact).items()}


def _wrong(ours: Named, exact: Named, allowed: Mapping[str, Allowance], case: Case) -> list[str]:
    """Why `ours` is worse than eager could be, a line for each number that is."""
    wrong = []
    for name in exact.keys() | ours.keys():
        have, want = ours.get(name), exact.get(name)
        if have is None or want is None:
            wrong.append(f"{name}: {'missing' if have is None else 'not in the reference'}")
        elif have.shape != want.shape:
            wrong.append(f"{name}: shape {tuple(have.shape)} is not {tuple(want.shape)}")
        else:
            wrong += reasons(name, have, want, allowed[name], case.spec.integer_tolerance)
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
