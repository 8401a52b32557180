"""nearest_code: vector quantisation. N vectors of width E, S codebook entries."""

import torch
from torch import Tensor

from stellar_fast import backend, native
from stellar_fast.kernels.nearest_code import reference
from stellar_fast.ops.checks import check_floating, check_positive, check_shapes, in_forward_mode, with_dense_rows
from stellar_fast.tune.lookup import threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/common/launch.h
TILE_N, TILE_S = 64, 128  # of the CUDA kernel
# That it starts at least, as far as there are tiles: four for each of the 132 multiprocessors of an H100. Blocks that
# share their rows leave a partial result each.
BLOCKS = 512
_OPERATOR = "nearest_code"


@torch.library.custom_op("stellar_fast::nearest_code", mutates_args=())
def _nearest(z: Tensor, codebook: Tensor, name: str) -> Tensor:
    backend.ran(_OPERATOR, name)
    N, S = len(z), len(codebook)
    z, codebook, out = with_dense_rows(z), with_dense_rows(codebook.float()), _empty_output(z)
    if name == "cpu":
        if z.dtype == torch.float16:
            z = z.float()
        call = _call(z, codebook, out)
        count = threads(_OPERATOR, {"N": N, "E": z.shape[1], "S": S}, z.dtype).forward
        native.module().nearest_code(call, z.dtype == torch.bfloat16, count)
        return out
    splits = min(-(-BLOCKS // max(1, -(-N // TILE_N))), -(-S // TILE_S))
    squares, best = codebook.new_empty(S), codebook.new_empty(splits, N)
    index = best.new_empty(best.shape, dtype=torch.int32)
    native.module().nearest_code_cuda(
        z.device.index,
        torch.cuda.current_stream(z.device).cuda_stream,
        _call(z, codebook, out),
        splits,
        squares.data_ptr(),
        best.data_ptr(),
        index.data_ptr(),
        DTYPES.index(z.dtype),
    )
    return out


@_nearest.register_fake
def _(z, codebook, name):
    return _empty_output(z)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output)


_nearest.register_autograd(lambda ctx, *_: (None,) * 3, setup_context=_save)


def _empty_output(z: Tensor) -> Tensor:
    return z.new_empty(len(z), dtype=torch.int64)


def _call(z: Tensor, codebook: Tensor, out: Tensor) -> tuple[int, ...]:
    sizes = len(z), *codebook.shape
    return *sizes, z.data_ptr(), z.stride(0), codebook.data_ptr(), codebook.stride(0), out.data_ptr()


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook entry by squared L2 distance.

    Args:
        z: (N, E) floating vectors.
        codebook: (S, E) floating entries, S >= 1.

    Returns:
        (N,) int64; ties take the lowest index; no gradient. As torch.argmin does, a distance that is NaN counts as the
        smallest: the lowest entry with one is taken, so that a vector that holds a NaN has index 0.
        Distances are fp32 whatever the dtypes, and under autocast too (fp64 where an argument is).
        Backends: `cuda` and `cpu` (fp32, bf16, fp16), where all of (N, S) never exists and equal entries tie to the
        last bit, and `reference`. `cuda` multiplies in fp32 also where the process allows TF32, `reference` in TF32.

    Raises:
        ValueError: widths that differ, integer tensors, an empty codebook.

    Source: VQ-VAE (arXiv 1711.00937).
    """
    sizes = check_shapes(z=(z, "NE"), codebook=(codebook, "SE"))
    check_floating(z=z, codebook=codebook)
    check_positive(S=sizes["S"])
    name = backend.pick(_OPERATOR, z.device.type, _unfit(z, codebook))
    z, codebook = z.detach(), codebook.detach()
    return reference.nearest_code(z, codebook) if name == "reference" else _nearest(z, codebook, name)


def _unfit(z: Tensor, codebook: Tensor) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take this call, with the reason."""
    reason = next((f"it does not compute in {x.dtype}" for x in (z, codebook) if x.dtype not in DTYPES), "")
    if in_forward_mode():
        reason = "it has no rule for torch.func"
    return tuple((name, reason) for name in ("cuda", "cpu")) if reason else ()
