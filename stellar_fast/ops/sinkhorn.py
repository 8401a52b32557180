"""sinkhorn: balanced soft assignment of tokens to prototypes. R rows (tokens), C columns (prototypes).

Row and column potentials are all that is kept: an assignment is exp(logits / temperature + row + column). Each pass
over the logits takes one exponential of each; sums are those of the published formula at the potentials so far, its
1e-8 included. The first ones are below each column's peak, the formula's exp(50) beside it joins as a logarithm; all
later ones are of shares that the step before has divided by a sum which holds them. So nothing overflows, and what
underflows is far below the 1e-8 beside which it is added: that 1e-8 also bounds what a round adds to a row's potential
by 18.5, however far its logits are below all others.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.common.precision import at_least_fp32
from stellar_fast.kernels.sinkhorn import reference
from stellar_fast.ops.checks import (
    check_floating,
    check_positive,
    check_shapes,
    has_values,
    in_forward_mode,
    with_dense_rows,
)
from stellar_fast.tune.lookup import knobs, threads

DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
# Elements of a thread's part: fewer take less time than waking a second thread does.
SMALL = 1 << 15
# A column's potential is as large as its scores, logits / temperature. Three roundings of numbers up to this one move
# an assignment by at most 1e-4 of itself. Of larger scores the logits' distance from their column's largest is taken.
LARGE_SCORE = 512.0
_OPERATOR = "sinkhorn"


class SinkhornTargets(NamedTuple):
    """Assignments of T tokens to C prototypes that were never written: t = exp(logits / temperature + row + column).

    Attributes:
        row: (T,) fp32, as column (C,), of `sinkhorn_potentials`.
        column: see row.
        temperature: that the potentials were computed with.
        logits: (T, C) floating; or None with
        features: (T, E) floating, and
        prototypes: (C, E), whose product they are.
    """

    row: Tensor
    column: Tensor
    temperature: float
    logits: Tensor | None = None
    features: Tensor | None = None
    prototypes: Tensor | None = None

    def assignments(self) -> Tensor:
        """All of them, (T, C) at least fp32, without gradient: for tests and small problems."""
        if self.logits is not None:
            scores = at_least_fp32(self.logits.detach())
        else:
            assert self.features is not None and self.prototypes is not None
            scores = at_least_fp32(self.features.detach()) @ at_least_fp32(self.prototypes.detach()).mT
        # the column's potential is as large as the scores: what is left of the two is exact
        return (scores / self.temperature + self.column + self.row[:, None]).exp()


# All backends return (row (R,), column (C,), assignments (R, C), entropy (R,), first (R,)); of the last three those
# that were not asked for have shape (0,).
@torch.library.custom_op("stellar_fast::sinkhorn", mutates_args=())
def _whole(
    logits: Tensor, temperature: float, iterations: int, scale: float, assignments: bool, statistics: bool, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    if name == "triton":
        from stellar_fast.kernels.sinkhorn import config, kernel

        chosen = knobs(_OPERATOR, config, _sizes(logits), logits.dtype, logits.device)
        return kernel.launch_sinkhorn_fwd(logits, temperature, iterations, scale, assignments, statistics, chosen)
    peaks, sums = _column_parts(logits, temperature)
    column = reference.first_column(*_joined(peaks, sums), scale)
    row = column.new_zeros(logits.shape[0])
    for _ in range(iterations - 1):
        _row_pass(logits, temperature, row, column, sums=sums)
        column = reference.next_column(column, sums.sum(0), scale)
    out, entropy, first = _empty_results(logits, assignments, statistics)
    _row_pass(logits, temperature, row, column, out=out, entropy=entropy, first=first)
    return row, column, out, entropy, first


@_whole.register_fake
def _(logits, temperature, iterations, scale, assignments, statistics, name):
    R, C = logits.shape
    row, column = (logits.new_empty(size, dtype=torch.float32) for size in (R, C))
    return row, column, *_empty_results(logits, assignments, statistics)


# The same in two stages, between which ranks exchange what they return. First (peak (C,), sums (C,)): the largest
# logits / temperature of each column, and its sums of exp(logits / temperature - peak).
@torch.library.custom_op("stellar_fast::sinkhorn_columns", mutates_args=())
def _columns(logits: Tensor, temperature: float, name: str) -> tuple[Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    if name == "triton":
        from stellar_fast.kernels.sinkhorn import config, kernel

        chosen = knobs(_OPERATOR, config, _sizes(logits), logits.dtype, logits.device)
        return _joined(*kernel.launch_sinkhorn_columns(logits, temperature, chosen))
    return _joined(*_column_parts(logits, temperature))


@_columns.register_fake
def _(logits, temperature, name):
    return tuple(logits.new_empty(logits.shape[1], dtype=torch.float32) for _ in range(2))


# Then (row, sums (C,), assignments, entropy, first) of a row step: `sums` for the next round's columns, or in the last
# step the three results, each of shape (0,) where it is not asked for.
@torch.library.custom_op("stellar_fast::sinkhorn_rows", mutates_args=())
def _rows(
    logits: Tensor,
    temperature: float,
    row: Tensor,
    column: Tensor,
    last: bool,
    assignments: bool,
    statistics: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    row = row.clone()
    out, entropy, first = _empty_results(logits, last and assignments, last and statistics)
    if name == "triton":
        from stellar_fast.kernels.sinkhorn import config, kernel

        chosen = knobs(_OPERATOR, config, _sizes(logits), logits.dtype, logits.device)
        sums = kernel.launch_sinkhorn_rows(logits, temperature, row, column, last, out, entropy, first, chosen)
    else:
        sums = column.new_empty(0 if last else _parts(logits), logits.shape[1])
        _row_pass(logits, temperature, row, column, sums, out, entropy, first)
    return row, sums.new_empty(0) if last else sums.sum(0), out, entropy, first


@_rows.register_fake
def _(logits, temperature, row, column, last, assignments, statistics, name):
    results = _empty_results(logits, last and assignments, last and statistics)
    return torch.empty_like(row), column.new_empty(0 if last else logits.shape[1]), *results


def _mark(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output)
    ctx.inputs = len(inputs)


for _operator in (_whole, _columns, _rows):  # without gradient
    _operator.register_autograd(lambda ctx, *_: (None,) * ctx.inputs, setup_context=_mark)


def sinkhorn_potentials(
    logits: Tensor,
    *,
    temperature: float = 0.06,
    iterations: int = 3,
    scale: float = 1.0,
    group: dist.ProcessGroup | None = None,
    statistics: bool = False,
) -> tuple[Tensor, ...]:
    """Sinkhorn-Knopp scalings of R tokens and C prototypes; nothing of size R x C is written. No gradient.

    The assignments are exp(logits / temperature + row + column): see `SinkhornTargets`, which carries them.

    Args:
        logits: (R, C) floating, tokens by prototypes; with `group` this rank's rows.
        temperature: divides the logits.
        iterations: rounds of column and row scaling.
        scale: exponent of the column sums (`sk_scale`); 1 balances the prototypes fully.
        group: process group whose ranks hold the other rows; column maxima and sums are exchanged, nothing else.
        statistics: also return, from the last pass, what is known of each row's assignments.

    Of scores (logits / temperature) up to 512, fp32 gives assignments within 1e-4 of themselves; beyond, the sum of a
    score and its column's potential is off by up to 2^-22 of the score. On a CPU `near_their_peaks` then gives logits
    with the same assignments of which this does not matter; on a GPU scores have to stay below some thousands.

    Returns:
        row (R,) and column (C,) fp32; with `statistics` also entropy (R,) fp32, -sum of t log t in nats, and first
        (R,) int64, the column with the largest assignment (of equal ones the lowest).
        Backends: `triton` (fp32, bf16, fp16), `cpu` (fp32, bf16), `reference` (fp64 stays fp64).

    Raises:
        ValueError: not a matrix, an integer matrix, a number that is not positive, no rows, no columns.

    Source: SwAV (arXiv 2006.09882) with STELLAR's shift and scale (arXiv 2602.01905), in the log domain.
    """
    name = _checked(logits, temperature, iterations, scale)
    if name == "reference":
        return reference.sinkhorn_potentials(logits, temperature, iterations, scale, group, statistics)
    row, column, _, entropy, first = _solve(logits, temperature, iterations, scale, group, False, statistics, name)
    return (row, column, entropy, first) if statistics else (row, column)


def sinkhorn_knopp(
    logits: Tensor,
    *,
    temperature: float = 0.06,
    iterations: int = 3,
    scale: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sinkhorn-Knopp assignments themselves; arguments, backends and errors are those of `sinkhorn_potentials`.

    Returns:
        (R, C) fp32 without gradient; after the last round every row sums to one but for the 1e-8 in its divisor.
    """
    name = _checked(logits, temperature, iterations, scale)
    if name == "reference":
        return reference.sinkhorn_knopp(logits, temperature, iterations, scale, group)
    return _solve(logits, temperature, iterations, scale, group, True, False, name)[2]


def _checked(logits: Tensor, temperature: float, iterations: int, scale: float) -> str:
    """The backend that takes the call."""
    sizes = check_shapes(logits=(logits, "RC"))
    check_floating(logits=logits)
    for letter, what in (("R", "rows"), ("C", "columns")):
        if not sizes[letter]:
            raise ValueError(f"logits has 0 {what}: nothing to assign")
    check_positive(temperature=temperature, iterations=iterations, scale=scale)
    return backend.pick(_OPERATOR, logits.device.type, _unfit(logits.dtype))


def _unfit(dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take this call, with the reason."""
    if in_forward_mode():
        return tuple((name, "it has no rule for torch.func") for name in DTYPES)
    return tuple((name, f"it does not compute in {dtype}") for name, taken in DTYPES.items() if dtype not in taken)


def near_their_peaks(
    logits: Tensor, column: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor] | None:
    """Where roundings of large scores would show: (logits less the largest of their column, those largest (C,)).

    They have the same assignments: a column's potential takes up what is subtracted from all of its logits.

    Args:
        logits: (R, C), as `sinkhorn_potentials` was given them.
        column: (C,) that it returned; read on a CPU, and on a GPU taken for small.
        group: likewise.
    """
    if column.device.type != "cpu" or not has_values(column) or not column.abs().amax() > LARGE_SCORE:
        return None
    peak = at_least_fp32(logits).amax(0)
    if group is not None:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    return at_least_fp32(logits) - peak, peak


def _solve(
    logits: Tensor,
    temperature: float,
    iterations: int,
    scale: float,
    group: dist.ProcessGroup | None,
    assignments: bool,
    statistics: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = with_dense_rows(logits.detach())
    options = iterations, scale, group, assignments, statistics, name
    row, column, *results = _solve_once(logits, temperature, *options)
    nearer = near_their_peaks(logits, column, group)
    if nearer is not None:
        row, rest, *results = _solve_once(nearer[0], temperature, *options)
        column = rest - nearer[1] / temperature
    assignment, entropy, first = results
    return row, column, assignment, entropy, first


def _solve_once(
    logits: Tensor,
    temperature: float,
    iterations: int,
    scale: float,
    group: dist.ProcessGroup | None,
    assignments: bool,
    statistics: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if group is None:
        return _whole(logits, temperature, iterations, scale, assignments, statistics, name)
    local_peak, sums = _columns(logits, temperature, name)
    peak = local_peak.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    sums = sums * (local_peak - peak).exp()
    dist.all_reduce(sums, group=group)
    column = reference.first_column(peak, sums, scale)
    row = column.new_zeros(logits.shape[0])
    for _ in range(iterations - 1):
        row, sums, *_ = _rows(logits, temperature, row, column, False, False, False, name)
        dist.all_reduce(sums, group=group)
        column = reference.next_column(column, sums, scale)
    row, _, *results = _rows(logits, temperature, row, column, True, assignments, statistics, name)
    return row, column, *results


def _column_parts(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Peaks and sums (parts, C) of groups of rows."""
    parts = _parts(logits)
    peaks, sums = (logits.new_empty(parts, logits.shape[1], dtype=torch.float32) for _ in range(2))
    native.module().sinkhorn_columns(_matrix(logits, temperature), peaks.data_ptr(), sums.data_ptr(), parts)
    return peaks, sums


def _joined(peaks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    peak = peaks.amax(0)
    return peak, (sums * (peaks - peak).exp()).sum(0)


def _row_pass(
    logits: Tensor,
    temperature: float,
    row: Tensor,
    column: Tensor,
    sums: Tensor | None = None,
    out: Tensor | None = None,
    entropy: Tensor | None = None,
    first: Tensor | None = None,
) -> None:
    native.module().sinkhorn_rows(
        _matrix(logits, temperature),
        column.data_ptr(),
        row.data_ptr(),
        *(0 if x is None or not x.numel() else x.data_ptr() for x in (sums, out, entropy, first)),
        _parts(logits) if sums is None or not sums.numel() else len(sums),
    )


def _empty_results(logits: Tensor, assignments: bool, statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    out = logits.new_empty(logits.shape if assignments else (0,), dtype=torch.float32)
    entropy = logits.new_empty(logits.shape[:1] if statistics else (0,), dtype=torch.float32)
    return out, entropy, torch.empty_like(entropy, dtype=torch.int64)


def _parts(logits: Tensor) -> int:
    """Groups of rows, a thread each."""
    most = threads(_OPERATOR, _sizes(logits), logits.dtype).forward
    return max(1, min(most, logits.shape[0], logits.numel() // SMALL))


def _matrix(x: Tensor, temperature: float) -> tuple[int, bool, int, int, int, float]:
    return x.data_ptr(), x.dtype == torch.bfloat16, x.stride(0), *x.shape, temperature


def _sizes(x: Tensor) -> dict[str, int]:
    return {"R": x.shape[0], "C": x.shape[1]}
