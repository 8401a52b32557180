"""The sparse-token objective, forward and backward: heads, Sinkhorn targets, token matching, both cross-entropies.

A clean view and masked views of each image, as the trunk gives them; its own time is not in it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import Call
from benchmarks.model.pair import Case, autocast, compare
from benchmarks.plain.model import ClusteringHead, take_tokens
from benchmarks.plain.objectives import match_tokens, sinkhorn, soft_cross_entropy
from benchmarks.shapes import ModelShape, head_flops

BATCH = 8
TEMPERATURE, SINKHORN_TEMPERATURE = 0.12, 0.06

Losses = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]  # head, clean, masked -> clustering, mask


def plain_losses(head: nn.Module, clean_BKD: Tensor, masked_GKD: Tensor) -> tuple[Tensor, Tensor]:
    """As upstream: whole logits, gathered targets, all in fp32 after the head."""
    logits, masked_logits = head(clean_BKD), head(masked_GKD)
    targets = sinkhorn(logits.detach().flatten(0, 1) / SINKHORN_TEMPERATURE).view_as(logits)
    with torch.no_grad():
        views = len(masked_GKD) // len(clean_BKD)
        index = match_tokens(masked_GKD, clean_BKD.repeat_interleave(views, dim=0))
        masked_targets = take_tokens(targets, index)
    return (
        soft_cross_entropy(logits, targets, TEMPERATURE),
        soft_cross_entropy(masked_logits, masked_targets, TEMPERATURE),
    )


def stellar_fast_losses(head: nn.Module, clean_BKD: Tensor, masked_GKD: Tensor) -> tuple[Tensor, Tensor]:
    """As StellarModel computes them."""
    from stellar_fast.models.objective import match, target_rows
    from stellar_fast.nn.prototype_head import PrototypeHead

    assert isinstance(head, PrototypeHead)
    rows = [tokens.flatten(0, 1) for tokens in (clean_BKD, masked_GKD)]
    sizes = [len(x) for x in rows]
    features = head.features(torch.cat(rows))
    targets = head.assign(features[: sizes[0]]).targets
    matched = match(masked_GKD.unflatten(0, (len(clean_BKD), -1)), clean_BKD.detach(), hungarian=True)
    index = torch.cat([torch.arange(sizes[0], device=matched.device), target_rows(matched)])
    clustering, mask = head.cross_entropy(features, targets, index, sizes).unbind()
    return clustering, mask


def build_head(provider: str, shape: ModelShape, device: torch.device) -> nn.Module:
    """The head of a provider, with the same weights for all."""
    from stellar_fast.nn.prototype_head import PrototypeHead

    sizes = shape.encoder.hidden_size, shape.predictor_hidden_dim, shape.prototype_dim, shape.num_clusters
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = ClusteringHead(*sizes, 2)
        with torch.no_grad():  # prototypes as long as training makes them: products are cosines, targets not one-hot
            plain.layer.weight.div_(plain.layer.weight.norm(dim=1, keepdim=True))
    if provider != "stellar_fast":
        return plain.to(device)
    ours = PrototypeHead(*sizes, temperature=TEMPERATURE, sinkhorn={"temperature": SINKHORN_TEMPERATURE})
    names = {"predictor.layers.0": "layers.0", "predictor.layers.2": "layers.1", "layer": "prototypes"}
    weights = plain.state_dict()
    ours.load_state_dict({f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": w for k, w in weights.items()})
    return ours.to(device)


def inputs(shape: ModelShape, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (B, K, D) of clean views, and (B V, K, D) near them and in another order."""
    K, D, views = shape.num_sparse_tokens, shape.encoder.hidden_size, shape.num_masks
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(batch, K, D, generator=generator)
    order = torch.rand(batch * views, K, generator=generator).argsort(dim=1)
    masked = clean.repeat_interleave(views, dim=0).gather(1, order[..., None].expand(-1, -1, D))
    masked = masked + 0.5 * torch.randn(masked.shape, generator=generator)
    return clean.to(device).requires_grad_(), masked.to(device).requires_grad_()


PROVIDERS = ("plain", "plain_compiled", "stellar_fast")
LOSSES: dict[str, Losses] = {"plain": plain_losses, "stellar_fast": stellar_fast_losses}


def losses_of(provider: str) -> Losses:
    """What a provider computes; a new compilation at each call for "plain_compiled"."""
    return torch.compile(plain_losses) if provider == "plain_compiled" else LOSSES[provider]


def forward_backward(
    provider: str, shape: ModelShape, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Call, Callable[[], dict[str, Tensor]]]:
    """(The call that is timed, what it computes: losses and every gradient by name)."""
    head, tokens, compute = build_head(provider, shape, device), inputs(shape, batch, device), losses_of(provider)
    parameters = list(head.parameters())

    def call() -> tuple[Tensor, Tensor]:
        for x in (*parameters, *tokens):
            x.grad = None
        with autocast(device, dtype):
            losses = compute(head, *tokens)
        sum(losses).backward()  # type: ignore[union-attr]
        return losses

    def found() -> dict[str, Tensor]:
        clustering, mask = call()
        gradients = dict(zip(("w1", "b1", "w2", "b2", "prototypes"), (p.grad for p in parameters), strict=True))
        gradients |= {"clean": tokens[0].grad, "masked": tokens[1].grad}
        gradients = {f"gradient.{name}": g.clone() for name, g in gradients.items() if g is not None}
        return {"clustering_loss": clustering.detach(), "mask_loss": mask.detach(), **gradients}

    return call, found


def num_tokens(shape: ModelShape, batch: int) -> int:
    """Sparse tokens of the clean and the masked views."""
    return batch * shape.num_sparse_tokens * (1 + shape.num_masks)


def build_case(shape: ModelShape, batch: int, dtype: torch.dtype, device: torch.device, providers: list[str]) -> Case:
    """Build the providers, verify losses and every gradient against fp32 plain, and return what to time."""
    built = {
        name: forward_backward(name, shape, batch, dtype, device) for name in PROVIDERS if name in ("plain", *providers)
    }
    exact = forward_backward("plain", shape, batch, torch.float32, device)[1]
    checks = compare({name: found for name, (_, found) in built.items()}, exact, dtype)
    tokens = num_tokens(shape, batch)
    return Case(
        suite="objective",
        shape=f"B={batch} {tokens} tokens D={shape.encoder.hidden_size} E={shape.prototype_dim} C={shape.num_clusters}",
        batch=batch,
        flops=3 * head_flops(shape, tokens),
        bytes=4 * tokens * shape.encoder.hidden_size * 2,
        calls={name: call for name, (call, _) in built.items()},
        checks=checks,
        direction="forward+backward",
        preset=shape.preset,
    )
