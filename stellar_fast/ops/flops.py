"""What torch.utils.flop_counter counts of the registered operators: the products that they compute, two FLOPs each.

As with torch's own operators, sums and element-wise work count nothing. A backward that multiplies again counts that
too. On a CPU the prototype loss computes its gradients in the forward: there they count. The counter's module imports
Triton, so it is not imported here: the formulas join it when somebody else imports it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType
from typing import Any

import torch

Size = Sequence[int]
COUNTER = "torch.utils.flop_counter"


def _attention(heads: Size, sizes: Sequence[int]) -> int:
    """Of two products; `sizes` holds (sequences, queries, keys) of each group one after another."""
    return 4 * prod(heads) * sum(prod(sizes[i : i + 3]) for i in range(0, len(sizes), 3))


def _convolution(taps: int, x: Size, weight: Size) -> int:
    """Of so many taps for each of x's pixels, each a product of C x O."""
    return 2 * taps * x[0] * x[2] * x[3] * weight[0] * weight[1]


def _lowrank_product(query: Size, key: Size, value: Size) -> int:
    return 2 * prod(query[:2]) * key[1] * (query[2] + value[2])


def _patches(images: Sequence[Size], keep_indices: Sequence[Size], patch: Size) -> int:
    return sum(
        N * ((H // patch[0]) * (W // patch[1]) if len(keep) == 1 else keep[1])
        for (N, _, H, W), keep in zip(images, keep_indices, strict=True)
    )


def _prototype_cross_entropy(features: Size, prototypes: Size, targets: Sequence[Size], needs: Sequence[bool]) -> int:
    of_targets = 2 * prod(targets[2]) * targets[3][0] if len(targets) == 4 else 0
    return 2 * features[0] * prod(prototypes) * (1 + sum(needs)) + of_targets


def _prototype_cross_entropy_backward(
    features: Size,
    prototypes: Size,
    targets: Sequence[Size],
    grad_features: Size,
    grad_prototypes_t: Size,
    needs: Sequence[bool],
) -> int:
    kept = [len(size) == 2 for size in (grad_features, grad_prototypes_t)]
    return 0 if kept == list(needs) else _prototype_cross_entropy(features, prototypes, targets, needs)


# By the operators' own names of their arguments; a tensor is given as its shape.
FORMULAS: dict[str, Callable[..., int]] = {
    "conv3x3": lambda x, weight: _convolution(9, x, weight),  # of the plain formula, whatever Winograd saves
    "conv3x3_backward": lambda x, weight, needs: _convolution(9, x, weight) * sum(needs[:2]),
    "koleo": lambda x: 2 * prod(x) * x[-2],
    "linear": lambda x, weight: 2 * x[0] * prod(weight),
    "linear_backward": lambda x, weight, needs: 2 * x[0] * prod(weight) * sum(needs[:2]),
    "lowrank_product": _lowrank_product,
    "lowrank_product_backward": lambda query, key, value: 2 * _lowrank_product(query, key, value),
    "nearest_code": lambda z, codebook: 2 * z[0] * prod(codebook),
    "packed_patch_embed": lambda images, keep_indices, weight: (
        2 * _patches(images, keep_indices, weight[2:]) * prod(weight)
    ),
    "packed_patch_embed_backward": lambda grad, images, keep_indices, patch, needs_weight: (
        2 * _patches(images, keep_indices, patch) * 3 * prod(patch) * grad[1] * needs_weight
    ),
    "patch_unembed": lambda x, weight: 2 * prod(x[:-1]) * prod(weight),
    "patch_unembed_backward": lambda x, weight, needs: 2 * prod(x[:-1]) * prod(weight) * sum(needs[:2]),
    "prototype_cross_entropy": _prototype_cross_entropy,
    "prototype_cross_entropy_backward": _prototype_cross_entropy_backward,
    "token_attention": lambda q, sizes: _attention(q[-2:], sizes),
    "token_attention_backward": lambda q, sizes: _attention(q[-2:], sizes) * 5 // 2,  # five products
    "token_match": lambda pred, target: 2 * prod(pred) * target[-2],
    "token_self_attention": lambda qkv, sizes: _attention(qkv[-2:], sizes),
    "token_self_attention_backward": lambda qkv, sizes: _attention(qkv[-2:], sizes) * 5 // 2,
    "upsample_conv2x": lambda x, weight: _convolution(16, x, weight),  # four phases of 2x2 taps
    "upsample_conv2x_backward": lambda x, weight, needs: _convolution(16, x, weight) * sum(needs[:2]),
}


class _WhenImported(importlib.abc.MetaPathFinder):
    """Lets the formulas join the counter once its module has run, and is gone then."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_join(module: ModuleType) -> None:
                run(module)
                _join(module)

            spec.loader.exec_module = run_and_join  # type: ignore[method-assign]
        return spec


def _join(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        packet = getattr(torch.ops.stellar_fast, name)
        names = [argument.name for argument in packet.default._schema.arguments]
        wanted = inspect.signature(formula).parameters

        def count(
            *args: Any, out_val: Any = None, out_shape: Any = None, formula: Any = formula, names: Any = names,
            wanted: Any = wanted, **kwargs: Any,
        ) -> int:  # fmt: skip
            given = dict(zip(names, args, strict=False)) | kwargs
            return formula(**{name: given[name] for name in wanted})

        counter.register_flop_formula(packet)(count)


def register() -> None:
    """Let the formulas join the counter, now or when it is imported. Called once, when all operators are registered."""
    if COUNTER in sys.modules:
        _join(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
