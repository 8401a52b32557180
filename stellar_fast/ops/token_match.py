"""token_match: which target token each predicted token learns from. B images, V views, K tokens of width D."""

from typing import Literal, overload

import torch
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.token_match import reference
from stellar_fast.ops.checks import check_floating, check_positive, check_shapes, in_forward_mode
from stellar_fast.tune.lookup import knobs, threads

LARGEST_K = 64  # tokens whose K x K problem the kernels keep in registers or in the first-level cache
DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
_OPERATOR = "token_match"


# Returns (index, plan); a plan that was not asked for has shape (0,). `keep` is uint8.
@torch.library.custom_op("stellar_fast::token_match", mutates_args=())
def _match(
    pred: Tensor,
    target: Tensor,
    keep: Tensor | None,
    epsilon: float,
    iterations: int,
    return_plan: bool,
    name: str,
) -> tuple[Tensor, Tensor]:
    backend.ran(_OPERATOR, name)
    sizes, dtype = dict(zip("BVKD", pred.shape, strict=True)), torch.promote_types(pred.dtype, target.dtype)
    if name == "triton":
        from stellar_fast.kernels.token_match import config, kernel

        chosen = knobs(_OPERATOR, config, sizes, dtype, pred.device)
        return kernel.launch_token_match_fwd(pred, target, keep, epsilon, iterations, return_plan, chosen)
    index, plan = outputs = _empty_outputs(pred, return_plan)
    native.module().token_match(
        *pred.shape,
        (pred.data_ptr(), pred.dtype == torch.bfloat16, *pred.stride()[:3]),
        (target.data_ptr(), target.dtype == torch.bfloat16, target.stride(0), 0, target.stride(1)),
        0 if keep is None else keep.data_ptr(),
        epsilon,
        iterations,
        index.data_ptr(),
        plan.data_ptr() if return_plan else 0,
        threads(_OPERATOR, sizes, dtype).forward,
    )
    return outputs


@_match.register_fake
def _(pred, target, keep, epsilon, iterations, return_plan, name):
    return _empty_outputs(pred, return_plan)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output)


_match.register_autograd(lambda ctx, *_: (None,) * 7, setup_context=_save)


@overload
def token_match(
    pred: Tensor,
    target: Tensor,
    *,
    filter: Tensor | None = None,
    epsilon: float = 0.1,
    iterations: int = 5,
    return_plan: Literal[False] = False,
) -> Tensor: ...
@overload
def token_match(
    pred: Tensor,
    target: Tensor,
    *,
    filter: Tensor | None = None,
    epsilon: float = 0.1,
    iterations: int = 5,
    return_plan: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def token_match(
    pred: Tensor,
    target: Tensor,
    *,
    filter: Tensor | None = None,
    epsilon: float = 0.1,
    iterations: int = 5,
    return_plan: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Match the tokens of V views of an image to the image's target tokens by entropic optimal transport.

    Args:
        pred: (B, V, K, D) floating.
        target: (B, K, D) floating; the views share it, nothing is copied.
        filter: (B, K), nonzero keeps a target, 0 sets its cost to twice the largest of all B * V * K * K costs (it can
            still be chosen).
        epsilon: entropy weight, in units of the Euclidean distance.
        iterations: rounds of dual updates.
        return_plan: also return the transport plan.

    Returns:
        index (B, V, K) int64 in 0..K-1, not one-to-one; ties take the lowest index. With `return_plan` also the plan
        (B, V, K, K) fp32, whose rows are predictions and whose columns (targets) sum to one. Neither has a gradient.
        Everything is computed in fp32 whatever the dtypes, which may differ, and under autocast too (fp64 where an
        argument is fp64); the distances are those of differences, exact for tokens that are nearly equal.
        Backends: `triton` (fp32, bf16, fp16) and `cpu` (fp32, bf16) for K <= 64; `reference` for the rest.

    Raises:
        ValueError: shapes that do not fit together, no tokens or tokens of no width, integer tokens, an epsilon or
            iterations that are not positive.

    Source: Sinkhorn distances (arXiv 1306.0895) as used by STELLAR (arXiv 2602.01905).
    """
    shapes = {"pred": (pred, "BVKD"), "target": (target, "BKD")}
    sizes = check_shapes(**shapes if filter is None else shapes | {"filter": (filter, "BK")})
    check_floating(pred=pred, target=target)
    check_positive(epsilon=epsilon, iterations=iterations, K=sizes["K"], D=sizes["D"])
    name = backend.pick(_OPERATOR, pred.device.type, _unfit(sizes["K"], pred.dtype, target.dtype))
    pred, target = pred.detach(), target.detach()
    if name == "reference":
        return reference.token_match(pred, target, filter, epsilon, iterations, return_plan)
    pred, target = _with_dense_tokens(pred), _with_dense_tokens(target)
    keep = None if filter is None else filter.bool().to(torch.uint8).contiguous()
    index, plan = _match(pred, target, keep, epsilon, iterations, return_plan, name)
    return (index, plan) if return_plan else index


def _unfit(K: int, *dtypes: torch.dtype) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take this call, with the reason."""
    if in_forward_mode():
        return tuple((name, "it has no rule for torch.func") for name in DTYPES)
    unfit = [
        (n, f"it does not compute in {dtype}") for n, taken in DTYPES.items() for dtype in dtypes if dtype not in taken
    ]
    if K > LARGEST_K:
        unfit += [(name, f"K {K} is above {LARGEST_K}") for name in DTYPES]
    return tuple(unfit)


def _with_dense_tokens(x: Tensor) -> Tensor:
    """With the elements of a token next to each other; images, views and tokens may be strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _empty_outputs(pred: Tensor, return_plan: bool) -> tuple[Tensor, Tensor]:
    B, V, K, _ = pred.shape
    index = pred.new_empty((B, V, K), dtype=torch.int64)
    return index, pred.new_empty((B, V, K, K) if return_plan else (0,), dtype=torch.float32)
