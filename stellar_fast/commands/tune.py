"""`stellar-fast tune`."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from stellar_fast.commands.console import Progress, console, end_printed, ended_by, tell, text
from stellar_fast.files import shown

if TYPE_CHECKING:
    import torch

    from stellar_fast.tune.store import Entry
    from stellar_fast.tune.tuner import Request

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BATCH = {"cpu": 2, "cuda": 128}


def tune(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Operators; none: all. Or list, show or clear.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Tune what a training step of it needs.")] = "b16",
    batch: Annotated[int | None, typer.Option(help="Images of that step (128, on a CPU 2).")] = None,
    shapes: Annotated[str, typer.Option(help="Named shapes of the operators instead, with commas.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    budget: Annotated[str, typer.Option(help="Seconds for everything, 300 or 300s.")] = "300",
    again: Annotated[bool, typer.Option("--again", help="Measure anew what is tuned already.")] = False,
    commit: Annotated[bool, typer.Option("--commit", help="Write kernels/<op>/configs/ of the checkout too.")] = False,
) -> None:
    """Find the fastest launch knobs of this machine: tiles and warps on a GPU, products, blocks and threads on a CPU.

    Operators take what was found from then on. Every candidate is verified before it is timed.

    Ctrl-C keeps what was measured, and the same command goes on from there.

    [cyan]tune list[/] names the files that hold results, [cyan]tune show[/] prints those of a device,
    [cyan]tune clear[/] forgets the user's.

    Example: [cyan]stellar-fast tune linear sinkhorn --preset b16 --dtype fp32 --budget 60[/]
    """
    from stellar_fast.train.config import resolve_device
    from stellar_fast.tune.plan import check_ops

    where = resolve_device(device)
    action, *ops = words if words and words[0] in ("list", "show", "clear") else ("", *(words or ()))
    check_ops(ops, where.type)
    if action == "list":
        _list()
    elif action == "show":
        _show(ops, where)
    elif action == "clear":
        _clear(ops, where)
    else:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be {', '.join(DTYPES)} but is {dtype!r}")
        requests = _requests(ops, preset, batch or BATCH[where.type], shapes, dtype, where)
        _tune(requests, where, _seconds(budget), again, commit)


def _seconds(text: str) -> float:
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"budget must be a positive number of seconds but is {text!r}")
    return seconds


def _requests(
    ops: Sequence[str], preset: str, batch: int, shapes: str, dtype: str, device: torch.device
) -> list[Request]:
    from stellar_fast.tune import plan

    ops = ops or plan.tunable_ops(device.type)
    if shapes:
        found = plan.named_shapes(ops, [name.strip() for name in shapes.split(",")])
    else:
        found = plan.preset_shapes(preset, batch)
    return plan.requests({op: found[op] for op in ops}, DTYPES[dtype], device)


def _tune(requests: Sequence[Request], device: torch.device, budget: float, again: bool, commit: bool) -> None:
    from stellar_fast.tune import lookup, tuner
    from stellar_fast.tune.worker import Worker

    store, worker = lookup.user_store(lookup.device_name(device)), Worker()
    store.check()
    if commit:
        lookup.check_checkout()
        for op in sorted({request.op for request in requests}):
            lookup.committed_store(op, store.device).check()
    known = [] if again else list(store.read().values())
    left_out: list[str] = []

    def save(entries: Sequence[Entry]) -> None:  # what is measured anew takes the place of a result when it is one
        store.put(entry for entry in entries if entry.decided or not again)

    def report(step: tuner.Progress) -> None:
        what = f"{step.request.op} {step.request.text}"
        tried = f", {step.entry.tried} of {step.candidates} candidates" if step.entry and step.candidates else ""
        progress.update(step.place, what + tried)
        if step.problem:
            left_out.append(f"{what}: {step.problem}")

    try:
        with ended_by(signal.SIGHUP), Progress(len(requests), "requests") as progress:
            tuner.tune(requests, worker, known, save, budget, report)
    finally:  # also where Ctrl-C, TERM or a hang-up ended it
        worker.close()
        lookup.forget()
        found = [entry for entry in store.read().values() if any(request.is_of(entry) for request in requests)]
        decided = [replace(entry, measured={}) for entry in found if entry.decided]
        for op in sorted({entry.op for entry in decided}) if commit else ():
            place = lookup.committed_store(op, store.device)
            place.put(entry for entry in decided if entry.op == op)
            tell(f"committed in {shown(place.path)}")
        console.print(_table(found, device))
        for line in left_out:
            tell(f"left out: {line}")
        tell(f"kept in {shown(store.path)}")
    if not found:
        raise SystemExit(1)


def _table(entries: Sequence[Entry], device: torch.device) -> Table:
    from stellar_fast.tune import lookup

    table = Table(title=Text(f"Launch knobs of {lookup.device_name(device)}"), title_justify="left")
    table.add_column("operator", no_wrap=True)
    for name in ("request", "heuristic ms", "best ms", "ratio", "next", "knobs", "tried"):
        table.add_column(name, justify="right" if name.endswith(("ms", "ratio", "next")) else "left", overflow="fold")
    for entry in sorted(entries, key=lambda entry: (entry.op, entry.request)):
        rejected = f", {len(entry.rejected)} rejected" if entry.rejected else ""
        going_on = "" if entry.done else ", more to come"
        stale = "" if lookup.is_current(entry, device) else " (of another version: not used)"
        next_ratio = f"{entry.next_ratio:.2f}" if entry.next_ratio else ""
        times = f"{entry.heuristic_ms:.3f}", f"{entry.best_ms:.3f}", f"{entry.ratio:.2f}", next_ratio
        knobs = text(_short(entry.knobs) if entry.knobs else "heuristic's").append(stale, "yellow")
        table.add_row(entry.op, entry.request, *times, knobs, f"{entry.tried}{rejected}{going_on}")
    return table


def _short(knobs: Any) -> str:
    if isinstance(knobs, dict):
        return " ".join(f"{name}={_short(value)}" for name, value in knobs.items())
    return str(knobs)


def _list() -> None:
    from stellar_fast.tune import lookup

    files = sorted(lookup.user_folder().glob("*.json")) + sorted(lookup.room("linear").parent.glob("*/configs/*.json"))
    known = 0
    for path in files:
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
            content = json.loads(path.read_text())
            ops = [entry["op"] for entry in content["entries"]]
            tell(shown(path))
            tell(f"  {content['device']}, {len(ops)} entries: {', '.join(sorted(set(ops)))}")
            known += 1
    if not known:
        tell(f"no tuned launch knobs in {shown(lookup.user_folder())}")
    end_printed()


def _show(ops: Sequence[str], device: torch.device) -> None:
    from stellar_fast import backend
    from stellar_fast.tune import lookup

    name = lookup.device_name(device)
    for store in [lookup.user_store(name), *(lookup.committed_store(op, name) for op in ops or backend.OPS)]:
        if found := [entry for entry in store.read().values() if not ops or entry.op in ops]:
            tell(shown(store.path))
            console.print(_table(found, device))
    end_printed()


def _clear(ops: Sequence[str], device: torch.device) -> None:
    from stellar_fast.tune import lookup

    store = lookup.user_store(lookup.device_name(device))
    tell(f"{store.remove(ops)} entries removed from {shown(store.path)}")
