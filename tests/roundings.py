"""How far roundings may carry a formula from its exact value, whatever the machine: drawn at random, several times.

To first order an implementation's error is a sum over its roundings, each of them at most u = 2^-24 in fp32 (2^-9 in
bf16) of the value that is rounded, times what that value does to the result. This effect belongs to the formula and its
inputs. The rounding is the machine's, its order of sums, its vectors, its libraries: luck, and so it is drawn. Within
`RandomRoundings` torch's operations, forward and backward, are computed in a wider dtype, their results moved at random
and then rounded to their own:

- a result of one step by up to u, unless it needs no rounding;
- a sum of n terms further, with the standard deviation u sqrt(n (s^2 / 3 + q / 6)), s the sum, q that of the terms'
  squares, u that of fp32 for 16-bit terms too. Adding up one term after the other in random order comes to this: its
  partial sums are k s / n, give or take q k (n - k) / n^2, and each is rounded by at most u. Vectors, blocks and trees
  have smaller partial sums. Inputs of tests are drawn at random, so that no order of terms is a special one.

True roundings scatter by 0.4 u to 0.6 u, so that what is drawn errs on the large side, by 1.5 to 2.5.

Of a tensor's error three numbers are taken: the largest, the root of the mean square, and the part along the exact
tensor, which shows a factor of 1.001 in 16 bits too, where there are thousands of elements. Each may reach twice the
mean of eight draws and on top eight times their standard deviation. Where many values decide the draws agree, and twice
the mean remains; where a single one decides, their scatter says how wide its luck is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from stellar_fast.backend import interpreting

Named = dict[str, Tensor]

DRAWS = 8
MEANS, DEVIATIONS = 2.0, 8.0
# What roundings have in common, and no draw shows: fp32 roundings of a formula's constants, the same for all elements,
# and of u of 16 bits a sixteenth, as roundings of products of such short numbers repeat themselves.
CONSTANTS, REPEATED = 4.0, 1 / 16
TRUNCATIONS = 4.0  # Triton's interpreter rounds to bf16 towards zero, twice on the way
TF32X3 = 2.0**-21  # of a product of fp32 numbers that a GPU forms of three TF32 products

aten, prims = torch.ops.aten, torch.ops.prims
# Sums of products, linear in each argument: of ones they count their terms, of squares they sum the terms' squares.
SUMS = frozenset(
    {aten.sum, prims.sum, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.dot, aten.scatter_add}
    | {aten.convolution, aten.convolution_backward, aten.upsample_nearest2d_backward}
)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    total = x.sum(dim, keepdim, dtype=dtype)
    return total / (x.numel() / max(1, total.numel()))


def _var_mean(
    x: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: float | None = None
) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim, keepdim=True)
    squares = (x - mean).square().sum(dim, keepdim=keepdim)
    degrees = x.numel() / max(1, squares.numel()) - (float(unbiased) if correction is None else correction)
    return squares / degrees, mean.view(squares.shape)


def _vector_norm(x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return x.square().sum(dim, keepdim, dtype=dtype).sqrt()


def _cdist(a: Tensor, b: Tensor, p: float, mode: int | None) -> Tensor:
    return (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1).sqrt()


# Operations of several steps, taken apart.
STEPS: Mapping[Any, Callable[..., Any]] = {
    **get_decompositions(
        (aten._softmax, aten._softmax_backward_data, aten._log_softmax, aten._log_softmax_backward_data, aten.logsumexp)
    ),
    **get_decompositions((aten.native_layer_norm, aten.native_layer_norm_backward)),
    **get_decompositions((aten.native_group_norm, aten.native_group_norm_backward)),
    **get_decompositions((aten.gelu, aten.gelu_backward, aten.silu, aten.silu_backward)),
    **dict.fromkeys((aten.mean.default, aten.mean.dim), _mean),
    **dict.fromkeys((aten.var_mean.dim, aten.var_mean.correction), _var_mean),
    aten.linalg_vector_norm.default: _vector_norm,
    aten._cdist_forward.default: _cdist,
}


class RandomRoundings(TorchDispatchMode):
    """Within it torch's roundings are random, other ones after every `again`."""

    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._spreads: list[
            list[Tensor | None]
        ] = []  # of each operation, in turn: to first order the same in all draws
        self._place = 0

    def again(self) -> None:
        """What follows is the same computation as before, from its beginning."""
        self._place = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in STEPS:
            with self:
                return STEPS[function](*args, **kwargs)
        result = function(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if _is_floating(x)]
        places = {x.untyped_storage()._cdata for x in given}  # a view or what is written in place is not rounded here
        rounded = {
            i: x
            for i, x in enumerate(tree_leaves(result))
            if _is_floating(x) and x.numel() and x.untyped_storage()._cdata not in places
        }
        if not given or not rounded:
            return result

        # to 16 bits fp32 is as good as fp64, and many times as fast in a convolution
        wide = torch.float32 if all(x.dtype.itemsize == 2 for x in rounded.values()) else torch.float64

        def widened(change: Callable[[Tensor], Tensor] = lambda x: x) -> list[Any]:
            def convert(x: Any) -> Any:
                if isinstance(x, torch.dtype):
                    return wide if x.is_floating_point else x
                return change(x.to(wide)) if _is_floating(x) else x

            return tree_leaves(function(*tree_map(convert, args), **tree_map(convert, kwargs)))

        exact, is_sum = widened(), function.overloadpacket in SUMS
        if self._place == len(self._spreads):
            terms = (widened(torch.ones_like), widened(torch.square)) if is_sum else None
            self._spreads.append(
                [
                    _spread(out, exact[i], None if terms is None else (terms[0][i], terms[1][i]))
                    for i, out in rounded.items()
                ]
            )
        for (i, out), spread in zip(rounded.items(), self._spreads[self._place], strict=True):
            noise = torch.rand(out.shape, generator=self._generator(out.device), device=out.device)
            out.copy_(torch.addcmul(exact[i], noise.sub_(0.5).to(wide), spread))
        self._place += 1
        return result

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(0)
        return self._generators[device]


def _spread(out: Tensor, exact: Tensor, terms: tuple[Tensor, Tensor] | None) -> Tensor:
    """Width of the even distribution that a result is moved by; `terms`: their number and squares in a sum."""
    u = _unit(out.dtype)
    if terms is None:
        return torch.where(out == exact, 0.0, 2 * u * exact.abs()).nan_to_num(0, 0, 0)
    count, squares = terms
    variance = u**2 / 3 * exact.square() + _unit(_wide(out.dtype)) ** 2 * count * (exact.square() / 3 + squares / 6)
    if out.is_cuda and out.dtype != torch.float64:
        variance += TF32X3**2 * squares
    return (12 * variance).sqrt().nan_to_num(0, 0, 0)


@dataclass(frozen=True)
class Allowance:
    """How far an implementation of one tensor may be from the exact one.

    Attributes:
        limits: for floating point, the most of each measure of the error.
        undecided: for integers, the elements in which a draw differs from the exact tensor: roundings decide them.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    undecided: Tensor | None = None

    @property
    def some(self) -> bool:
        """Whether any error is allowed that the dtype can show."""
        return self.undecided is not None or all(limit > 1e-30 for limit in self.limits.values())

    def __or__(self, other: "Allowance") -> "Allowance":
        if self.undecided is not None:
            return Allowance(undecided=self.undecided | other.undecided)
        return Allowance({key: max(limit, other.limits[key]) for key, limit in self.limits.items()})


def allowances(
    formula: Callable[[RandomRoundings], Named], exact: Named, integer_tolerance: int = 0
) -> dict[str, Allowance]:
    """Draw the roundings of a formula.

    Args:
        formula: computes the tensors of `exact`, in an implementation's dtypes and by torch's operations within its
            argument, a context that it may enter more than once.
        exact: the same formula's in fp64.
        integer_tolerance: by how much integers may differ.
    """
    roundings, draws = RandomRoundings(), []
    for _ in range(DRAWS):
        roundings.again()
        found = formula(roundings)
        draws.append(
            {
                name: measures(found[name], want)
                if want.is_floating_point()
                else differ(found[name], want, integer_tolerance)
                for name, want in exact.items()
            }
        )
    allowed = {}
    for name, want in exact.items():
        of_draws = [draw[name] for draw in draws]
        if want.is_floating_point():
            common = _common(found[name].dtype)
            limits = {}
            for key, size in measures(2 * want, want).items():  # of an error as large as the tensor
                values = torch.tensor([draw[key] for draw in of_draws], dtype=torch.float64)
                drawn = float(MEANS * values.mean() + DEVIATIONS * values.std())
                limits[key] = drawn + common * size + torch.finfo(found[name].dtype).tiny  # below it bits are lost
            allowed[name] = Allowance(limits)
        else:
            allowed[name] = Allowance(undecided=torch.stack(of_draws).any(0))
    return allowed


def _common(dtype: torch.dtype) -> float:
    """What the roundings of all elements may have in common, relative to the tensor."""
    of_short = REPEATED * _unit(dtype) if dtype.itemsize == 2 else 0.0
    truncated = TRUNCATIONS * _unit(dtype) if dtype == torch.bfloat16 and interpreting() else 0.0
    return CONSTANTS * _unit(_wide(dtype)) + of_short + truncated


def assert_no_worse(found: Named, formula: Callable[..., Named], *tensors: Tensor, **named: Tensor) -> None:
    """As close to the formula in fp64 as torch may be in the tensors' dtype."""

    def drawn(roundings: RandomRoundings) -> Named:
        with roundings:
            return formula(*tensors, **named)

    exact = formula(*(x.double() for x in tensors), **{name: x.double() for name, x in named.items()})
    allowed = allowances(drawn, exact)
    wrong = [reason for name, want in exact.items() for reason in reasons(name, found[name], want, allowed[name])]
    assert not wrong, "\n".join(wrong)


def measures(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Three numbers of an error, none where there are no elements."""
    if not exact.numel():
        return {}
    error, exact = (found.double() - exact).flatten(), exact.flatten()
    power = exact.dot(exact).item()
    return {
        "largest error": torch.linalg.vector_norm(error, torch.inf).item(),
        "mean square error": torch.linalg.vector_norm(error).item() / len(error) ** 0.5,
        "error along the tensor": abs(error.dot(exact).item())
        / (power if power > torch.finfo(found.dtype).tiny ** 2 else 1.0),
    }


def reasons(name: str, found: Tensor, exact: Tensor, allowed: Allowance, integer_tolerance: int = 0) -> list[str]:
    """Why a tensor is further from the exact one than roundings carry it, a line each."""
    if allowed.undecided is not None:
        count = (differ(found, exact, integer_tolerance) & ~allowed.undecided).sum().item()
        return [f"{name}: {count} of {exact.numel()} values differ that no rounding decides"] if count else []
    return [
        f"{name}: {key} {value:.3g} is over {allowed.limits[key]:.3g} (values up to {exact.abs().max().item():.3g})"
        for key, value in measures(found, exact).items()
        if not value <= allowed.limits[key]  # NaN is worse
    ]


def differ(found: Tensor, exact: Tensor, tolerance: int) -> Tensor:
    """Which elements do, by more than the tolerance."""
    return (found.double() - exact.double()).abs() > tolerance


# Two ways to one result may differ by so much of its largest value: sums of thousands of fp32 terms err by less than
# 1e-5 of it on any machine, and what is found so is a wrong place, a stale weight, a term that is missing.
ALIKE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1 / 32, torch.float16: 1 / 32}


def assert_alike(found: Any, wanted: Any) -> None:
    """Tensors, or sequences and mappings of them, are the same but for the roundings of another way to compute them."""
    if isinstance(wanted, Mapping):
        assert found.keys() == wanted.keys()
        found, wanted = [found[key] for key in wanted], list(wanted.values())
    if isinstance(wanted, (list, tuple)):
        for a, b in zip(found, wanted, strict=True):
            assert_alike(a, b)
    else:
        largest = wanted.detach().double().nan_to_num(0, 0, 0).abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(found, wanted, rtol=0, atol=ALIKE[wanted.dtype] * largest, equal_nan=True)


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
