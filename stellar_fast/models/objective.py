"""The objective of a training step: reconstruction, online clustering, masked tokens, CLS, KoLeo.

B images, V views, K sparse tokens, T target rows, C prototypes.
"""

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
from stellar_fast.nn.prototype_head import PrototypeHead
from stellar_fast.ops.koleo import koleo
from stellar_fast.ops.packed_patch_embed import check_images, to_unit_range
from stellar_fast.ops.sinkhorn import SinkhornTargets
from stellar_fast.ops.token_match import token_match

PIXEL_WEIGHT = 10.0
CODE_WEIGHT = 0.05
KOLEO_WEIGHT = 0.1


class Loss(NamedTuple):
    """What a step minimises."""

    total: Tensor
    parts: dict[str, Tensor]


class Targets(NamedTuple):
    """What other views learn: tokens (B, K, D) to match, the assignments of those B K tokens and of the B images."""

    tokens: Tensor
    sparse: SinkhornTargets | None
    cls: SinkhornTargets | None


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
        targets = self._targets(predictions, views, clean)
        if masked is not None:
            self._mask_loss(predictions, masked.sparse, targets)
        if self.do_koleo:
            spread = [clean.sparse] if masked is None else [clean.sparse, masked.sparse]
            loss = sum(koleo(sparse, min_distance=self.koleo_min_distance) for sparse in spread)
            predictions["koleo_loss"] = KOLEO_WEIGHT * loss
        if self.do_cls:
            student_cls = [output.cls for output in (masked, *others) if output is not None]
            if student_cls and targets.cls is not None:
                predictions["cls_loss"] = sum(self._cls_loss(x, targets.cls) for x in student_cls)
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
        total = sum(parts.values(), torch.zeros(()))
        for name, weight in (("MSE", PIXEL_WEIGHT), ("VQ-CE", CODE_WEIGHT)):
            if name in predictions:
                parts[name] = predictions[name]
                total = total + weight * predictions[name]
        return Loss(total, parts)

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
        dtype = self.encoder.patch_embed.weight.dtype
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

    def _targets(self, predictions: dict[str, Any], views: Tensor, clean: ViewOutput) -> Targets:
        """The clean view's losses, and what the other views learn."""
        cls, sparse = clean.cls, clean.sparse
        assert sparse is not None
        if self.clustering_head is None:
            return Targets(sparse.detach(), None, None)
        features, cls_features = self.clustering_head.features(sparse), None
        if self.cls_cluster_head is not None:
            cls_features = self.cls_cluster_head.features(cls)
        clean_index, cls_assignment = None, None
        if self.teacher is None:
            tokens = sparse.detach()
            assignment = self.clustering_head.assign(features)
            if self.cls_cluster_head is not None and cls_features is not None:
                cls_assignment = self.cls_cluster_head.assign(cls_features)
        else:
            with torch.no_grad():
                teacher_cls, tokens, *_ = self.teacher.encoder([ViewBatch(views[:, 1], rows="cls+sparse")])[0]
                head, cls_head = self.teacher.clustering_head, self.teacher.cls_cluster_head
                assignment = head.assign(head.features(tokens))
                if cls_head is not None:
                    cls_assignment = cls_head.assign(cls_head.features(teacher_cls))
            index = match(sparse[:, None], tokens, self.hungarian_match)
            predictions["match_index_clean"] = index[:, 0]
            clean_index = target_rows(index)
        metrics = predictions["metrics"]
        predictions["clustering_loss"] = self.clustering_head.cross_entropy(features, assignment.targets, clean_index)
        metrics["target_entropy"], metrics["prototypes_used"] = assignment.metrics()
        if cls_assignment is None:
            return Targets(tokens, assignment.targets, None)
        assert self.cls_cluster_head is not None and cls_features is not None
        loss = self.cls_cluster_head.cross_entropy(cls_features, cls_assignment.targets)
        predictions["cls_clustering_loss"] = loss
        metrics["cls_target_entropy"], metrics["cls_prototypes_used"] = cls_assignment.metrics()
        return Targets(tokens, assignment.targets, cls_assignment.targets)

    def _mask_loss(self, predictions: dict[str, Any], masked_sparse: Tensor, targets: Targets) -> None:
        assert self.clustering_head is not None and targets.sparse is not None
        index = match(masked_sparse.unflatten(0, (-1, self.num_masks)), targets.tokens, self.hungarian_match)
        predictions["match_index_masked"] = index.flatten(0, 1)
        predictions["metrics"]["matched_tokens"] = matched_tokens(index)
        features = self.clustering_head.features(masked_sparse)
        predictions["mask_loss"] = self.clustering_head.cross_entropy(features, targets.sparse, target_rows(index))

    def _cls_loss(self, cls: Tensor, targets: SinkhornTargets) -> Tensor:
        assert self.cls_cluster_head is not None
        num_images = targets.row.shape[0]
        index = image_rows(num_images, cls.shape[0] // num_images, cls.device)
        return self.cls_cluster_head.cross_entropy(self.cls_cluster_head.features(cls), targets, index)


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
