"""Sharded training: parameters, gradients and optimizer states split between processes (FSDP).

Zhao et al. 2023, arXiv:2304.11277, in torch's ``fully_shard``. Every block gathers its parameters for its own
forward and backward pass, so that a model may be larger than one device.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, device: torch.device, processes: int) -> None:
    """Split the parameters of ``module`` between the processes, in place; those of the first process count.

    The units that are gathered together are the children of ``nn.Sequential`` and ``nn.ModuleList``,
    such as residual blocks and transformer layers; what is left belongs to the whole.
    """
    mesh = init_device_mesh(device.type, (processes,))
    for value in module.state_dict().values():
        sent = value.detach().to(device)
        torch.distributed.broadcast(sent, src=0)
        value.copy_(sent)
    for parent in reversed(list(module.modules())):
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            for child in parent:
                if any(True for _ in child.parameters()) and not isinstance(child, nn.ModuleList):
                    fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(value: Any) -> Any:
    """Gather the sharded tensors in a nest of dicts, lists and tuples; all processes must call it together."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def local(value: Tensor) -> Tensor:
    """Return this process's part of a tensor: all of it where it is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def split_like(value: Tensor, pattern: Tensor) -> Tensor:
    """Return this process's share of a whole tensor, split as ``pattern`` is."""
    if not isinstance(pattern, DTensor) or value.shape != pattern.shape:
        return value
    return distribute_tensor(value.to(pattern.to_local().device), pattern.device_mesh, pattern.placements)


def load_model(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a whole state into a module that may be sharded.

    Raises:
        RuntimeError: names or shapes differ.
    """
    own = module.state_dict()
    module.load_state_dict(
        {name: split_like(value, own[name]) if name in own else value for name, value in state.items()}
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state into an optimizer whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    split = {
        index: {name: split_like(v, parameters[index]) if isinstance(v, Tensor) else v for name, v in moments.items()}
        for index, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": split})
