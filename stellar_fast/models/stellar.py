"""StellarModel: encoder, decoder, heads and the losses of one training step.

B images, V masked views an image, K sparse tokens, P patches, C prototypes, D width.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stellar_fast.models.build import FROM_ENCODER, FromEncoder, build_encoder, build_vqgan, with_depth
from stellar_fast.models.config import (
    DecoderConfig,
    EncoderConfig,
    VQGANConfig,
    build_from,
    config_dict,
    resolve_preset,
)
from stellar_fast.models.decoder import Decoder
from stellar_fast.models.encoder import StellarEncoder
from stellar_fast.models.hub import HubMixin
from stellar_fast.models.latents import check_latent
from stellar_fast.models.objective import Objective, require
from stellar_fast.models.output import StellarOutput
from stellar_fast.models.teacher import Teacher
from stellar_fast.models.vit_weights import start_from_vit
from stellar_fast.models.vqgan import VQGAN
from stellar_fast.models.weights import UpstreamWeightsMixin
from stellar_fast.nn.color_augment import ColorAugment
from stellar_fast.nn.masking import FOCAL_MODES
from stellar_fast.nn.prototype_head import PrototypeHead

# model arguments that a preset may set: None in the constructor takes the preset's, else upstream's value
UPSTREAM_SIZES = {
    "num_sparse_tokens": 16,
    "predictor_hidden_dim": 2048,
    "num_clusters": 16384,
    "prototype_dim": 256,
    "num_masks": 8,
    "num_local_crops": 8,
}


# where weights came from, what other saved sizes already say, and what is refused
_NOT_SAVED = (
    "vq_model",
    "vit_pretrained",
    "num_decoder_layers",
    "do_global_align",
    "teacher_momentum_final",
    "teacher_momentum_schedule_steps",
)


class StellarModel(UpstreamWeightsMixin, Objective, HubMixin):
    """STELLAR for pre-training and reconstruction (arXiv 2602.01905), with upstream's constructor names.

    Args:
        encoder: sizes, a preset's name, or a StellarEncoder, whose token count and temperature then rule.
        decoder: sizes; None takes the preset's, else the published ones.
        predictor_hidden_dim: hidden width of the heads' MLP (None: the preset's, else 2048; likewise below).
        vq_model: None trains a head over pixels. A VQGAN, its config (random weights), or the path of its weights
            trains a head over its codes.
        num_sparse_tokens: K (16).
        spatial_temp: temperature of the localization (0.06); None takes a scaled dot product.
        do_koleo, do_recon, do_clustering, do_cls, do_masking: which losses there are.
        num_decoder_layers: overrides the decoder's depth.
        num_clusters: C, prototypes of a head (16384).
        predictor_layers: linears in a head's MLP.
        prototype_dim: width of a prototype (256).
        logits_temp: temperature of the predictions.
        sk_temp, n_sk_iter, sk_scale: temperature, rounds and column exponent of Sinkhorn-Knopp.
        num_masks: V, masked views (8).
        masking_ratio: share of a masked view's patches that is dropped.
        focal_mode: "gaussian", "block" or None.
        focal_probability: share of the masked views that are focused; None: 0.5 for "gaussian", 1 for "block".
        color_augmentation: jitter, grey and blur on masked and local views, drawn per view (upstream draws once per
            batch).
        do_cropping: use local views; they teach CLS alone.
        num_local_crops: local views (8).
        hungarian_match: match tokens by optimal transport; False: token k learns from token k.
        momentum_teacher: targets come from an exponential moving average, see `update_teacher`.
        teacher_momentum: of that average.
        koleo_min_distance: floor of KoLeo's distances; the exact default 0 lets gradients of near-identical tokens
            reach 1e7.
        vit_pretrained: path or hub id of a Hugging Face ViT, ViT-MAE or DINOv2, a timm ViT, or a checkpoint of MAE,
            DINO or DINOv2, to start the trunk from.
        do_global_align, teacher_momentum_final, teacher_momentum_schedule_steps: newer upstream's; anything but the
            defaults raises NotImplementedError.

    Raises:
        ValueError: sizes or names that do not fit; both values are named.
        NotImplementedError: a combination that the method does not define, named.
    """

    _name_prefix = ""

    def __init__(
        self,
        encoder: EncoderConfig | StellarEncoder | str = "b16",
        decoder: DecoderConfig | None = None,
        predictor_hidden_dim: int | None = None,
        vq_model: str | Path | VQGANConfig | VQGAN | None = None,
        *,
        num_sparse_tokens: int | None = None,
        spatial_temp: float | FromEncoder | None = FROM_ENCODER,
        do_koleo: bool = True,
        do_recon: bool = True,
        num_decoder_layers: int | None = None,
        do_clustering: bool = True,
        num_clusters: int | None = None,
        predictor_layers: int = 2,
        prototype_dim: int | None = None,
        do_cls: bool = True,
        logits_temp: float = 0.12,
        sk_temp: float = 0.06,
        n_sk_iter: int = 3,
        sk_scale: float = 1.0,
        do_masking: bool = True,
        num_masks: int | None = None,
        masking_ratio: float = 0.75,
        focal_mode: str | None = "gaussian",
        focal_probability: float | None = None,
        color_augmentation: bool = True,
        do_cropping: bool = True,
        num_local_crops: int | None = None,
        hungarian_match: bool = True,
        momentum_teacher: bool = False,
        teacher_momentum: float = 0.996,
        koleo_min_distance: float = 0.0,
        vit_pretrained: str | Path | None = None,
        do_global_align: bool = False,
        teacher_momentum_final: float | None = None,
        teacher_momentum_schedule_steps: int | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        _refuse_undefined(
            do_global_align=do_global_align,
            teacher_momentum_final=teacher_momentum_final,
            teacher_momentum_schedule_steps=teacher_momentum_schedule_steps,
        )
        if vq_model is not None and not do_recon:
            raise ValueError(f"vq_model {vq_model!r} has no use with do_recon=False")
        if not do_clustering and (do_masking or do_cls or momentum_teacher):
            raise NotImplementedError(
                "do_clustering=False with do_masking, do_cls or momentum_teacher: they need its targets"
            )
        preset: dict[str, Any] = {}
        if isinstance(encoder, str):
            named = resolve_preset(encoder)
            encoder, decoder, preset = named.encoder, decoder or named.decoder, named.model
        size = (
            UPSTREAM_SIZES | preset | {name: arguments[name] for name in UPSTREAM_SIZES if arguments[name] is not None}
        )
        for name, value in size.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1 but is {value}")

        self.encoder = build_encoder(encoder, num_sparse_tokens, size["num_sparse_tokens"], spatial_temp)
        dim = self.encoder.config.hidden_size
        decoder = with_depth(decoder or DecoderConfig(), num_decoder_layers)
        self.tokenizer = build_vqgan(vq_model) if do_recon else None
        num_codes = None if self.tokenizer is None else self.tokenizer.config.num_embeddings
        self.decoder = Decoder(decoder, dim, self.encoder.config.patch_size, num_codes) if do_recon else None

        def head() -> PrototypeHead:
            return PrototypeHead(
                dim,
                size["predictor_hidden_dim"],
                size["prototype_dim"],
                size["num_clusters"],
                predictor_layers,
                temperature=logits_temp,
                sinkhorn={"temperature": sk_temp, "iterations": n_sk_iter, "scale": sk_scale},
            )

        self.clustering_head = head() if do_clustering else None
        self.cls_cluster_head = head() if do_cls else None
        self.color_augment = ColorAugment() if color_augmentation else None
        self.do_koleo, self.do_recon, self.do_clustering, self.do_cls = do_koleo, do_recon, do_clustering, do_cls
        self.do_masking, self.do_cropping, self.hungarian_match = do_masking, do_cropping, hungarian_match
        self.num_masks, self.num_local_crops = size["num_masks"], size["num_local_crops"]
        self.koleo_min_distance = koleo_min_distance
        self.masking_ratio, self.focal_mode, self.focal_probability = masking_ratio, focal_mode, focal_probability
        self.momentum_teacher, self.teacher_momentum = momentum_teacher, teacher_momentum
        _check_ranges(self, logits_temp, sk_temp)
        if vit_pretrained is not None:
            start_from_vit(self.encoder, vit_pretrained)
        self.teacher = None
        if momentum_teacher and self.clustering_head is not None:
            self.teacher = Teacher(self.encoder, self.clustering_head, self.cls_cluster_head)
        self._teacher_is_stale = False
        if not do_recon:  # the localization serves the reconstruction alone: kept in files, not trained
            self.encoder.dense_proj.requires_grad_(False)
            self.encoder.sparse_proj.requires_grad_(False)
        parts = {
            ("decoder.", "decoder_proj.", "reconstruction_head.", "position_embedding."): self.decoder,
            ("tokenizer.",): self.tokenizer,
            ("clustering_head.",): self.clustering_head,
            ("cls_cluster_head.",): self.cls_cluster_head,
            ("teacher_",): self.teacher,
        }
        self._absent_prefixes = tuple(name for names, part in parts.items() if part is None for name in names)
        self._config = {name: value for name, value in arguments.items() if name not in _NOT_SAVED} | {
            "encoder": config_dict(self.encoder.config),
            "decoder": config_dict(decoder),
            "reconstruction": "pixels" if self.tokenizer is None else "codes",
            "spatial_temp": self.encoder.spatial_temp,
            **size,
            "num_sparse_tokens": self.encoder.num_sparse_tokens,
        }

    # ---- configuration

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values; `from_config` rebuilds the model from them."""
        return copy.deepcopy(self._config)

    def config_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes."""
        return self.config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> "StellarModel":
        """Build a model from `config`.

        Raises:
            ValueError: a head over VQ codes without `vq_model`, or an unknown argument.
        """
        if "encoder" not in config:
            raise ValueError(f"the config has no 'encoder', only {', '.join(config) or 'nothing'}")
        arguments = {**config, **overrides}
        codes = arguments.pop("reconstruction", "pixels") == "codes"
        if codes and arguments.get("do_recon", True) and arguments.get("vq_model") is None:
            raise ValueError(
                "this model reconstructs VQ codes: pass vq_model=, the path of the MaskGIT-VQGAN's weights"
            )
        for name, kind in (("encoder", EncoderConfig), ("decoder", DecoderConfig)):
            if isinstance(arguments.get(name), Mapping):
                arguments[name] = build_from(kind, arguments[name], name)
        return build_from(cls, arguments, "model")

    @property
    def local_size(self) -> int:
        """Side of the local views in pixels: 96 at 224, in proportion for other image sizes."""
        return max(self.encoder.config.patch_size, self.encoder.config.image_size * 96 // 224)

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward instead of keeping them."""
        self.encoder.gradient_checkpointing_enable(enable)
        if self.decoder is not None:
            self.decoder.transformer.gradient_checkpointing = enable

    # ---- the teacher

    @torch.no_grad()
    def update_teacher(self, momentum: float | None = None) -> None:
        """Move the teacher: ``m teacher + (1 - m) student`` over all its tensors. Call it before each training step.

        Args:
            momentum: m; None takes `teacher_momentum`. Without a teacher nothing happens.
        """
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1] but is {momentum}")
        if self.teacher is None:
            return
        self.teacher.update(self, self.teacher_momentum if momentum is None else momentum)
        self._teacher_is_stale = False

    # ---- training

    def forward(
        self,
        batch: Mapping[str, Tensor],
        mode: str = "train",
        keep_indices: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Run a training step's forward, or encode.

        Args:
            batch: "train": `global_views` (B, >= V, 3, S, S), whose view 0 is the clean image and the reconstruction
                target, and `local_views` (B, >= L, 3, s, s) where local views are used. "eval": `image` (B, 3, H, W).
                All uint8, or floating in [0, 1]. Views beyond `num_masks` and `num_local_crops` are ignored.
            mode: "train" or "eval".
            keep_indices: (B * V, kept) int64 visible patches in row order (image, view); None draws masks.
            generator: source of the masks and the colour augmentation, on the batch's device. Under torch.compile it
                breaks the graph; without one the global random state is used, which compiles whole.

        Returns:
            {"predictions": ...}. In eval mode a `StellarOutput`. In train mode a dict of 0-dim fp32 losses (`MSE` or
            `VQ-CE`, `clustering_loss`, `cls_clustering_loss`, `mask_loss`, `cls_loss`, `koleo_loss` times its 0.1),
            `x_hat` (B, 3, S, S) or code logits (B, P, codes), `x_original` (B, 3, S, S), `keep_indices`,
            `match_index_masked` (B * V, K), `match_index_clean` (B, K), `vq_codes` (B, P), and `metrics`, a dict
            without gradient: 0-dim `target_entropy` and `prototypes_used`, both also as `cls_...`, and `token_entropy`;
            `matched_tokens` (K,).

        Raises:
            ValueError: an unknown mode, fewer views than asked for, images of a wrong kind.
        """
        if mode == "eval":
            return {"predictions": self.encoder(require(batch, "image"))}
        if mode != "train":
            raise ValueError(f"mode must be 'train' or 'eval' but is {mode!r}")
        if self.teacher is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if self._teacher_is_stale:  # the stack: this forward, two frames of nn.Module's call, the caller
                message = "the teacher was not updated since the last step: call model.update_teacher()"
                warnings.warn(message, stacklevel=4)
            self._teacher_is_stale = True

        return {"predictions": self.training_step(batch, keep_indices, generator)}

    # ---- inference

    @torch.no_grad()
    def encode(self, images: Tensor) -> StellarOutput:
        """Features of images (B, 3, H, W), uint8 or floating in [0, 1]; see `StellarOutput`. No gradient."""
        return self.encoder(images)

    @torch.no_grad()
    def reconstruct(
        self,
        features: Mapping[str, Tensor] | Tensor | None = None,
        spatial: Tensor | None = None,
        *,
        sparse: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """Decode an image from its tokens and their places, edited or not.

        Args:
            features: what `encode`, `drop_tokens`, `swap_tokens` or `blend_tokens` returned; or the sparse tokens
                (B, K, D).
            spatial: (B, P, K); beside features it takes the place of theirs.
            sparse: (B, K, D); likewise.
            grid: patches in height and width; None takes that of `features`, else a square one.

        Returns:
            {"reconstruction": (B, 3, height, width) in [0, 1]}, for a head over VQ codes at the VQGAN's resolution.

        Raises:
            ValueError: no decoder, tokens without places, a grid that does not hold P patches.
        """
        if self.decoder is None:
            raise ValueError("this model was built with do_recon=False and has no decoder")
        if isinstance(features, Mapping):
            grid = grid or getattr(features, "grid", None)
            sparse = features.get("sparse") if sparse is None else sparse
            spatial = features.get("spatial") if spatial is None else spatial
        elif features is not None:
            sparse = features
        if sparse is None or spatial is None:
            raise ValueError("reconstruct needs the features of encode, or sparse and spatial")
        check_latent(sparse, spatial)
        P = spatial.shape[1]
        height, width = grid or (math.isqrt(P), math.isqrt(P))
        if height * width != P:
            raise ValueError(f"spatial has {P} patches but the grid is {height}x{width}: pass grid=(height, width)")
        if sparse.shape[2] != self.encoder.config.hidden_size:
            raise ValueError(f"sparse has width {sparse.shape[2]} but the model has {self.encoder.config.hidden_size}")
        x_hat, _ = self.decoder(sparse, spatial, (height, width))
        if self.tokenizer is None:
            return {"reconstruction": x_hat.clamp(0, 1)}
        return {"reconstruction": self.tokenizer.decode(x_hat.argmax(dim=-1).view(-1, height, width))}


def _refuse_undefined(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value not in (None, False):
            raise NotImplementedError(f"{name}={value!r} is not supported")


def _check_ranges(model: StellarModel, logits_temp: float, sk_temp: float) -> None:
    if model.focal_mode not in FOCAL_MODES:
        raise ValueError(f"focal_mode must be one of {FOCAL_MODES} but is {model.focal_mode!r}")
    if not 0 <= model.masking_ratio < 1:
        raise ValueError(f"masking_ratio must be in [0, 1) but is {model.masking_ratio}")
    if model.focal_probability is not None and not 0 <= model.focal_probability <= 1:
        raise ValueError(f"focal_probability must be in [0, 1] but is {model.focal_probability}")
    if model.koleo_min_distance < 0:
        raise ValueError(f"koleo_min_distance must be at least 0 but is {model.koleo_min_distance}")
    if model.do_koleo and model.encoder.num_sparse_tokens < 2:
        raise ValueError("do_koleo spreads tokens apart and needs 2 of them but num_sparse_tokens is 1")
    if not 0 <= model.teacher_momentum <= 1:
        raise ValueError(f"teacher_momentum must be in [0, 1] but is {model.teacher_momentum}")
    for name, value in (("logits_temp", logits_temp), ("sk_temp", sk_temp)):
        if not value > 0:
            raise ValueError(f"{name} must be positive but is {value}")
