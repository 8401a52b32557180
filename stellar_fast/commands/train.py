"""`stellar-fast train`: one flag for every field of TrainConfig."""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Annotated, Any

import typer
import yaml

from stellar_fast.commands.console import console, fail
from stellar_fast.train.config import TrainConfig, resolve_device


def train(config: str | None, resume: bool, **flags: Any) -> None:
    """Train a model on a folder of images.

    Example: [cyan]stellar-fast train --data photos --preset tiny --out runs/first[/]

    Options may stand in a YAML file too (with _ for -); those given here win.

    Ctrl-C saves and prints the line that continues.

    On several GPUs: [cyan]torchrun --nproc-per-node 8 -m stellar_fast.cli train ...[/]
    """
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    for f in dataclasses.fields(TrainConfig):
        if f.name in given and str(f.type).startswith("dict"):
            given[f.name] = _table(f.name, given[f.name])
    settings = TrainConfig.load(config, **given)
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


def _train_signature() -> inspect.Signature:
    """The options of `train`: one for every field of TrainConfig, absent unless given."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    config = typer.Option(help="YAML file with any of the options below.")
    resume = typer.Option("--resume", help="Continue from the newest good checkpoint in --out.")
    parameters = [
        inspect.Parameter("config", keyword, default=None, annotation=Annotated[str | None, config]),
        inspect.Parameter("resume", keyword, default=False, annotation=Annotated[bool, resume]),
    ]
    kinds: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool}
    for f in dataclasses.fields(TrainConfig):
        table = str(f.type).startswith("dict")
        option = typer.Option(
            help=f.metadata["help"] + ("" if table or f.default == "" else f" [dim]\\[{f.default}][/]"),
            show_default=False,
            rich_help_panel=f.metadata["section"],
            metavar="KEY=VALUE" if table else None,
        )
        kind = list[str] if table else kinds[str(f.type)]
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(f.name, keyword, default=None, annotation=annotation))
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


train.__signature__ = _train_signature()  # type: ignore[attr-defined]
train.__annotations__ = {p.name: p.annotation for p in train.__signature__.parameters.values()}  # type: ignore[attr-defined]
