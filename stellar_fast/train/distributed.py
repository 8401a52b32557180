"""One process or, launched by torchrun, one process per device."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among `world` processes; `local` is its device index on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Average over the processes; a NaN in one becomes a NaN in all."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process. Travels between the hosts: the devices are not waited for."""
        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every process, in rank order, on every process."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """The process group that torchrun's environment asks for; without torchrun a single process and no group."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ["LOCAL_RANK"]))
    started = not dist.is_initialized()
    if started:
        # The first call of a custom operator imports it, and its import keeps a group that exists alive (torch 2.13):
        # gloo's threads then outlive the interpreter, and a process that has done its work ends in SIGABRT.
        importlib.import_module("torch._dynamo")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield ranks
    finally:
        gc.collect()  # DistributedDataParallel sits in reference cycles, and a group must not outlive the interpreter
        if started:
            dist.destroy_process_group()
