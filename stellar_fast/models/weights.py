"""Tensor names: one table between ours and upstream's, for weights both ways, the teacher and gradients."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")

# our name inside a ViT -> upstream's (Hugging Face's) names; several names share one fused tensor in equal slices of
# dim 0
VIT_NAMES: list[tuple[str, tuple[str, ...]]] = [
    (r"cls_token", ("embeddings.cls_token",)),
    (r"pos_embed", ("embeddings.position_embeddings",)),
    (r"patch_embed\.(\w+)", (r"embeddings.patch_embeddings.projection.\1",)),
    (r"pooler_(\w+)", (r"pooler.dense.\1",)),
    (r"transformer\.norm\.(\w+)", (r"layernorm.\1",)),
    (r"transformer\.blocks\.(\d+)\.norm1\.(\w+)", (r"encoder.layer.\1.layernorm_before.\2",)),
    (r"transformer\.blocks\.(\d+)\.norm2\.(\w+)", (r"encoder.layer.\1.layernorm_after.\2",)),
    (
        r"transformer\.blocks\.(\d+)\.attn\.qkv\.(\w+)",
        tuple(rf"encoder.layer.\1.attention.attention.{x}.\2" for x in ("query", "key", "value")),
    ),
    (r"transformer\.blocks\.(\d+)\.attn\.proj\.(\w+)", (r"encoder.layer.\1.attention.output.dense.\2",)),
    (r"transformer\.blocks\.(\d+)\.mlp\.fc1\.(\w+)", (r"encoder.layer.\1.intermediate.dense.\2",)),
    (r"transformer\.blocks\.(\d+)\.mlp\.fc2\.(\w+)", (r"encoder.layer.\1.output.dense.\2",)),
]
_HEAD: list[tuple[str, tuple[str, ...]]] = [
    (
        r"layers\.(\d+)\.(\w+)",
        (r"predictor.layers.\1.\2",),
    ),  # the index is doubled below: activations are counted there
    (r"prototypes\.weight", ("layer.weight",)),
]


def _under(ours: str, upstream: str, rules: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    return [(re.escape(ours) + pattern, tuple(upstream + name for name in names)) for pattern, names in rules]


# the whole model; first match wins
_TABLE = [
    (r"encoder\.sparse_tokens", ("sparse_tokens",)),
    (r"encoder\.(dense_proj|sparse_proj)\.(\w+)", (r"\1.\2",)),
    *_under("encoder.", "encoder.", VIT_NAMES),
    (r"teacher\.encoder\.sparse_tokens", ("teacher_sparse_tokens",)),
    *_under("teacher.encoder.", "teacher_encoder.", VIT_NAMES),
    *_under("teacher.clustering_head.", "teacher_head.", _HEAD),
    *_under("teacher.cls_cluster_head.", "teacher_cls_head.", _HEAD),
    (r"decoder\.proj\.(\w+)", (r"decoder_proj.\1",)),
    (r"decoder\.head\.(\w+)", (r"reconstruction_head.\1",)),
    (r"decoder\.position\.gaussian_matrix", ("position_embedding.positional_encoding_gaussian_matrix",)),
    (r"decoder\.patch_embed_(\w+)", (r"decoder.embeddings.patch_embeddings.projection.\1",)),
    *_under("decoder.", "decoder.", VIT_NAMES),
    *_under("clustering_head.", "clustering_head.", _HEAD),
    *_under("cls_cluster_head.", "cls_cluster_head.", _HEAD),
    (r"tokenizer\.(.+)", (r"tokenizer.\1",)),
]


def upstream_names(name: str) -> tuple[str, ...]:
    """Upstream's names of one of our tensors, in the order of their slices along dim 0.

    Raises:
        KeyError: a name that the table does not know.
    """
    for pattern, replacements in _TABLE:
        match = re.fullmatch(pattern, name)
        if match:
            names = [match.expand(replacement) for replacement in replacements]
            return tuple(re.sub(r"(?<=predictor\.layers\.)\d+", lambda m: str(2 * int(m[0])), n) for n in names)
    raise KeyError(f"no upstream name for tensor {name!r}")


class WeightsMismatchError(RuntimeError):
    """Weights that do not fit the model; the message names every missing, unexpected and misshapen tensor."""


class LoadReport(NamedTuple):
    """Names that a lenient load left out."""

    missing: list[str]
    unexpected: list[str]


@dataclass
class Mismatch:
    """What of a file does not fit a module."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def message(self) -> str:
        """One line that names every tensor."""
        parts = [
            f"{kind}: {', '.join(names)}"
            for kind, names in (
                ("missing tensors", self.missing),
                ("unexpected tensors", self.unexpected),
                ("misshapen tensors", self.misshapen),
            )
            if names
        ]
        return "the weights do not fit the model; " + "; ".join(parts)


class UpstreamWeightsMixin:
    """Loads and gives weights and gradients under upstream's names. `_name_prefix` is where the module sits
    in a StellarModel."""

    _name_prefix = "encoder."
    _absent_prefixes: tuple[str, ...] = ()  # upstream's names of parts that this module does not have

    def _named_tensors(self: Any) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
        for name, tensor in self.state_dict(keep_vars=True).items():
            yield name, tensor, upstream_names(self._name_prefix + name)

    @torch.no_grad()
    def load_upstream_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Fill the module from tensors under upstream's names.

        Args:
            state_dict: name -> tensor; a training checkpoint (`state_dict` inside, every name prefixed `model.`) is
                understood. Parts that this module was built without stay in the file: an encoder takes its own of a
                whole model's. `tokenizer.*` fills the VQGAN; published files lack it, so it may be absent as a whole.
            strict: raise on missing and unexpected names.

        Returns:
            The missing and the unexpected names, for a load that is not strict.

        Raises:
            WeightsMismatchError: a RuntimeError; a missing, an unexpected or a misshapen tensor, all of them named.
                Nothing was loaded then.
            ValueError: the module is on the meta device.
        """
        tensors = dict(strip_checkpoint(state_dict))
        wrong, copies = Mismatch(), []
        has_tokenizer = any(name.startswith("tokenizer.") for name in tensors)
        for _, ours, names in self._named_tensors():
            if names[0].startswith("tokenizer.") and not has_tokenizer:
                continue
            for part, name in zip(ours.detach().chunk(len(names)), names, strict=True):
                given = tensors.pop(name, None)
                if given is None:
                    wrong.missing.append(name)
                elif given.shape != part.shape:
                    wrong.misshapen.append(f"{name} is {tuple(given.shape)} but the model needs {tuple(part.shape)}")
                else:
                    copies.append((part, given))
        wrong.unexpected = sorted(name for name in tensors if not name.startswith(self._absent_prefixes))
        if wrong.misshapen or (strict and (wrong.missing or wrong.unexpected)):
            raise WeightsMismatchError(wrong.message())
        if any(part.is_meta for part, _ in copies):
            raise ValueError("the model is on the meta device: call model.to_empty(device=...) before loading weights")
        for part, given in copies:
            part.copy_(given)
        for module in self.modules():  # type: ignore[attr-defined]
            if hasattr(module, "reset_constants"):
                module.reset_constants()
        return LoadReport(wrong.missing, wrong.unexpected)

    @torch.no_grad()
    def upstream_state_dict(self) -> dict[str, Tensor]:
        """All tensors but the VQGAN's under upstream's names: contiguous copies, loadable strictly upstream."""
        return {
            name: part.clone(memory_format=torch.contiguous_format)
            for _, ours, names in self._named_tensors()
            if not names[0].startswith("tokenizer.")
            for part, name in zip(_whole(ours.detach()).chunk(len(names)), names, strict=True)
        }

    @torch.no_grad()
    def upstream_gradients(self) -> dict[str, Tensor]:
        """Gradients of the trained parameters under upstream's names; parameters without a gradient are left out."""
        return {
            name: part.clone()
            for _, ours, names in self._named_tensors()
            if ours.grad is not None
            for part, name in zip(_whole(ours.grad).chunk(len(names)), names, strict=True)
        }


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 has sharded, gathered from all processes: each has to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def strip_checkpoint(state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors of a plain state dict or of a training checkpoint, whose names carry the prefix `model.`."""
    for key in ("state_dict", "model"):  # Lightning's layout, and that of MAE's own files
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    if all(name.startswith("model.") for name in state_dict):
        return {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
    return state_dict


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file, or a pickled one with weights_only=True.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds no tensors by name, or that cannot be read; the path is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read weights from {path}: {error}") from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not tensors by name")
    return dict(strip_checkpoint(tensors))
