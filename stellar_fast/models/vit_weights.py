"""Starting an encoder from a plain ViT: Hugging Face ViT and ViT-MAE, and timm."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_fast.models.weights import (
    VIT_NAMES,
    WEIGHT_SUFFIXES,
    Mismatch,
    WeightsMismatchError,
    load_tensors,
    strip_checkpoint,
)

_TIMM = [
    (r"cls_token", ("cls_token",)),
    (r"pos_embed", ("pos_embed",)),
    (r"patch_embed\.(\w+)", (r"patch_embed.proj.\1",)),
    (r"transformer\.norm\.(\w+)", (r"norm.\1",)),
    (r"transformer\.blocks\.(.+)", (r"blocks.\1",)),
]


# what belongs to a trunk, whichever names it has, and what a trunk may have without an effect here
_TRUNK = ("blocks.", "encoder.layer.", "embeddings.", "norm.", "norm_pre.", "layernorm.", "reg_token", "patch_embed.")
_UNUSED = ("embeddings.mask_token",)


def load_vit_state_dict(vit: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Start the trunk of an encoder from a plain ViT: Hugging Face ViT or ViT-MAE, or timm.

    The sparse tokens and the projections keep their values; heads and decoders in the file are ignored; a position
    embedding of another grid is resized bicubically.

    Raises:
        WeightsMismatchError: a missing or misshapen tensor, or one of a trunk that is not this one (more layers, layer
            scale, register tokens); all of them are named. Nothing was loaded then.
    """
    tensors = {re.sub(r"^(model\.|vit\.|base_model\.)+", "", k): v for k, v in strip_checkpoint(state_dict).items()}
    rules = _TIMM if any(name.startswith("blocks.") for name in tensors) else VIT_NAMES
    if "norm.weight" not in tensors and "fc_norm.weight" in tensors:  # timm's pooled classifiers rename the last norm
        tensors |= {"norm.weight": tensors["fc_norm.weight"], "norm.bias": tensors["fc_norm.bias"]}
    wrong, copies = Mismatch(), []
    with torch.no_grad():
        for ours, tensor in vit.state_dict(keep_vars=True).items():
            names = next((tuple(m.expand(n) for n in ns) for p, ns in rules if (m := re.fullmatch(p, ours))), ())
            for part, name in zip(tensor.detach().chunk(max(len(names), 1)), names, strict=False):
                given = tensors.pop(name, None)
                if given is not None and ours == "pos_embed" and given.shape != part.shape:
                    given = _resize_position(given, part)
                if given is None:
                    if not ours.startswith("pooler_"):
                        wrong.missing.append(name)
                elif given.shape != part.shape:
                    wrong.misshapen.append(f"{name} is {tuple(given.shape)} but the model needs {tuple(part.shape)}")
                else:
                    copies.append((part, given))
        wrong.unexpected = sorted(name for name in tensors if name.startswith(_TRUNK) and name not in _UNUSED)
        if wrong.missing or wrong.misshapen or wrong.unexpected:
            raise WeightsMismatchError(wrong.message())
        for part, given in copies:
            part.copy_(given)


def _resize_position(given: Tensor, like: Tensor) -> Tensor:
    """Resize a square position table (1, 1 + side^2, D); one that is not square comes back as it is."""
    old, new = round((given.shape[1] - 1) ** 0.5), round((like.shape[1] - 1) ** 0.5)
    if given.dim() != 3 or given.shape[2] != like.shape[2] or old * old != given.shape[1] - 1:
        return given
    patches = given[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat((given[:, :1].float(), patches.flatten(2).mT), dim=1)


def read_vit_weights(source: str | Path) -> dict[str, Tensor]:
    """Tensors of a plain ViT: a weights file, a directory with one, or a hub repository.

    Raises:
        FileNotFoundError: none of these.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"no model.safetensors or pytorch_model.bin in {path}")
        path = found[0]
    elif not path.is_file():
        if len(path.parts) != 2 or path.suffix in WEIGHT_SUFFIXES:
            raise FileNotFoundError(f"vit_pretrained {source} is neither a file, nor a directory, nor a hub id")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(str(source), "model.safetensors"))
        except EntryNotFoundError:
            path = Path(hf_hub_download(str(source), "pytorch_model.bin"))
    return load_tensors(path)
