"""Saving and loading: a directory or hub repository with config.json and safetensors, and upstream's hub manifest."""

import json
import os
from pathlib import Path
from typing import Any

from stellar_fast.checkpoint import find_weights
from stellar_fast.files import shown, write_atomically
from stellar_fast.models.config import PRESETS, DecoderConfig, EncoderConfig, config_dict, resolve_preset
from stellar_fast.models.weight_files import WEIGHT_SUFFIXES, hub_id, load_tensors
from stellar_fast.models.weights import about

try:
    from huggingface_hub import ModelHubMixin
except ImportError:  # the operators and the benchmarks need torch and numpy alone

    class ModelHubMixin:  # type: ignore[no-redef]
        """Stands in where huggingface_hub is not installed: models then build and train, but do not save or load."""

        def __init_subclass__(cls, **_: Any) -> None:
            super().__init_subclass__()

        def save_pretrained(self, *_: Any, **__: Any) -> None:
            raise ImportError("save_pretrained needs huggingface_hub: pip install huggingface_hub")

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            raise ImportError("from_pretrained needs huggingface_hub: pip install huggingface_hub")


CONFIG_KEY = "stellar_fast"  # our sizes sit under one key of config.json, beside whatever else a repository keeps there
WEIGHTS_NAME = "model.safetensors"
UPSTREAM_REPO = "microsoft/STELLAR"
_HUB_KWARGS = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class HubMixin(
    ModelHubMixin,
    library_name="stellar_fast",
    tags=["stellar", "self-supervised", "vision"],
    paper_url="https://arxiv.org/abs/2602.01905",
):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` with upstream's tensor names."""

    def _save_pretrained(self: Any, save_directory: Path) -> None:
        from safetensors.torch import save

        tensors = {name: tensor.cpu() for name, tensor in self.upstream_state_dict().items()}
        write_atomically(save_directory / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
        config = json.dumps({CONFIG_KEY: self.config_dict()}, indent=2)
        write_atomically(save_directory / "config.json", config.encode())

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: Any, pretrained_model_name_or_path: str | Path, model: str | None = None, **kwargs: Any
    ) -> Any:
        """Load a model.

        Args:
            pretrained_model_name_or_path: a directory with config.json and safetensors (`save_pretrained`, a training
                checkpoint, or a copy of upstream's repository), a training run, whose newest good checkpoint is taken,
                a single weights file, or a hub repository.
            model: which model of a manifest or of a bare weights file, e.g. "stellar-b16".
            kwargs: `revision`, `cache_dir`, `force_download`, `local_files_only`, `token` as in huggingface_hub; others
                override the saved arguments of the constructor (`vq_model` has to be given for a head over VQ codes).

        Raises:
            FileNotFoundError: no such path, or nothing at it that the hub gives either.
            ValueError: an empty path, a directory without weights, a run without a good checkpoint, an unreadable file,
                an unknown model name, a config that is not one, a missing `vq_model`, values that are NaN or infinite.
            RuntimeError: missing, unexpected or misshapen tensors, named.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if not name:
            raise ValueError("the path of the weights is empty: name a file, a directory, a training run or a hub id")
        path = Path(find_weights(name))
        if path.is_file():
            return cls._from_files(
                read_config(path.parent / "config.json"), lambda name: path, model, path.stem, kwargs
            )
        if path.is_dir():
            _check_directory(path)
            return cls._from_pretrained(model_id=str(path), model=model, **kwargs)
        if (
            path.suffix in WEIGHT_SUFFIXES
            or len(path.parts) != 2
            or Path(path.parts[0]).is_dir()  # a mistyped path beside an existing folder, not a hub id
            or name.startswith((".", "/", "~"))
        ):
            raise FileNotFoundError(f"{shown(name)} is neither a file, nor a directory, nor a hub id")
        with hub_id(name):
            return super().from_pretrained(name, model=model, **kwargs)

    @classmethod
    def _from_pretrained(cls: Any, *, model_id: str, model: str | None = None, **kwargs: Any) -> Any:
        hub_kwargs = {k: kwargs.pop(k) for k in _HUB_KWARGS if k in kwargs}
        kwargs.pop("config", None)  # the mixin passes on the raw config.json, which is read below
        if Path(model_id).is_dir():

            def locate(name: str) -> Path:
                return Path(model_id) / name
        else:
            from huggingface_hub import hf_hub_download

            def locate(name: str) -> Path:
                return Path(hf_hub_download(model_id, name, **hub_kwargs))

        return cls._from_files(read_config(locate("config.json")), locate, model, None, kwargs)

    @classmethod
    def _from_files(
        cls: Any, config: dict[str, Any], locate: Any, model: str | None, stem: str | None, kwargs: dict[str, Any]
    ) -> Any:
        if CONFIG_KEY in config:
            saved, weights = config[CONFIG_KEY], WEIGHTS_NAME
            if model is not None and config_dict(resolve_preset(model).encoder) != saved.get("encoder"):
                raise ValueError(
                    f"model {model!r} was asked for, but the saved one has other sizes: {saved.get('encoder')}"
                )
        elif "models" in config:
            saved, weights = manifest_config(config["models"], model or stem)
        elif model or (stem and stem.removeprefix("stellar-") in PRESETS):
            saved, weights = preset_config(model or stem or ""), ""
        else:
            if stem:
                load_tensors(locate(""))  # a file that cannot be read says so first
            raise ValueError(
                f"no config.json with {CONFIG_KEY!r} or 'models' beside the weights: name the model= they are of"
            )
        tensors = load_tensors(path := locate(weights))
        instance = cls.from_config(saved, **kwargs)
        with about(path):
            instance.load_upstream_state_dict(tensors)
        return instance.eval()


def _check_directory(path: Path) -> None:
    """ValueError for a directory without a config.json; it says what there is instead."""
    if (path / "config.json").is_file():
        return
    told = f"{shown(path)} is no directory of a model: there is no config.json with {CONFIG_KEY!r} or 'models' in it"
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        raise ValueError(f"{shown(path)} is a training run without a checkpoint yet")
    files = sorted(shown(file) for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    raise ValueError(f"{told}; name the file itself and its model=: {', '.join(files[:5])}" if files else told)


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file gives an empty one.

    Raises:
        ValueError: the file is not a JSON object; its path is named.
    """
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object but holds a {type(config).__name__}")
    for key in (CONFIG_KEY, "models"):
        if key in config and not isinstance(config[key], dict):
            raise ValueError(f"{path}: {key!r} must hold an object but holds a {type(config[key]).__name__}")
    return config


def preset_config(name: str) -> dict[str, Any]:
    """Saved arguments of a preset, for a bare file of published weights (head over VQ codes)."""
    preset = resolve_preset(name)
    return {
        "encoder": config_dict(preset.encoder),
        "decoder": config_dict(preset.decoder),
        "reconstruction": "codes",
        **preset.model,
    }


# upstream derives depth and heads from the width
_DEPTH_AND_HEADS = {768: (12, 12), 1024: (24, 16), 1280: (32, 16)}


def manifest_config(models: dict[str, Any], name: str | None) -> tuple[dict[str, Any], str]:
    """Translate one entry of upstream's hub manifest to saved arguments and the weights' file name.

    Raises:
        ValueError: an unknown name, an unknown width, a reconstruction type that is not "vq".
    """
    name = "stellar-" + (name or "stellar-b16").removeprefix("stellar-")
    if name not in models:
        raise ValueError(f"unknown model {name!r}: the manifest has {', '.join(models)}")
    entry = models[name]
    width = entry["embed_dim"]
    if width not in _DEPTH_AND_HEADS:
        raise ValueError(
            f"{name} has embed_dim {width} but depth and heads are known for {sorted(_DEPTH_AND_HEADS)} only"
        )
    if entry.get("recon_type", "vq") != "vq":
        raise ValueError(f"{name} has recon_type {entry['recon_type']!r} but the known one is 'vq'")
    layers, heads = _DEPTH_AND_HEADS[width]
    encoder = EncoderConfig(width, layers, heads, 4 * width, entry["image_size"], entry["patch_size"])
    config = {
        "encoder": config_dict(encoder),
        "decoder": config_dict(DecoderConfig(num_hidden_layers=entry["num_decoder_layers"])),
        "reconstruction": "codes",
        **{k: entry[k] for k in ("num_sparse_tokens", "spatial_temp", "do_cls", "num_clusters") if k in entry},
    }
    return config, entry["weights"]


def load_stellar(
    model: str = "stellar-b16",
    purpose: str = "encode",
    vq_model: Any = None,
    repo_id: str = UPSTREAM_REPO,
    device: str = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
) -> Any:
    """Load a published model as upstream's `load_stellar` does.

    Args:
        model: name in the repository's manifest, e.g. "stellar-b16", "stellar-l16", "stellar-h16".
        purpose: "encode" (the encoder alone), "reconstruct" (and the decoder), "pretrain" (all heads).
        vq_model: path of the MaskGIT-VQGAN's weights, or a VQGAN; needed to reconstruct and to pre-train.
        repo_id: hub repository, or a directory laid out like it.
        device: where the model goes.
        revision: of the repository.
        local_files_only: do not go to the network.

    Returns:
        StellarModel in eval mode.

    Raises:
        ValueError: an unknown model or purpose, or a missing `vq_model`.
        RuntimeError: missing or unexpected tensors, named.
    """
    from stellar_fast.models.stellar import StellarModel

    parts = {
        "encode": dict.fromkeys(("do_recon", "do_clustering", "do_cls", "do_masking", "do_koleo"), False),
        "reconstruct": dict.fromkeys(("do_clustering", "do_cls", "do_masking", "do_koleo"), False),
        "pretrain": {},
    }
    if purpose not in parts:
        raise ValueError(f"purpose must be one of {', '.join(parts)} but is {purpose!r}")
    if purpose != "encode" and vq_model is None:
        raise ValueError(f"purpose {purpose!r} needs vq_model, the path of the MaskGIT-VQGAN's weights")
    arguments = parts[purpose] | ({} if purpose == "encode" else {"vq_model": vq_model})
    hub = {"revision": revision, "local_files_only": local_files_only}
    return StellarModel.from_pretrained(repo_id, model=model, **hub, **arguments).to(device)


def from_pretrained(path_or_hub_id: str | Path, model: str | None = None, **kwargs: Any) -> Any:
    """Load a `StellarModel`; see `StellarModel.from_pretrained`."""
    from stellar_fast.models.stellar import StellarModel

    return StellarModel.from_pretrained(path_or_hub_id, model=model, **kwargs)
