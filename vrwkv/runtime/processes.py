"""The device, and the processes that torchrun started."""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Literal, NamedTuple, get_args

import torch
from timm.utils import init_distributed_device
from timm.utils.distributed import world_info_from_env

from vrwkv.runtime.errors import UserError, first_line

Amp = Literal["none", "bfloat16", "float16"]
"""The number format of a forward pass; none: as the weights."""
AMP: tuple[Amp, ...] = get_args(Amp)


class World(NamedTuple):
    """This process among those that train or validate together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def distributed(self) -> bool:
        return self.size > 1

    @property
    def primary(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0


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
        yield World(init_distributed_device(args), args.rank, args.world_size)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def autocast(world: World, amp: Amp) -> torch.autocast:
    """The context that runs a forward pass in `amp`."""
    return torch.autocast(world.device.type, getattr(torch, amp) if amp != "none" else None, enabled=amp != "none")


@functools.cache
def usable_amp(amp: Amp, device: str) -> Amp:
    """`amp`, or none where `device` is a processor without units for it, which a line on stderr says once."""
    endings = {"bfloat16": "bf16", "float16": "fp16"}
    if device != "cpu" or amp == "none":
        return amp
    if any(found and name.endswith(endings[amp]) for name, found in torch.cpu.get_capabilities().items()):
        return amp
    print(f"this processor has no units for {amp}: computing in float32", file=sys.stderr)
    return "none"
