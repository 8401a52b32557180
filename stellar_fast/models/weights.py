"""Tensor names: one table between ours and upstream's, for weights both ways, the teacher and gradients."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stellar_fast.files import shown

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
        match = re.fullmatch(pattern, unwrapped(name))
        if match:
            names = [match.expand(replacement) for replacement in replacements]
            return tuple(re.sub(r"(?<=predictor\.layers\.)\d+", lambda m: str(2 * int(m[0])), n) for n in names)
    raise KeyError(f"no upstream name for tensor {name!r}: merge or remove adapters and the like first")


class WeightsMismatchError(RuntimeError):
    """Weights that do not fit the model; the message names missing, unexpected and misshapen tensors."""


class LoadReport(NamedTuple):
    """Names that a lenient load left out."""

    missing: list[str]
    unexpected: list[str]


# What torch's wrappers put into names, anywhere: DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Where a training checkpoint keeps the state dict of its model: Lightning, MAE, DeepSpeed, plain loops.
CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
_AVERAGES = ("ema_state_dict", "ema", "model_ema")  # where there is no other
DEEPEST = 8  # containers in each other; a file may hold itself
_LISTED = 5
# what a name tells about the weights, the first that is found
_KINDS = (
    (r"lora_|base_layer\.|parametrizations\.|weight_orig$", "wrapped modules: merge adapters and the like, then save"),
    (r"transformer\.blocks\.", "this package's own modules: load_state_dict takes them"),
    (r"(^|\.)quantize\.embedding\.", "a VQGAN: vq_model= takes it"),
    (r"(^|\.)sparse_tokens$", "a STELLAR model"),
    (r"(^|\.)(patch_embed\.proj|patch_embeddings\.projection)\.", "a plain ViT: vit_pretrained= starts from it"),
)


def unwrapped(name: str) -> str:
    """A tensor's name without what torch's wrappers put into it."""
    return _WRAPPERS.sub("", name)


def fit_names(state_dict: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """The entries of a state dict, or of that in a training checkpoint, under the names that a module wants.

    What torch's wrappers put into names goes, wherever it is, and the prefix behind which most of the wanted names
    stand (`model.`, `net.student.`); names without it stay as they are.

    Raises:
        WeightsMismatchError: two entries for one name, or two prefixes that are equally good.
        ValueError: a name that is no text.
    """
    for _ in range(DEEPEST):
        inner = [state_dict[key] for key in (*CONTAINERS, *_AVERAGES) if isinstance(state_dict.get(key), Mapping)]
        if not inner:
            break
        state_dict = inner[0]
    names = bare_names(state_dict)
    wanted = set(wanted)
    behind = Counter(
        short[: dot + 1] for short in names.values() for dot in _starts(short) if short[dot + 1 :] in wanted
    )
    prefix, count = max(behind.items(), key=lambda item: (item[1], not item[0]), default=("", 0))
    rivals = [other for other, found in behind.items() if found == count]
    if prefix and len(rivals) > 1:
        raise WeightsMismatchError(f"the weights hold the model {len(rivals)} times, under {listed(rivals)}")
    return renamed(state_dict, {name: short.removeprefix(prefix) for name, short in names.items()})


def bare_names(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Each name of a state dict, and what is left of it without torch's wrappers."""
    for name in state_dict:
        if not isinstance(name, str):
            raise ValueError(f"weights have names, but one of these is {name!r}, of type {type(name).__name__}")
    # AveragedModel counts its updates beside the module that it wraps
    return {name: unwrapped(name) for name in state_dict if name != "n_averaged"}


def renamed(state_dict: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A state dict's entries under other names; WeightsMismatchError for two that become one."""
    entries: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, short in names.items():
        if short in origin:
            raise WeightsMismatchError(f"the weights hold {short} twice, as {origin[short]} and as {name}")
        entries[short], origin[short] = state_dict[name], name
    return entries


def _starts(name: str) -> Iterator[int]:
    """Where the parts of a name begin, less one."""
    yield -1
    yield from (i for i, character in enumerate(name) if character == ".")


def listed(names: Sequence[str]) -> str:
    """The first few, and how many there are beside."""
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


@dataclass
class Transfer:
    """Entries of a state dict on their way into a module's tensors: all of them, or none."""

    tensors: dict[str, Any]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    _taken: list[tuple[Tensor, list[tuple[int, str, Tensor]], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._held = list(self.tensors)

    def take(self, ours: Tensor, names: Sequence[str], optional: bool = False) -> None:
        """Note what fills `ours`: the tensors of these names, one after another along dim 0."""
        shape = ours.shape if len(names) == 1 else (ours.shape[0] // len(names), *ours.shape[1:])
        parts = []
        for i, name in enumerate(names):
            given = self.tensors.pop(name, None)
            if given is None:
                self.missing += [] if optional else [name]
            elif not isinstance(given, Tensor):
                self.unfit.append(f"{name} is a {type(given).__name__}, not a tensor")
            elif not given.is_floating_point() or given.layout != torch.strided or given.is_meta:
                kind = "on the meta device" if given.is_meta else f"{given.dtype}, {given.layout}"
                self.unfit.append(f"{name} is {kind}, not dense floating point")
            elif given.shape != shape:
                self.unfit.append(f"{name} is {tuple(given.shape)} but the model needs {tuple(shape)}")
            else:
                parts.append((i, name, given))
        self._taken.append((ours, parts, len(names)))

    def check(self, strict: bool = True) -> None:
        """Raise WeightsMismatchError for what does not fit, ValueError for values that are no numbers."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected} if strict else {}
        wrong = [f"{kind} tensors: {listed(names)}" for kind, names in (kinds | {"unfit": self.unfit}).items() if names]
        if wrong:
            if strict and self.missing:
                wrong.append(f"they hold {len(self._held):,} entries: {listed(self._held) or 'none'}")
            if strict and 2 * len(self.tensors) > len(self._held):  # most were not wanted
                wrong += [f"those look like {kind}" for kind in self._kinds()]
            raise WeightsMismatchError("the weights do not fit the model; " + "; ".join(wrong))
        found = []
        for ours, parts, _ in self._taken:
            limit = torch.finfo(ours.dtype).max
            for _, name, given in parts:
                if count := _beyond(given, limit):
                    found.append(f"{name} ({count:,} of {given.numel():,} values)")
        if found:
            raise ValueError(f"the weights hold NaN, infinity or what their dtype here does not hold: {listed(found)}")

    def _kinds(self) -> list[str]:
        return [kind for pattern, kind in _KINDS if any(re.search(pattern, name) for name in self._held)][:1]

    @torch.no_grad()
    def fill(self) -> None:
        """Copy; what has no entry stays. Call `check` before.

        Raises:
            ValueError: the module is on the meta device.
        """
        if any(parts and ours.is_meta for ours, parts, _ in self._taken):
            raise ValueError("the model is on the meta device: call model.to_empty(device=...) before loading weights")
        for ours, parts, count in self._taken:
            if not parts:
                continue
            whole = _whole(ours.detach())
            slices = whole.chunk(count) if count > 1 else (whole,)
            for i, _, given in parts:
                slices[i].copy_(given)
            if hasattr(ours, "device_mesh"):  # FSDP2 has sharded it: what was filled is a copy
                from torch.distributed.tensor import distribute_tensor

                ours.detach().copy_(distribute_tensor(whole, ours.device_mesh, ours.placements))  # type: ignore[arg-type, attr-defined]


def _beyond(tensor: Tensor, limit: float) -> int:
    """How many values are NaN, or larger than `limit`; one pass over memory where none is."""
    if not tensor.numel():
        return 0
    tensor = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()  # 8-bit formats do not compare
    low, high = (bound.item() for bound in torch.aminmax(tensor))
    if -limit <= low and high <= limit:
        return 0
    return int((~(tensor.abs() <= limit)).sum())


@contextlib.contextmanager
def about(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about weights name the file that they came from."""
    try:
        yield
    except WeightsMismatchError as error:
        raise WeightsMismatchError(f"{shown(path)}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {error}") from None


class UpstreamWeightsMixin:
    """Loads and gives weights and gradients under upstream's names. `_name_prefix` is where the module sits
    in a StellarModel."""

    _name_prefix = "encoder."
    _absent_prefixes: tuple[str, ...] = ()  # upstream's names of parts that this module does not have

    def _named_tensors(self: Any) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
        for name, tensor in self.state_dict(keep_vars=True).items():
            yield name, tensor, upstream_names(self._name_prefix + name)

    def load_upstream_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Fill the module from tensors under upstream's names.

        Args:
            state_dict: name -> tensor. A training checkpoint (the state dict inside, under `state_dict`, `model` or the
                like) is understood, and so are names with what wrappers put before or into them (`module.`, `model.`,
                `_orig_mod.`, in any order). Parts that this module was built without stay in the file: an encoder takes
                its own of a whole model's. `tokenizer.*` fills the VQGAN; published files lack it, so it may be absent
                as a whole.
            strict: raise on missing and unexpected names.

        Returns:
            The missing and the unexpected names, for a load that is not strict.

        Raises:
            WeightsMismatchError: a RuntimeError; missing, unexpected or misshapen tensors, the first of them named, or
                two for one name. Nothing was loaded then, nor by one of the following.
            ValueError: values that are NaN or infinite, or the module is on the meta device.
        """
        named = [(ours, names) for _, ours, names in self._named_tensors()]
        wanted = {name for _, names in named for name in names}
        transfer = Transfer(fit_names(state_dict, wanted))
        has_tokenizer = any(name.startswith("tokenizer.") for name in transfer.tensors)
        for ours, names in named:
            if has_tokenizer or not names[0].startswith("tokenizer."):
                transfer.take(ours, names)
        transfer.unexpected = sorted(name for name in transfer.tensors if not name.startswith(self._absent_prefixes))
        transfer.check(strict)
        transfer.fill()
        return LoadReport(transfer.missing, transfer.unexpected)

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
