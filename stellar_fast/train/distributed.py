"""One process or, launched by torchrun, one process per device."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stellar_fast.train.errors import RankError, sentence

T = TypeVar("T")


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

    def max(self, number: int) -> int:
        """The largest of the processes' numbers. Travels between the hosts: the devices are not waited for."""
        if self.world == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every process, in rank order, on every process."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def share(self, error: Exception | None) -> Exception | None:
        """The error of the first process that has one, on all of them; None where none has.

        A bug stays what it is where it occurred, with its traceback.
        """
        if self.world == 1:
            return error
        told = self.gather(None if error is None else sentence(error) or f"{type(error).__name__}: {error}")
        rank = next((rank for rank, text in enumerate(told) if text is not None), None)
        if rank is None or (error is not None and sentence(error) is None):
            return error
        shared = RankError(told[rank] if rank == 0 else f"process {rank} of {self.world}: {told[rank]}")
        shared.__cause__ = error
        return shared

    def together(self, function: Callable[[], T]) -> T:
        """What the function gives here, once it has succeeded on all processes; else the same error on all."""
        value: Any = None
        error = None
        try:
            value = function()
        except Exception as caught:
            error = caught
        if (shared := self.share(error)) is not None:
            raise shared
        return value

    def same(self, options: dict[str, Any]) -> None:
        """Raise RankError, on all processes, for the first option that differs between two of them."""
        first, *others = self.gather(options)
        for rank, values in enumerate(others, 1):
            for name, value in values.items():
                if value != first[name]:
                    raise RankError(
                        f"process {rank} of {self.world} has {name} {value!r}, process 0 has {first[name]!r}: "
                        "all processes of a run need the same"
                    )


@contextmanager
def process_group(device: str = "auto") -> Iterator[Ranks]:
    """The process group that torchrun's environment asks for; without torchrun a single process and no group.

    `device` is the option of that name: a machine that lacks it still joins, to say so to the others.
    """
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
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        dist.init_process_group("gloo" if on_cpu else "cpu:gloo,cuda:nccl")
    try:
        yield ranks
    finally:
        gc.collect()  # DistributedDataParallel sits in reference cycles, and a group must not outlive the interpreter
        if started:
            dist.destroy_process_group()
