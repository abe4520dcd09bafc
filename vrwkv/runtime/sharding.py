"""Models in shards: each process keeps a part of every parameter, gradient and optimizer state (FSDP2)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vrwkv.runtime.errors import UserError, first_line
from vrwkv.runtime.processes import World


def shard(model: nn.Module, world: World) -> None:
    """Leaves this process its shard of each parameter, of a model that is the same in all processes.

    To be computed with, parameters come together block by block: those are the children of what is named `blocks`, as
    in timm's models. Whole weights can be loaded into the model.

    Raises:
        UserError: there is one process, or the parameters are laid out in another way than shards can be.
    """
    if not world.distributed:
        raise UserError("fsdp shards a model over several processes: torchrun --nproc_per_node=N, N 2 or more")
    if not all(parameter.is_contiguous() for parameter in model.parameters()):
        raise UserError("fsdp shards parameters that are contiguous in memory: leave out model.channels_last")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for name, module in reversed([*model.named_modules()]):  # inner ones first
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # makes what it keeps here: from an evaluation it could not be trained with
            module.unshard()
            module.reshard()
    model.register_load_state_dict_pre_hook(_shard_weights)


@contextmanager
def no_sync(model: Any) -> Iterator[None]:
    """Backward passes add gradients in this process alone; the next one outside shares the sums."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all of it where it is no shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(nest: Any, keep: bool) -> Any:
    """A nest of dicts and lists, with whole tensors on the CPU in place of shards.

    Args:
        nest: All processes call it together with theirs.
        keep: Whether this one wants the result; None stands for the tensors where it does not.
    """
    if isinstance(nest, DTensor):
        whole = nest.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(nest, dict):
        return {key: gather(value, keep) for key, value in nest.items()}
    return [gather(value, keep) for value in nest] if isinstance(nest, list) else nest


def check_optimizer(create: Callable[[nn.Module], torch.optim.Optimizer], world: World) -> None:
    """Tries the optimizer that `create` makes for a model on a sharded layer.

    Raises:
        UserError: it cannot step, or keeps something that `shard_optimizer_state` could not bring back.
    """
    model = nn.Linear(256, 256, device=world.device)
    shard(model, world)
    optimizer = create(model)
    problem = "fsdp needs an optimizer that works on shards, which optim.name is not"
    try:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except Exception as error:  # of torch's and timm's internals
        raise UserError(f"{problem}: {first_line(error)}") from error
    for weight, state in optimizer.state.items():
        if any(isinstance(value, DTensor) and value.shape != weight.shape for value in state.values()):
            raise UserError(f"{problem}: its states have other shapes than the parameters")


def shard_optimizer_state(content: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state dict of an optimizer as the optimizer of a sharded model takes it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shards(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        return {
            name: _shard_of(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
            for name, value in state.items()
        }

    states = {index: shards(state, parameters[index]) for index, state in content["state"].items()}
    return {**content, "state": states}


def _shard_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard, without asking the others."""
    if not isinstance(parameter, DTensor) or isinstance(whole, DTensor):
        return whole
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _shard_weights(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = model.state_dict()
    for name in state_dict:
        if (parameter := own.get(name.removeprefix(prefix))) is not None:
            state_dict[name] = _shard_of(state_dict[name], parameter)
