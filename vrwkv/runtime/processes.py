"""The device, and the processes that torchrun started."""

import functools
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args

import torch
from timm.utils import init_distributed_device
from timm.utils.distributed import world_info_from_env

from vrwkv.runtime.errors import UserError, first_line

Amp = Literal["none", "bfloat16", "float16"]
"""The number format of a forward pass; none: as the weights."""
AMP: tuple[Amp, ...] = get_args(Amp)

ROLL_CALL = 10  # seconds for the processes that are left to say so when one is gone


class World(NamedTuple):
    """This process among those that train or validate together."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None
    """A process group of the CPU, to agree on what to do next without waiting for a GPU."""

    @property
    def distributed(self) -> bool:
        return self.size > 1

    @property
    def primary(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Tensors of all processes, which have one shape and call it together: (processes, ...)."""
        if not self.distributed:
            return tensor[None].clone()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor)
        return torch.stack(parts)

    def agree(self, wish: int) -> int:
        """The largest of the wishes of all processes, which call it together."""
        if not self.distributed:
            return wish
        wishes = torch.tensor(wish)
        torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX, self.control)
        return int(wishes)

    def check_same(self, value: str, problem: str) -> None:
        """Raises a UserError in all processes, which call it together, where they do not give the same value: the
        problem, and which of them gave what."""
        if not self.distributed:
            return
        values = [value] * self.size
        torch.distributed.all_gather_object(values, value, self.control)
        if len(distinct := dict.fromkeys(values)) > 1:
            ranks = {each: [str(rank) for rank, given in enumerate(values) if given == each] for each in distinct}
            given = (f"{each} (rank {', '.join(found)})" for each, found in ranks.items())
            raise UserError(f"{problem}: {'; '.join(given)}")


def is_primary() -> bool:
    """Whether this is the one process, of those that torchrun (or SLURM) started, that writes files and reports."""
    return world_info_from_env()[1] == 0


def choose_device(name: str) -> str:
    """`name`, or for "auto" the best kind of device here.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # which takes a device that computes
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:  # without CUDA: AssertionError
        raise UserError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return name


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Joins the process group where torchrun (or SLURM) started several processes, and leaves it at the end."""
    args = SimpleNamespace(device=choose_device(device))
    try:
        world = World(init_distributed_device(args), args.rank, args.world_size)
        if world.distributed:
            world = world._replace(control=torch.distributed.new_group(backend="gloo"))
        try:
            yield world
        except RuntimeError as error:
            if world.distributed and re.search(r"gloo|nccl|connection|timed out", str(error), re.IGNORECASE):
                raise UserError(f"{_lost(world)}: {_cause(error)}") from error
            raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _lost(world: World) -> str:
    """Says which process is gone: those that are left call each other's names, for `ROLL_CALL` seconds."""
    absent, until = [rank for rank in range(world.size) if rank != world.rank], time.monotonic() + ROLL_CALL
    if world.size > 2:
        # A launcher may end this process meanwhile; and where there is none, the store is gone with rank 0.
        with suppress(RuntimeError, KeyboardInterrupt):
            store = torch.distributed.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=ROLL_CALL / 2),
            )
            store.set(f"left/{world.rank}", "")
            while len(absent) > 1 and time.monotonic() < until:
                absent = [rank for rank in absent if not store.check([f"left/{rank}"])]
                time.sleep(0.2)
    names = ", ".join(f"rank {rank}" for rank in absent)
    return f"rank {world.rank} of {world.size} lost the connection to another; it has no answer from {names}"


def _cause(error: RuntimeError) -> str:
    """An error's first line, and what NCCL says some lines below."""
    return "; ".join([first_line(error), *re.findall(r"^Last error:\s*(.+)", str(error), re.MULTILINE)])


def autocast(world: World, amp: Amp) -> torch.autocast:
    """The context that runs a forward pass in `amp`."""
    return torch.autocast(world.device.type, getattr(torch, amp) if amp != "none" else None, enabled=amp != "none")


@functools.cache
def usable_amp(amp: Amp, device: str) -> Amp:
    """`amp`, or none where `device` is a processor that is no faster in it, which a line on stderr says once.

    That is measured, in some milliseconds: some processors only emulate a format, others have slow units for it.
    """
    if device != "cpu" or amp == "none" or _speed(getattr(torch, amp)) > _speed(torch.float32):
        return amp
    print(f"this processor is no faster in {amp}: computing in float32", file=sys.stderr)
    return "none"


def _speed(dtype: torch.dtype) -> float:
    """Matrix products per second on the CPU."""
    matrix = torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - begin)
    return 1 / min(times)
