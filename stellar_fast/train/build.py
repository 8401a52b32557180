"""From a TrainConfig to the model and the data."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, TypeVar

from torch.utils.data import Dataset

from stellar_fast import backend
from stellar_fast.data import ImageFolder, MultiViewDataset, MultiViewTransform
from stellar_fast.models import StellarEncoder, StellarModel
from stellar_fast.models.config import DecoderConfig, EncoderConfig, resolve_preset
from stellar_fast.train.config import TrainConfig, check_keys

Sizes = TypeVar("Sizes", EncoderConfig, DecoderConfig)


def build_model(config: TrainConfig) -> StellarModel:
    """The preset with the configuration's changes, random or with `config.weights`; or a decoder for their encoder."""
    if config.decoder_only:
        return _decoder_on_frozen_encoder(config)
    preset = resolve_preset(config.preset)
    encoder = _replace(preset.encoder, config.encoder, "encoder option")
    # the decoder's own image and patch size shape only an unused embedding, which follows the encoder's unless given
    decoder = _replace(preset.decoder, config.decoder, "decoder option")
    known = [name for name in inspect.signature(StellarModel).parameters if name not in ("encoder", "decoder")]
    _check_model_options(config.model, known)
    model = StellarModel(encoder=encoder, decoder=decoder, **{**preset.model, **config.model})
    if config.weights:
        start = StellarModel.from_pretrained(config.weights)
        model.load_upstream_state_dict(start.upstream_state_dict())
    return model


def _decoder_on_frozen_encoder(config: TrainConfig) -> StellarModel:
    """A fresh decoder, of the published sizes unless `config.decoder` changes them, over a trained encoder."""
    if not config.weights:
        raise ValueError("weights is empty: name those of the encoder that the decoder is for (--weights RUN)")
    if config.encoder:
        raise ValueError(f"the encoder is that of {config.weights}, but encoder options are given: {config.encoder}")
    _check_model_options(config.model, ["vq_model", "num_decoder_layers"])
    sizes = _replace(DecoderConfig(), config.decoder, "decoder option")
    encoder = StellarEncoder.from_pretrained(config.weights, model=config.preset or None)
    arguments: dict[str, Any] = dict.fromkeys(("do_clustering", "do_cls", "do_masking", "do_koleo"), False)
    model = StellarModel(encoder, sizes, **arguments, **config.model)
    model.encoder.requires_grad_(False)
    return model


def build_dataset(config: TrainConfig, model: StellarModel) -> Dataset:
    """Views of the images under `config.data`, as many and as large as the model asks for."""
    if not config.data:
        raise ValueError("data is empty: name a folder of images (--data DIR)")
    backend.pick("crop_resize")  # a request that cannot be met is told here, not by a worker
    masked = model.num_masks if model.do_masking else 1
    transform = MultiViewTransform(
        image_size=model.encoder.config.image_size,
        local_size=model.local_size,
        num_global_views=max(masked, 2 if model.momentum_teacher else 1),
        num_local_views=model.num_local_crops if model.do_cls and model.do_cropping else 0,
    )
    folder = ImageFolder(
        config.data,
        max_failed_share=config.max_unreadable,
        value_range=config.value_range,
        max_pixels=config.max_pixels or None,
    )
    return MultiViewDataset(folder, transform, config.seed)


def _replace(sizes: Sizes, changes: dict[str, Any], what: str) -> Sizes:
    kinds = {f.name: f.type for f in dataclasses.fields(sizes)}
    check_keys(changes, kinds, what)
    for name, value in changes.items():
        _check_kind(name, value, kinds[name])
    return dataclasses.replace(sizes, **changes)


def _check_model_options(options: dict[str, Any], known: list[str]) -> None:
    check_keys(options, known, "model option")
    for name, value in options.items():
        _check_kind(name, value, inspect.signature(StellarModel).parameters[name].annotation)


def _check_kind(name: str, value: Any, annotation: Any) -> None:
    """Raise ValueError where a value from YAML is of no kind that the annotation names."""
    kind = type(value).__name__.removesuffix("Type")  # bool, int, float, str, None, list, dict
    accepted = set(re.findall(r"\w+", str(annotation)))
    if kind not in accepted and not (kind == "int" and "float" in accepted):
        words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "None": "null"}
        expected = " or ".join(word for kind, word in words.items() if kind in accepted)
        raise ValueError(f"{name} must be {expected}, got {value!r}")
