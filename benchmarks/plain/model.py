"""STELLAR with one pass per kind of view: clean, masked, local.

Letters: B images, V views an image, P patches, K sparse tokens, D width, H decoder width, C prototypes.
Module names are upstream's, so that its state dict loads with strict=True.
"""

import copy
import math
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain.objectives import koleo, match_tokens, sinkhorn, soft_cross_entropy
from benchmarks.plain.vqgan import PlainVQGAN

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.attention[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.output["dense"](y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.attention = Attention(width, heads)
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, mlp_width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp_width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


class Embeddings(nn.Module):
    def __init__(self, width: int, patch_size: int, image_size: int) -> None:
        super().__init__()
        self.grid = image_size // patch_size
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.randn(1, 1 + self.grid**2, width) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """[CLS, patches] with positions, (B, 1 + P, D)."""
        patches = self.patch_embeddings["projection"](images)
        cls_position, positions = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = patches.shape[-2:]
        if grid != (self.grid, self.grid):
            positions = positions.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False)
            positions = positions.flatten(2).transpose(1, 2)
        patches = patches.flatten(2).transpose(1, 2) + positions
        cls = (self.cls_token + cls_position).expand(len(images), -1, -1)
        return torch.cat([cls, patches], dim=1)


class ViT(nn.Module):
    """A ViT trunk; the pooler (and, in the decoder, the embeddings) are carried for their names and never used."""

    def __init__(self, config: Mapping) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.embeddings = Embeddings(width, config["patch_size"], config["image_size"])
        layers = (
            Layer(width, config["num_attention_heads"], config["intermediate_size"])
            for _ in range(config["num_hidden_layers"])
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.layernorm = nn.LayerNorm(width, eps=1e-12)
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.encoder["layer"]:
            tokens = layer(tokens)
        return self.layernorm(tokens)


class PositionEmbedding(nn.Module):
    """Random Fourier features of the patch centres, (P, H)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, rows: int, columns: int) -> Tensor:
        matrix = self.positional_encoding_gaussian_matrix
        y = (torch.arange(rows, device=matrix.device, dtype=matrix.dtype) + 0.5) / rows
        x = (torch.arange(columns, device=matrix.device, dtype=matrix.dtype) + 0.5) / columns
        y, x = (2 * y - 1).repeat_interleave(columns), (2 * x - 1).repeat(rows)
        # two products and a sum rather than a matmul: autocast would round the angles to bf16
        angle = 2 * math.pi * (x[:, None] * matrix[0] + y[:, None] * matrix[1])
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class Predictor(nn.Module):
    def __init__(self, width: int, hidden: int, out: int, num_layers: int) -> None:
        super().__init__()
        sizes = [width, *[hidden] * (num_layers - 1), out]
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.GELU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ClusteringHead(nn.Module):
    def __init__(self, width: int, hidden: int, prototype_dim: int, num_clusters: int, num_layers: int) -> None:
        super().__init__()
        self.predictor = Predictor(width, hidden, prototype_dim, num_layers)
        self.layer = nn.Linear(prototype_dim, num_clusters, bias=False)
        nn.init.normal_(self.layer.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (..., C) fp32."""
        return self.layer(F.normalize(self.predictor(tokens), dim=-1, eps=1e-7)).float()


class PlainStellar(nn.Module):
    """Encoder, factorisation, decoder, clustering heads and all losses.

    `encoder`, `decoder` and `vqgan` are mappings of sizes (`vqgan=None`: pixel head). The other arguments have
    upstream's names. How many masked and local views there are follows from the batch.
    """

    def __init__(
        self,
        encoder: Mapping,
        decoder: Mapping,
        vqgan: Mapping | None = None,
        *,
        num_sparse_tokens: int = 16,
        spatial_temp: float | None = 0.06,
        num_clusters: int = 16384,
        predictor_layers: int = 2,
        predictor_hidden_dim: int = 2048,
        prototype_dim: int = 256,
        do_cls: bool = True,
        do_cropping: bool = True,
        logits_temp: float = 0.12,
        sk_temp: float = 0.06,
        n_sk_iter: int = 3,
        sk_scale: float = 1.0,
        momentum_teacher: bool = False,
        teacher_momentum: float = 0.996,
    ) -> None:
        super().__init__()
        width, decoder_width, self.patch_size = encoder["hidden_size"], decoder["hidden_size"], encoder["patch_size"]
        self.spatial_temp, self.logits_temp = spatial_temp, logits_temp
        self.sk_temp, self.n_sk_iter, self.sk_scale = sk_temp, n_sk_iter, sk_scale
        self.do_cls, self.do_cropping = do_cls, do_cls and do_cropping
        self.momentum_teacher, self.teacher_momentum = momentum_teacher, teacher_momentum
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

        self.encoder = ViT(encoder)
        self.sparse_tokens = nn.Parameter(torch.randn(num_sparse_tokens, width) / math.sqrt(width))
        self.dense_proj = nn.Linear(width, width)
        self.sparse_proj = nn.Linear(width, width)
        self.decoder_proj = nn.Linear(width, decoder_width)
        self.position_embedding = PositionEmbedding(decoder_width)
        self.decoder = ViT(decoder)
        if vqgan is None:
            self.tokenizer, self.recon_name, self.recon_weight = None, "MSE", 10.0
            self.reconstruction_head = nn.ConvTranspose2d(decoder_width, 3, self.patch_size, stride=self.patch_size)
        else:
            self.tokenizer, self.recon_name, self.recon_weight = PlainVQGAN(**vqgan), "VQ-CE", 0.05
            codebook_size = self.tokenizer.quantize["embedding"].num_embeddings
            self.reconstruction_head = nn.Linear(decoder_width, codebook_size)
        head_sizes = (width, predictor_hidden_dim, prototype_dim, num_clusters, predictor_layers)
        self.clustering_head = ClusteringHead(*head_sizes)
        if do_cls:
            self.cls_cluster_head = ClusteringHead(*head_sizes)
        if momentum_teacher:
            self.teacher_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
            self.teacher_sparse_tokens = nn.Parameter(self.sparse_tokens.detach().clone(), requires_grad=False)
            self.teacher_head = copy.deepcopy(self.clustering_head).requires_grad_(False)
            if do_cls:
                self.teacher_cls_head = copy.deepcopy(self.cls_cluster_head).requires_grad_(False)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """teacher = m teacher + (1 - m) student; call before each step."""
        pairs = [(self.teacher_encoder, self.encoder), (self.teacher_head, self.clustering_head)]
        if self.do_cls:
            pairs.append((self.teacher_cls_head, self.cls_cluster_head))
        teacher, student = [self.teacher_sparse_tokens], [self.sparse_tokens]
        for ours, theirs in pairs:
            teacher += ours.parameters()
            student += theirs.parameters()
        for t, s in zip(teacher, student, strict=True):
            t.lerp_(s, 1 - self.teacher_momentum)

    def run_encoder(
        self, images: Tensor, keep: Tensor | None = None, teacher: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """cls (B, 1, D), dense (B, P or kept, D), sparse (B, K, D) of images in [0, 1]; `keep`: (B, kept)."""
        encoder = self.teacher_encoder if teacher else self.encoder
        sparse_tokens = self.teacher_sparse_tokens if teacher else self.sparse_tokens
        tokens = encoder.embeddings((images - self.mean) / self.std)
        if keep is not None:
            patches = tokens[:, 1:].gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[-1]))
            tokens = torch.cat([tokens[:, :1], patches], dim=1)
        tokens = torch.cat([tokens, sparse_tokens.expand(len(images), -1, -1)], dim=1)
        out, num_sparse = encoder(tokens), len(sparse_tokens)
        return out[:, :1], out[:, 1:-num_sparse], out[:, -num_sparse:]

    def localize(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """Localization matrix (B, P, K): each patch is a distribution over the sparse tokens."""
        a, q = self.dense_proj(dense), self.sparse_proj(sparse)
        if self.spatial_temp is None:
            scale = a.shape[-1] ** -0.5
        else:
            a, q, scale = F.normalize(a, dim=-1, eps=1e-7), F.normalize(q, dim=-1, eps=1e-7), 1 / self.spatial_temp
        return torch.softmax((a @ q.transpose(1, 2)).float() * scale, dim=-1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images (B, 3, H, W) in [0, 1]."""
        cls, dense, sparse = self.run_encoder(images)
        spatial = self.localize(dense, sparse)
        return {
            "cls": cls,
            "dense": dense,
            "sparse": sparse,
            "spatial": spatial,
            "lowrank": spatial @ sparse,
            "peak_dist": spatial.amax(dim=1),
            "concat": torch.cat([sparse, spatial.transpose(1, 2)], dim=-1),
        }

    def decode(self, lowrank: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image (B, 3, H, W), or code logits (B, P, 1024) with the VQ head."""
        tokens = self.decoder(self.decoder_proj(lowrank) + self.position_embedding(*grid))
        if self.tokenizer is None:
            tokens = tokens.transpose(1, 2).unflatten(2, grid)
        return self.reconstruction_head(tokens)

    def reconstruction_target(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The image itself, or its codes (B, P)."""
        if self.tokenizer is None:
            return images
        size = (16 * grid[0], 16 * grid[1])
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        return self.tokenizer.encode(images).flatten(1)

    def assign(self, logits: Tensor) -> Tensor:
        """Sinkhorn targets in the shape of the logits."""
        rows = logits.detach().flatten(0, -2) / self.sk_temp
        return sinkhorn(rows, self.n_sk_iter, self.sk_scale).view_as(logits)

    def forward(self, batch: Mapping[str, Tensor], keep_indices: Tensor) -> dict[str, Tensor]:
        """All predictions and losses of a training step.

        Args:
            batch: `global_views` (B, V, 3, S, S) with the clean image first, `local_views` (B, L, 3, s, s), in [0, 1].
            keep_indices: visible patches (B * V, kept) of the masked views, rows in the order (image, view).
        """
        views = batch["global_views"]
        num_views, clean = views.shape[1], views[:, 0]
        grid = (clean.shape[-2] // self.patch_size, clean.shape[-1] // self.patch_size)
        out: dict[str, Tensor] = {}

        cls, dense, sparse = self.run_encoder(clean)
        out["x_hat"] = self.decode(self.localize(dense, sparse) @ sparse, grid)
        target = self.reconstruction_target(clean, grid)
        if self.tokenizer is None:
            out["x_original"], out["MSE"] = clean, F.mse_loss(out["x_hat"].float(), target)
        else:
            out["x_original"], out["vq_codes"] = clean, target
            out["VQ-CE"] = F.cross_entropy(out["x_hat"].float().flatten(0, 1), target.flatten())

        masked_cls, _, masked_sparse = self.run_encoder(views.flatten(0, 1), keep_indices)
        logits, masked_logits = self.clustering_head(sparse), self.clustering_head(masked_sparse)
        if self.do_cls:
            cls_logits = self.cls_cluster_head(cls)

        if self.momentum_teacher:
            with torch.no_grad():
                teacher_cls, _, teacher_sparse = self.run_encoder(views[:, 1], teacher=True)
                targets = self.assign(self.teacher_head(teacher_sparse))
                cls_targets = self.assign(self.teacher_cls_head(teacher_cls)) if self.do_cls else None
            out["match_index_clean"] = match_tokens(sparse, teacher_sparse)
            clean_targets = take_tokens(targets, out["match_index_clean"])
            reference = teacher_sparse
        else:
            targets = clean_targets = self.assign(logits)
            cls_targets = self.assign(cls_logits) if self.do_cls else None
            reference = sparse

        out["clustering_loss"] = soft_cross_entropy(logits, clean_targets, self.logits_temp)
        index = match_tokens(masked_sparse, reference.repeat_interleave(num_views, dim=0))
        masked_targets = take_tokens(targets, index)
        out["match_index_masked"] = index
        out["mask_loss"] = soft_cross_entropy(masked_logits, masked_targets, self.logits_temp)
        out["koleo_loss"] = 0.1 * koleo(sparse) + 0.1 * koleo(masked_sparse)

        if self.do_cls:
            out["cls_clustering_loss"] = soft_cross_entropy(cls_logits, cls_targets, self.logits_temp)
            out["cls_loss"] = self.cls_view_loss(masked_cls, cls_targets)
            if self.do_cropping:
                local_cls, _, _ = self.run_encoder(batch["local_views"].flatten(0, 1))
                out["cls_loss"] = out["cls_loss"] + self.cls_view_loss(local_cls, cls_targets)
        return out

    def cls_view_loss(self, view_cls: Tensor, cls_targets: Tensor) -> Tensor:
        """Cross-entropy of the CLS tokens (B * V, 1, D) of some views against their image's target (B, 1, C)."""
        logits = self.cls_cluster_head(view_cls).unflatten(0, (len(cls_targets), -1)).squeeze(2)
        return soft_cross_entropy(logits, cls_targets, self.logits_temp)

    def loss(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """The weighted reconstruction plus every entry whose name contains "loss"."""
        total = self.recon_weight * predictions[self.recon_name]
        return total + sum(value for name, value in predictions.items() if "loss" in name)


def take_tokens(targets_BKC: Tensor, index_GK: Tensor) -> Tensor:
    """Targets (G, K, C) of the tokens of G = B * V image-views (V may be 1), picked by a match index."""
    image = torch.arange(len(index_GK), device=index_GK.device) // (len(index_GK) // len(targets_BKC))
    return targets_BKC[image[:, None], index_GK]
