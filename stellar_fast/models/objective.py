"""The objective of a training step: reconstruction, online clustering, masked tokens, CLS, KoLeo.

B images, V views, K sparse tokens, T target rows, C prototypes.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_fast.kernels.common.precision import at_least_fp32
from stellar_fast.models.decoder import Decoder, Localizer
from stellar_fast.models.encoder import StellarEncoder, ViewBatch, ViewOutput
from stellar_fast.models.teacher import Teacher
from stellar_fast.models.vqgan import VQGAN
from stellar_fast.nn.color_augment import ColorAugment
from stellar_fast.nn.masking import random_keep_indices
from stellar_fast.nn.prototype_head import Assignment, PrototypeHead
from stellar_fast.ops.koleo import koleo
from stellar_fast.ops.packed_patch_embed import check_images, to_unit_range
from stellar_fast.ops.token_match import token_match

PIXEL_WEIGHT = 10.0
CODE_WEIGHT = 0.05
KOLEO_WEIGHT = 0.1


class Loss(NamedTuple):
    """What a step minimises."""

    total: Tensor
    parts: dict[str, Tensor]


class Targets(NamedTuple):
    """A teacher's tokens (B, K, D), to be matched, and the assignments of those B K tokens and of the B images."""

    tokens: Tensor
    sparse: Assignment
    cls: Assignment | None


class Objective(nn.Module):
    """The training half of a StellarModel: one step's losses. The model's constructor sets what is declared here."""

    encoder: StellarEncoder
    decoder: Decoder | None
    tokenizer: VQGAN | None
    clustering_head: PrototypeHead | None
    cls_cluster_head: PrototypeHead | None
    teacher: Teacher | None
    color_augment: ColorAugment | None
    do_recon: bool
    do_koleo: bool
    do_cls: bool
    do_masking: bool
    do_cropping: bool
    hungarian_match: bool
    num_masks: int
    num_local_crops: int
    masking_ratio: float
    focal_mode: str | None
    focal_probability: float | None
    koleo_min_distance: float

    def training_step(
        self, batch: Mapping[str, Tensor], keep_indices: Tensor | None, generator: torch.Generator | None
    ) -> dict[str, Any]:
        """The predictions of a training forward; see `StellarModel.forward`."""
        views = require(batch, "global_views")
        masked_views, local_views = self._check_views(batch, views)
        predictions: dict[str, Any] = {"metrics": {}}
        passes = [ViewBatch(views[:, 0], rows="all" if self.do_recon else "cls+sparse")]
        if self.do_masking:
            if keep_indices is None:
                keep_indices = random_keep_indices(
                    views.shape[0] * self.num_masks,
                    self.encoder.grid(views[:, 0]),
                    self.masking_ratio,
                    focal_mode=self.focal_mode,
                    focal_probability=self.focal_probability,
                    generator=generator,
                    device=views.device,
                )
            predictions["keep_indices"] = keep_indices
            passes.append(ViewBatch(self._augment(masked_views.flatten(0, 1), generator), keep_indices, "cls+sparse"))
        if self.do_cls and self.do_cropping:
            passes.append(ViewBatch(self._augment(local_views.flatten(0, 1), generator), rows="cls"))
        trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):  # a frozen encoder keeps nothing for later
            clean, *others = self.encoder(passes)  # one pass over all views
        masked = others.pop(0) if self.do_masking else None

        if self.do_recon:
            self._reconstruction(predictions, views[:, 0], clean)
        if self.clustering_head is not None:
            teacher = None if self.teacher is None else self._teacher_targets(views[:, 1])
            self._sparse_losses(predictions, clean, masked, teacher)
            if self.cls_cluster_head is not None:
                self._cls_losses(predictions, clean, [output for output in (masked, *others) if output], teacher)
        if self.do_koleo:
            spread = [clean.sparse] if masked is None else [clean.sparse, masked.sparse]
            loss = sum(koleo(sparse, min_distance=self.koleo_min_distance) for sparse in spread)
            predictions["koleo_loss"] = KOLEO_WEIGHT * loss
        return predictions

    def loss(self, predictions: Mapping[str, Any]) -> Loss:
        """The total and its named parts.

        Args:
            predictions: of a training forward.

        Returns:
            `Loss(total, parts)`: total = 10 MSE, or 0.05 VQ-CE, plus every name that contains "loss"; parts are those
            terms, the reconstruction unweighted.
        """
        parts = {name: value for name, value in predictions.items() if "loss" in name}
        terms = list(parts.values())
        for name, weight in (("MSE", PIXEL_WEIGHT), ("VQ-CE", CODE_WEIGHT)):
            if name in predictions:
                parts[name] = predictions[name]
                terms.append(weight * predictions[name])
        return Loss(functools.reduce(torch.add, terms) if terms else torch.zeros(()), parts)

    def _check_views(self, batch: Mapping[str, Tensor], views: Tensor) -> tuple[Tensor, Tensor]:
        """The masked and the local views, as many as are used."""
        if views.dim() != 5:
            raise ValueError(f"global_views must be (B, V, 3, H, W) but has shape {tuple(views.shape)}")
        needed = max(self.num_masks if self.do_masking else 1, 2 if self.teacher is not None else 1)
        if views.shape[1] < needed:
            reason = "the teacher sees view 1" if needed > self.num_masks else f"num_masks is {self.num_masks}"
            raise ValueError(f"global_views has {views.shape[1]} views but the model needs {needed}: {reason}")
        if not views.shape[0]:
            raise ValueError("global_views has 0 images: a training step needs at least 1")
        patch = self.encoder.config.patch_size
        masked = views[:, : self.num_masks]
        check_images(views[:, :needed].flatten(0, 1), patch, "global_views")
        if not (self.do_cls and self.do_cropping):
            return masked, masked[:, :0]
        local = require(batch, "local_views")
        if local.dim() != 5 or local.shape[0] != views.shape[0]:
            raise ValueError(f"local_views must be ({views.shape[0]}, L, 3, h, w) but has shape {tuple(local.shape)}")
        if local.shape[1] < self.num_local_crops:
            raise ValueError(f"local_views has {local.shape[1]} views but num_local_crops is {self.num_local_crops}")
        local = local[:, : self.num_local_crops]
        check_images(local.flatten(0, 1), patch, "local_views")
        return masked, local

    def _augment(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        dtype = self.encoder.pos_embed.dtype
        return images if self.color_augment is None else self.color_augment(to_unit_range(images, dtype), generator)

    def _reconstruction(self, predictions: dict[str, Any], clean: Tensor, output: ViewOutput) -> None:
        assert self.decoder is not None and output.query is not None and output.key is not None
        grid, patch = self.encoder.grid(clean), self.encoder.config.patch_size
        where = Localizer(output.query, output.key, self.encoder.spatial_temp)
        x_hat, spatial = self.decoder(output.sparse, where, grid)
        predictions["metrics"]["token_entropy"] = token_entropy(spatial)
        clean = clean[..., : grid[0] * patch, : grid[1] * patch]
        target = to_unit_range(clean, torch.promote_types(output.cls.dtype, torch.float32))
        predictions["x_original"] = target
        predictions["x_hat"] = x_hat
        if self.tokenizer is None:
            predictions["MSE"] = F.mse_loss(at_least_fp32(x_hat), target)
            return
        step = self.tokenizer.config.downscale
        if step != patch:  # so that there is one code a patch
            target = F.interpolate(target, size=(grid[0] * step, grid[1] * step), mode="bicubic", align_corners=False)
        codes = predictions["vq_codes"] = self.tokenizer.encode(target).flatten(1)
        predictions["VQ-CE"] = F.cross_entropy(at_least_fp32(x_hat).flatten(0, 1), codes.flatten())

    @torch.no_grad()
    def _teacher_targets(self, view: Tensor) -> Targets:
        assert self.teacher is not None
        cls, tokens, *_ = self.teacher.encoder([ViewBatch(view, rows="cls+sparse")])[0]
        head, cls_head = self.teacher.clustering_head, self.teacher.cls_cluster_head
        sparse = head.assign(head.features(tokens))
        return Targets(tokens, sparse, None if cls_head is None else cls_head.assign(cls_head.features(cls)))

    def _sparse_losses(
        self, predictions: dict[str, Any], clean: ViewOutput, masked: ViewOutput | None, teacher: Targets | None
    ) -> None:
        """The sparse tokens' losses: those of the clean view, and those of masked views against the matched targets."""
        assert self.clustering_head is not None and clean.sparse is not None
        head, metrics = self.clustering_head, predictions["metrics"]
        rows = [output.sparse.flatten(0, 1) for output in (clean, masked) if output and output.sparse is not None]
        sizes = [len(x) for x in rows]
        features = head.features(torch.cat(rows))
        if teacher is None:
            tokens, assignment = clean.sparse.detach(), head.assign(features[: sizes[0]])
            index = [torch.arange(sizes[0], device=tokens.device)]
        else:
            tokens, assignment = teacher.tokens, teacher.sparse
            matched = match(clean.sparse[:, None], tokens, self.hungarian_match)
            predictions["match_index_clean"] = matched[:, 0]
            index = [target_rows(matched)]
        if masked is not None and masked.sparse is not None:
            matched = match(masked.sparse.unflatten(0, (-1, self.num_masks)), tokens, self.hungarian_match)
            predictions["match_index_masked"] = matched.flatten(0, 1)
            metrics["matched_tokens"] = matched_tokens(matched)
            index.append(target_rows(matched))
        losses = head.cross_entropy(features, assignment.targets, torch.cat(index), sizes)
        predictions |= zip(("clustering_loss", "mask_loss"), losses.unbind(), strict=False)
        metrics["target_entropy"], metrics["prototypes_used"] = assignment.metrics()

    def _cls_losses(
        self, predictions: dict[str, Any], clean: ViewOutput, others: list[ViewOutput], teacher: Targets | None
    ) -> None:
        """The CLS tokens' losses: that of the clean view, and the sum of what masked and local views have."""
        assert self.cls_cluster_head is not None
        head, metrics = self.cls_cluster_head, predictions["metrics"]
        rows = [output.cls.flatten(0, -2) for output in (clean, *others)]
        sizes, num_images = [len(x) for x in rows], len(rows[0])
        features = head.features(torch.cat(rows))
        assignment = head.assign(features[:num_images]) if teacher is None else teacher.cls
        assert assignment is not None
        index = torch.cat([image_rows(num_images, size // num_images, features.device) for size in sizes])
        own, *learned = head.cross_entropy(features, assignment.targets, index, sizes).unbind()
        predictions["cls_clustering_loss"] = own
        if learned:
            predictions["cls_loss"] = torch.stack(learned).sum()
        metrics["cls_target_entropy"], metrics["cls_prototypes_used"] = assignment.metrics()


def match(pred_BVKD: Tensor, target_BKD: Tensor, hungarian: bool) -> Tensor:
    """Target token of each predicted token, (B, V, K); without matching token k learns from token k."""
    if hungarian:
        return token_match(pred_BVKD.detach(), target_BKD.detach())
    B, V, K, _ = pred_BVKD.shape
    return torch.arange(K, device=pred_BVKD.device).expand(B, V, K)


def target_rows(index_BVK: Tensor) -> Tensor:
    """Token indices within each image to rows of the (B * K, C) targets, flattened in order (image, view, token)."""
    B, _, K = index_BVK.shape
    return (index_BVK + K * torch.arange(B, device=index_BVK.device)[:, None, None]).flatten()


def image_rows(num_images: int, num_views: int, device: torch.device) -> Tensor:
    """Rows of the (B, C) CLS targets in order (image, view), (B * V,)."""
    return torch.arange(num_images, device=device).repeat_interleave(num_views)


def matched_tokens(index_BVK: Tensor) -> Tensor:
    """Share of the predicted tokens that learn from each of an image's K targets, (K,): 1 / K is evenly."""
    counts = torch.zeros(index_BVK.shape[-1], device=index_BVK.device)
    index = index_BVK.flatten()
    return counts.scatter_add_(0, index, torch.ones_like(index, dtype=counts.dtype)) / index.numel()


def token_entropy(spatial_BPK: Tensor) -> Tensor:
    """Entropy in nats of how an image's patches are shared out among its tokens: log K is evenly, 0 is all to one."""
    return torch.special.entr(spatial_BPK.detach().float().mean(dim=1)).sum(dim=-1).mean()


def require(batch: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in batch:
        raise ValueError(f"the batch has no {name!r}, only {', '.join(map(repr, batch))}")
    return batch[name]
