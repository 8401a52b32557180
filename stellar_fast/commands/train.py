"""`stellar-fast train` and `train-decoder`: one flag for every field of TrainConfig."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from stellar_fast.commands.console import console, say
from stellar_fast.files import is_ours, shown
from stellar_fast.train.config import TrainConfig, resolve_device

if TYPE_CHECKING:
    from stellar_fast.train import TrainResult

DECODER_EPOCHS = 20.0  # of the published probe, a fresh decoder on frozen features


def train(config: str | None, resume: bool, **flags: Any) -> None:
    """Train a model on a folder of images.

    Example: [cyan]stellar-fast train --data photos --preset tiny --out runs/first[/]

    Options may stand in a YAML file too (with _ for -); those given here win.

    Ctrl-C saves and prints the line that continues; TERM, HUP, USR1, USR2 and XCPU do the same.
    Once more, a second or more later, ends the run at once.

    Exit code 0: finished. 130 and the like, 128 + the signal: stopped, with a checkpoint.
    1: ended early by an error, with a checkpoint of the steps done where one can be written. 2: not begun.

    On several GPUs: [cyan]torchrun --nproc-per-node 8 -m stellar_fast.cli train ...[/]
    """
    _run(lambda: _load(config, resume, _given(flags)), resume)


def train_decoder(config: str | None, resume: bool, vq_model: str | None, **flags: Any) -> None:
    """Train a fresh decoder on a frozen encoder: what can one see in its features?

    The encoder sees one clean crop an image and stays as it is; the run's weights hold both.

    Example: [cyan]stellar-fast train-decoder --data photos --weights runs/first --out runs/decoder[/]

    Options may stand in a YAML file too (with _ for -); those given here win.

    Ctrl-C saves and prints the line that continues; signals and exit codes are those of [cyan]stellar-fast train[/].
    """

    def load() -> TrainConfig:
        given = _given(flags) | {"decoder_only": True}
        if vq_model:
            given["model"] = {"vq_model": vq_model}
        return _load(config, resume, given, defaults={"epochs": DECODER_EPOCHS})

    _run(load, resume)


def _load(config: str | None, resume: bool, given: dict[str, Any], **options: Any) -> TrainConfig:
    """The options of a file, or of the run that is resumed, and over them those that are given.

    Raises ValueError for the file of a run that was copied or moved: it names the first one's folder.
    """
    if not resume:
        return TrainConfig.load(config, **options, **given)

    from stellar_fast.train.run_folder import CHECKPOINTS, CONFIG

    own = Path(given.get("out", ""), CONFIG)
    if config is None and "out" in given and own.is_file() and is_ours(own):
        config = str(own)
    settings = TrainConfig.load(config, **options, **given)
    if config is not None and "out" not in given:
        lies_in, place = Path(config).parent, Path(settings.out)
        if Path(lies_in, CHECKPOINTS).is_dir() and os.path.realpath(lies_in) != os.path.realpath(place):
            raise ValueError(
                f"{shown(config)} lies in a run's folder and names another one, {shown(place)}: say which is to "
                f"continue, --out {shown(lies_in)} or --out {shown(place)}"
            )
    return settings


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The fields of TrainConfig that stand on the command line."""
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    for f in dataclasses.fields(TrainConfig):
        if f.name in given and str(f.type).startswith("dict"):
            given[f.name] = _table(f.name, given[f.name])
    return given


def _run(load: Callable[[], TrainConfig], resume: bool) -> None:
    load = functools.cache(load)  # a file of options may be a pipe
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        resolve_device(load().device)  # told before what follows is imported

    from stellar_fast.train import RichProgress, RunEndedError
    from stellar_fast.train import train as run
    from stellar_fast.train.distributed import process_group
    from stellar_fast.train.errors import RankError
    from stellar_fast.train.loggers import unless_lost

    with process_group() as ranks:
        try:
            settings = ranks.together(load)
            result = run(settings, resume=resume, loggers=[RichProgress(console, settings.log_every)])
        except (RankError, RunEndedError) as error:
            if os.environ.get("STELLAR_FAST_TRACEBACK") == "1":
                raise
            code = 1 if isinstance(error, RunEndedError) else 2
            if ranks.is_main:
                say("[bold red]error:[/]", str(error))
        else:
            code = 128 + result.signal if result.signal else 0
            if ranks.is_main:
                with unless_lost(console):
                    console.print(_summary(result), soft_wrap=True, highlight=False, markup=False)
        ranks.max(0)  # the first has told: once one has ended, a launcher may end the others
    if code:
        raise SystemExit(code)


def _summary(result: TrainResult) -> str:
    skipped = f", {result.skipped_steps} skipped" if result.skipped_steps else ""
    lines = [
        f"{'stopped at' if result.resume_command else 'finished'} step {result.step}{skipped}: "
        f"{result.images_per_second:.1f} images/s in {result.seconds:.0f} s",
        f"checkpoint {shown(result.checkpoint)}",
    ]
    if result.resume_command:
        lines += ["continue with", f"  {result.resume_command}"]
    return "\n".join(lines)


def _signature(
    more: dict[str, Any], without: tuple[str, ...], helps: dict[str, str], defaults: dict[str, Any]
) -> inspect.Signature:
    """The options of a command that trains: one for every field of TrainConfig, absent unless given.

    `more` are options by name; `helps` and `defaults` say where a command differs from TrainConfig.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    config = typer.Option(help="YAML file with any of the options below.")
    resume = typer.Option(
        "--resume",
        help="Continue from the newest good checkpoint in --out; its config.yaml says what is not given here.",
    )
    parameters = [
        inspect.Parameter("config", keyword, default=None, annotation=Annotated[str | None, config]),
        inspect.Parameter("resume", keyword, default=False, annotation=Annotated[bool, resume]),
    ]
    kinds: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool}
    kinds["tuple[float, float] | None"] = tuple[float, float]
    for f in dataclasses.fields(TrainConfig):
        if f.name in without:
            continue
        table, default = str(f.type).startswith("dict"), defaults.get(f.name, f.default)
        option = typer.Option(
            help=helps.get(f.name, f.metadata["help"])
            + ("" if table or default in ("", None) else f" [dim]\\[{default}][/]"),
            show_default=False,
            rich_help_panel=f.metadata["section"],
            metavar="KEY=VALUE" if table else "LO HI" if str(f.type).startswith("tuple") else None,
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
