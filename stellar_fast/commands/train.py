"""`stellar-fast train` and `train-decoder`: one flag for every field of TrainConfig."""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Annotated, Any

import typer
import yaml

from stellar_fast.commands.console import console, fail
from stellar_fast.train.config import TrainConfig, resolve_device

DECODER_EPOCHS = 20.0  # of the published probe, a fresh decoder on frozen features


def train(config: str | None, resume: bool, **flags: Any) -> None:
    """Train a model on a folder of images.

    Example: [cyan]stellar-fast train --data photos --preset tiny --out runs/first[/]

    Options may stand in a YAML file too (with _ for -); those given here win.

    Ctrl-C saves and prints the line that continues.

    On several GPUs: [cyan]torchrun --nproc-per-node 8 -m stellar_fast.cli train ...[/]
    """
    _run(TrainConfig.load(config, **_given(flags)), resume)


def train_decoder(config: str | None, resume: bool, vq_model: str | None, **flags: Any) -> None:
    """Train a fresh decoder on a frozen encoder: what can one see in its features?

    The encoder sees one clean crop an image and stays as it is; the run's weights hold both.

    Example: [cyan]stellar-fast train-decoder --data photos --weights runs/first --out runs/decoder[/]

    Options may stand in a YAML file too (with _ for -); those given here win.

    Ctrl-C saves and prints the line that continues.
    """
    given = _given(flags) | {"decoder_only": True}
    if vq_model:
        given["model"] = {"vq_model": vq_model}
    _run(TrainConfig.load(config, defaults={"epochs": DECODER_EPOCHS}, **given), resume)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The fields of TrainConfig that stand on the command line."""
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    for f in dataclasses.fields(TrainConfig):
        if f.name in given and str(f.type).startswith("dict"):
            given[f.name] = _table(f.name, given[f.name])
    return given


def _run(settings: TrainConfig, resume: bool) -> None:
    resolve_device(settings.device)

    from stellar_fast.train import NonFiniteLossError, RichProgress
    from stellar_fast.train import train as run

    try:
        result = run(settings, resume=resume, loggers=[RichProgress(console, settings.log_every)])
    except NonFiniteLossError as error:
        fail(str(error), code=1)
    if os.environ.get("RANK", "0") != "0":
        return
    skipped = f", {result.skipped_steps} skipped" if result.skipped_steps else ""
    console.print(
        f"{'stopped at' if result.resume_command else 'finished'} step {result.step}{skipped}: "
        f"{result.images_per_second:.1f} images/s in {result.seconds:.0f} s\ncheckpoint {result.checkpoint}",
        soft_wrap=True,
        highlight=False,
    )
    if result.resume_command:
        console.print(f"continue with\n  {result.resume_command}", soft_wrap=True, highlight=False, markup=False)


def _signature(
    more: dict[str, Any], without: tuple[str, ...], helps: dict[str, str], defaults: dict[str, Any]
) -> inspect.Signature:
    """The options of a command that trains: one for every field of TrainConfig, absent unless given.

    `more` are options by name; `helps` and `defaults` say where a command differs from TrainConfig.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    config = typer.Option(help="YAML file with any of the options below.")
    resume = typer.Option("--resume", help="Continue from the newest good checkpoint in --out.")
    parameters = [
        inspect.Parameter("config", keyword, default=None, annotation=Annotated[str | None, config]),
        inspect.Parameter("resume", keyword, default=False, annotation=Annotated[bool, resume]),
    ]
    kinds: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool}
    for f in dataclasses.fields(TrainConfig):
        if f.name in without:
            continue
        table, default = str(f.type).startswith("dict"), defaults.get(f.name, f.default)
        option = typer.Option(
            help=helps.get(f.name, f.metadata["help"]) + ("" if table or default == "" else f" [dim]\\[{default}][/]"),
            show_default=False,
            rich_help_panel=f.metadata["section"],
            metavar="KEY=VALUE" if table else None,
        )
        kind = list[str] if table else kinds[str(f.type)]
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(f.name, keyword, default=None, annotation=annotation))
    for name, option in more.items():
        parameters.append(inspect.Parameter(name, keyword, default=None, annotation=Annotated[str | None, option]))
    return inspect.Signature(parameters)


def _table(name: str, pairs: list[str]) -> dict[str, Any]:
    """`["a=1", "b=x"]` as {"a": 1, "b": "x"}; values are read as YAML."""
    table = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--{name} takes KEY=VALUE, got {pair!r}")
        try:
            table[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--{name} {key.strip()} is not a YAML value: {value!r}") from None
    return table


_VQ_MODEL = typer.Option(
    help="Train a head over the codes of this MaskGIT-VQGAN instead of one over pixels.", rich_help_panel="Model"
)
_DECODER_HELPS = {
    "preset": "Which model, where the weights hold several or name none: b16, l16, h16.",
    "decoder": "Changes to the published decoder (6 layers of width 512), e.g. num_hidden_layers=2.",
    "weights": "Of the encoder: folder, run, checkpoint, weights file or hub id.",
}
_SIGNATURES: dict[Any, inspect.Signature] = {
    train: _signature({}, ("decoder_only",), {}, {}),
    train_decoder: _signature(
        {"vq_model": _VQ_MODEL},
        ("decoder_only", "encoder", "model"),
        _DECODER_HELPS,
        {"epochs": DECODER_EPOCHS},
    ),
}
for _command, _options in _SIGNATURES.items():
    _command.__signature__ = _options
    _command.__annotations__ = {p.name: p.annotation for p in _options.parameters.values()}
