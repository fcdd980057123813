"""What a checkpoint holds of a run that trains, by key, and how it comes back.

model/NAME              weights and buffers of the model and of the objectives
optimizer/KIND/NAME     moments and step counts by the name of their parameter
ema/NAME                the average of the weights, only with optim.ema_decay
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlp.training.checkpoint import Stored
from vlp.training.ema import Ema


def collect(
    module: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None, *, rank: int, world_size: int
) -> dict[str, Tensor]:
    """Return the tensors that this rank writes, where every rank holds all of them."""
    tensors = {f"model/{name}": tensor for name, tensor in module_state(module).items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer_state(optimizer).items()}
    if ema is not None:
        tensors |= {f"ema/{name}": tensor for name, tensor in ema.average.items()}
    return share(tensors, rank=rank, world_size=world_size)


def restore(module: nn.Module, ema: Ema | None, stored: Stored) -> dict[str, Tensor]:
    """Fill weights, buffers and the average; return the optimizer's tensors, for `load_optimizer` when there is one.

    Raises:
        ValueError: the checkpoint is of another module or of other trained parameters.
    """
    load_module(module, stored.under("model"))
    if ema is not None:
        ema.load(stored.under("ema"))
    return stored.under("optimizer")


def share(tensors: Mapping[str, Tensor], *, rank: int, world_size: int) -> dict[str, Tensor]:
    """Return this rank's part of what all ranks hold: the largest first, each to the rank with the fewest bytes."""
    loads, mine = [0] * world_size, {}
    for key in sorted(tensors, key=lambda key: (-tensors[key].nbytes, key)):
        owner = loads.index(min(loads))
        loads[owner] += tensors[key].nbytes
        if owner == rank:
            mine[key] = tensors[key]
    return mine


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers; a tensor that two names share is stored once, under its first name."""
    seen: set[tuple] = set()
    state = {}
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        state[name] = tensor
    return state


def load_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill weights and buffers; every tensor of the module must be there, and no other.

    Raises:
        ValueError: missing or unknown names, or other shapes.
    """
    own = module_state(module)
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unknown or shapes:
        raise ValueError(
            f"the checkpoint does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}, other shape "
            f"{shapes[:3]} ({len(missing)}, {len(unknown)}, {len(shapes)} in all); use the config it was made with."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state tensors by "kind/parameter name"."""
    return {
        f"{kind}/{name}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Fill the optimizer's state from `optimizer_state`.

    Raises:
        ValueError: a tensor that belongs to no trained parameter, or a trained parameter without any.
    """
    owners = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in owners:
            raise ValueError(
                f"the checkpoint has optimizer state for '{name}', which is not trained; freeze the same parts."
            )
        optimizer.state[owners[name]][kind] = value.clone().to(owners[name].device)  # fused AdamW counts there as well
    bare = sorted(name for name, parameter in owners.items() if tensors and not optimizer.state.get(parameter))
    if bare:
        raise ValueError(
            f"the checkpoint has no optimizer state for '{bare[0]}', which is trained; freeze it as before."
        )
