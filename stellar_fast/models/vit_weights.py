"""Starting an encoder from a plain ViT: Hugging Face's ViT, ViT-MAE and DINOv2, timm, and checkpoints of DINO."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_fast.files import shown
from stellar_fast.models.weight_files import WEIGHT_SUFFIXES, hub_id, load_tensors
from stellar_fast.models.weights import (
    CONTAINERS,
    DEEPEST,
    VIT_NAMES,
    Transfer,
    WeightsMismatchError,
    about,
    listed,
    renamed,
    unwrapped,
)

_TIMM = [
    (r"cls_token", ("cls_token",)),
    (r"pos_embed", ("pos_embed",)),
    (r"patch_embed\.(\w+)", (r"patch_embed.proj.\1",)),
    (r"transformer\.norm\.(\w+)", (r"norm.\1",)),
    (r"transformer\.blocks\.(.+)", (r"blocks.\1",)),
]
_PATCH_EMBED = re.compile(r"((?:.+\.)?)(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight")

# Other names of what the rules know: blocks in chunks of FSDP, which count on; Hugging Face's DINOv2; DeiT III.
_ALIASES = [
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"^(encoder\.layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"^(encoder\.layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"^(encoder\.layer\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"^(encoder\.layer\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
    (r"\.(?:layer_scale|ls)([12])\.(?:lambda1|gamma)$", r".gamma_\1"),
]
# what a gamma scales, by its number and the kind of names
_SCALED = {
    ("blocks", "1"): "attn.proj",
    ("blocks", "2"): "mlp.fc2",
    ("encoder.layer", "1"): "attention.output.dense",
    ("encoder.layer", "2"): "output.dense",
}
# what belongs to a trunk, whichever names it has, and what a trunk may have without an effect here
_TRUNK = (
    "blocks.",
    "encoder.layer.",
    "embeddings.",
    "norm.",
    "norm_pre.",
    "layernorm.",
    "patch_embed.",
    "rel_pos",
    "rope",
)
_UNUSED = ("embeddings.mask_token",)
# parts that take part in every block or token, and that this encoder does not have
_ABSENT = (
    (r"(reg_token|register_tokens)$", "register tokens"),
    (r"(dist_token|distillation_token)$", "a distillation token"),
    (r"\.mlp\.(w1|w2|w3|w12|weights_in|fc1_g|fc1_x)\.", "a SwiGLU"),
    (r"\.(q_norm|k_norm)\.", "norms of queries and keys"),
)


def load_vit_state_dict(vit: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Start the trunk of an encoder from a plain ViT: Hugging Face ViT, ViT-MAE or DINOv2, timm, MAE, DINO, DINOv2.

    A training checkpoint is taken as it is; of a student and a teacher, the teacher. The sparse tokens and the
    projections keep their values; heads and decoders in the file are ignored. LayerScale is multiplied into the weights
    before it, which is the same function. A position table of another square grid is resized bicubically; it may be
    (P, D) or (1, P, D) without an entry of the class token, whose position is then zero.

    Raises:
        WeightsMismatchError: a missing or misshapen tensor, one of a trunk that is not this one (more layers, register
            tokens, SwiGLU), several trunks, or a position table that is not square. Nothing was loaded then.
        ValueError: values that are NaN or infinite.
    """
    tensors = _trunk(state_dict)
    for pattern, part in _ABSENT:
        found = [name for name in tensors if re.search(pattern, name)]
        if found:
            raise WeightsMismatchError(
                f"the weights are of a trunk with {part}, which this one has not: {listed(found)}"
            )
    _fold_layer_scale(tensors)
    rules = _TIMM if any(name.startswith("blocks.") for name in tensors) else VIT_NAMES
    if "norm.weight" not in tensors and "fc_norm.weight" in tensors:  # timm's pooled classifiers rename the last norm
        tensors |= {"norm.weight": tensors["fc_norm.weight"], "norm.bias": tensors["fc_norm.bias"]}
    transfer = Transfer(tensors)
    for ours, tensor in vit.state_dict(keep_vars=True).items():
        ours = unwrapped(ours)
        names = next((tuple(m.expand(n) for n in ns) for p, ns in rules if (m := re.fullmatch(p, ours))), ())
        if ours == "pos_embed" and isinstance(given := tensors.get(names[0]), Tensor) and given.is_floating_point():
            tensors[names[0]] = _position(names[0], given, tensor.shape)
        if names:
            transfer.take(tensor, names, optional=ours.startswith("pooler_"))
    transfer.unexpected = sorted(name for name in tensors if name.startswith(_TRUNK) and name not in _UNUSED)
    transfer.check()
    transfer.fill()


def _trunk(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the one trunk in a state dict or a checkpoint, under names that the rules know."""
    entries = dict(_leaves(state_dict))
    names = {name: unwrapped(name) for name in entries}
    if any(re.search(r"(^|\.)sparse_tokens$", name) for name in names.values()):
        raise WeightsMismatchError("the weights are of a STELLAR model, not of a plain ViT: from_pretrained loads them")
    prefixes = list({match[1]: None for name in names.values() if (match := _PATCH_EMBED.fullmatch(name))})
    if len(prefixes) > 1:
        teachers = [prefix for prefix in prefixes if "teacher" in prefix.split(".")]
        prefixes = teachers or [prefix for prefix in prefixes if prefix.split(".")[0] in ("", *CONTAINERS)] or prefixes
    if len(prefixes) > 1:
        raise WeightsMismatchError(
            f"the weights hold {len(prefixes)} trunks, under {listed(prefixes)}: give those of one"
        )
    prefix = prefixes[0] if prefixes else ""
    return renamed(entries, {name: _alias(n.removeprefix(prefix)) for name, n in names.items() if n.startswith(prefix)})


def _leaves(entries: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """What a checkpoint holds, by dotted names; other keys than text are an optimizer's. A file may hold itself."""
    for name, value in entries.items():
        if isinstance(name, str) and isinstance(value, Mapping):
            if depth < DEEPEST:
                yield from _leaves(value, f"{prefix}{name}.", depth + 1)
        elif isinstance(name, str):
            yield prefix + name, value


def _alias(name: str) -> str:
    for pattern, known in _ALIASES:
        name = re.sub(pattern, known, name)
    return name


def _fold_layer_scale(tensors: dict[str, Any]) -> None:
    """gamma * (W x + b) is (gamma W) x + gamma b: multiply every LayerScale into the linear before it."""
    for name in list(tensors):
        match = re.fullmatch(r"((blocks|encoder\.layer)\.\d+)\.gamma_([12])", name)
        if not match:
            continue
        linear = f"{match[1]}.{_SCALED[match[2], match[3]]}"
        names = name, f"{linear}.weight", f"{linear}.bias"
        given = [t for n in names if isinstance(t := tensors.get(n), Tensor) and t.is_floating_point()]
        if len(given) == 3 and given[0].shape == given[1].shape[:1] == given[2].shape:  # else told where it is missed
            gamma, weight, bias = (t.double() for t in given)
            tensors[names[1]] = (gamma[:, None] * weight).to(given[1].dtype)
            tensors[names[2]] = (gamma * bias).to(given[2].dtype)
            del tensors[name]


def _position(name: str, given: Tensor, shape: torch.Size) -> Tensor:
    """A position table as (1, 1 + P, D) of the wanted shape; one of another width comes back as it is."""
    table = given[None] if given.dim() == 2 else given
    if table.dim() == 4 and table.shape[1] == table.shape[2]:
        table = table.flatten(1, 2)
    if table.dim() not in (3, 4) or table.shape[0] != 1 or table.shape[-1] != shape[2]:
        return given
    rows, new = table.shape[1], math.isqrt(shape[1] - 1)
    has_class = rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1
    old = math.isqrt(rows - 1 if has_class else rows)
    if table.dim() == 4 or not rows or rows != old * old + has_class:
        raise WeightsMismatchError(
            f"{name} is {tuple(given.shape)}: no square grid of patches, with or without one entry of the class token "
            f"(entries of register tokens are not read), but the model needs {tuple(shape)}, a grid of {new} x {new}"
        )
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    cls, patches = (table[:, :1], table[:, 1:]) if has_class else (torch.zeros_like(table[:, :1]), table)
    if old != new:
        patches = patches.unflatten(1, (old, old)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(new, new), mode="bicubic", align_corners=False).flatten(2).mT
    return torch.cat((cls, patches), dim=1)


def start_from_vit(vit: nn.Module, source: str | os.PathLike[str]) -> None:
    """`load_vit_state_dict` of a weights file, a directory with one, or a hub repository.

    Raises:
        FileNotFoundError: none of these.
        ValueError: an empty or unreadable source.
        WeightsMismatchError: weights that do not fit; the file is named.
    """
    path = _vit_file(source)
    tensors = load_tensors(path)
    with about(path):
        load_vit_state_dict(vit, tensors)


def _vit_file(source: str | os.PathLike[str]) -> Path:
    if not os.fspath(source):
        raise ValueError("vit_pretrained is empty: name a file of weights, a folder with one, or a hub id")
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"no model.safetensors or pytorch_model.bin in {shown(path)}")
        return found[0]
    if path.is_file():
        return path
    if len(path.parts) != 2 or path.suffix in WEIGHT_SUFFIXES:
        raise FileNotFoundError(f"vit_pretrained {shown(path)} is neither a file, nor a directory, nor a hub id")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with hub_id(str(source)):
        try:
            return Path(hf_hub_download(str(source), "model.safetensors"))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return Path(hf_hub_download(str(source), "pytorch_model.bin"))
