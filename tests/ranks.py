"""Runs a function in two gloo processes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_two_ranks(worker: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """`worker(rank, *arguments)` in two processes that share a group; an error of either is raised here."""
    torch.multiprocessing.spawn(_run, (worker, folder / "rendezvous", arguments), nprocs=2)


def _run(rank: int, worker: Callable[..., None], file: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    worker(rank, *arguments)
    dist.barrier()
    # Not by the interpreter's end: FSDP2 keeps its group, whose threads may then ask for an interpreter that is gone
    # and abort the process (torch 2.13; see stellar_fast/train/distributed.py).
    os._exit(0)
