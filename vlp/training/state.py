"""The state of a run as names and whole tensors, whatever the strategy and the number of ranks.

    model/NAME             weights in the precision in which they move, frozen parameters and buffers; tied ones once
    optimizer/KIND/NAME    AdamW's moments and step count
    ema/NAME               the averaged weights

`collect` splits the tensors among the ranks by bytes and puts one at a time together from its shares; `restore` fills
any strategy on any number of ranks from such names. So there is no conversion between strategies.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vlp import dist
from vlp.training.ema import Ema
from vlp.training.update import MOMENTS, Share, Update, gathered


class Stored(Protocol):
    """Where `restore` and `fill` read from; whole tensors are best mapped, for a share reads only its part."""

    def keys(self) -> Iterable[str]:
        """Return the names above."""
        ...

    def get(self, key: str) -> Tensor:
        """Return a tensor."""
        ...


class _Item(NamedTuple):
    """One tensor of the state: how it is known here, and whether the other ranks hold the rest of it."""

    key: str
    share: Share
    sharded: bool

    @property
    def num_bytes(self) -> int:
        return self.share.shape.numel() * self.share.values.element_size()


@torch.no_grad()
def collect(module: nn.Module, update: Update, ema: Ema | None, *, num_writers: int | None = None) -> dict[str, Tensor]:
    """Return the whole tensors that this rank writes; each is given by exactly one rank, about as many bytes by each.

    Every rank must call this. A tensor that is not sharded is returned as it is and not copied.

    Args:
        num_writers: the first so many ranks write; None is all of them.
    """
    items = list(_items(module, update, ema))
    owners = owners_of({item.key: item.num_bytes for item in items}, num_writers or dist.world_size())
    device, own = _device(module), {}
    for key, share, sharded in items:
        mine = owners[key] == dist.rank()
        if sharded and dist.world_size() > 1:
            whole = gathered(share, device=device, to=owners[key])
            if mine:
                own[key] = whole.to("cpu", share.values.dtype)
        elif mine:
            own[key] = share.values.detach().view(share.shape)
    return own


def owners_of(num_bytes: Mapping[str, int], num_writers: int) -> dict[str, int]:
    """Give each key to a rank: the largest first, each to the rank that has least; the same on every rank."""
    loads, owners = [0] * num_writers, {}
    for key, size in sorted(num_bytes.items(), key=lambda item: (-item[1], item[0])):
        owners[key] = loads.index(min(loads))
        loads[owners[key]] += size
    return owners


@torch.no_grad()
def restore(module: nn.Module, update: Update, ema: Ema | None, stored: Stored) -> None:
    """Continue from a state, whatever strategy gave it.

    Raises:
        ValueError: it is of another model, of other trained parameters, or has no average where one is kept.
    """
    keys = set(stored.keys())
    _check_optimizer(keys, update)
    weights = update.weights()
    update.prepare_moments({n: float(stored.get(f"optimizer/step/{n}")) for n in weights if keys & _optimizer_keys(n)})
    items = [item for item in _items(module, update, ema) if not item.key.startswith("optimizer/step/")]
    _check_fit(items, stored, keys)
    for key, share, _ in items:
        share.take(stored.get(key))
    update.publish()


@torch.no_grad()
def fill(module: nn.Module, stored: Stored, *, averaged: bool) -> None:
    """Fill a module on one process with the weights of a state, with the averaged ones where it has any.

    Raises:
        ValueError: it is of another model.
    """
    keys = set(stored.keys())
    items = [_Item(f"model/{name}", Share(tensor, 0, tensor.shape), False) for name, tensor in once(module).items()]
    _check_fit(items, stored, keys)
    for key, share, _ in items:
        name = key.removeprefix("model/")
        share.take(stored.get(f"ema/{name}" if averaged and f"ema/{name}" in keys else key))


def once(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and stored buffers; one that two names share is given once, under its first name."""
    parameters = dict(module.named_parameters())
    return {n: p.detach() for n, p in parameters.items()} | _buffers(module)


def tied_names(module: nn.Module) -> dict[str, str]:
    """Return for each further name of a tensor the name under which `once` gives it."""
    state = module.state_dict(keep_vars=True)
    kept = {_place(tensor): name for name, tensor in reversed(state.items())}
    return {n: kept[_place(tensor)] for n, tensor in state.items() if kept[_place(tensor)] != n}


def _items(module: nn.Module, update: Update, ema: Ema | None) -> Iterator[_Item]:
    """Every tensor of the state, in the same order on every rank."""
    for name, share in update.weights().items():
        yield _Item(f"model/{name}", share, update.sharded)
    for name, share in update.frozen().items():
        yield _Item(f"model/{name}", share, update.frozen_sharded)
    for name, tensor in _buffers(module).items():
        yield _Item(f"model/{name}", Share(tensor, 0, tensor.shape), False)
    for name, share in update.moments().items():
        yield _Item(f"optimizer/{name}", share, update.sharded)
    for name, step in update.steps().items():
        yield _Item(f"optimizer/step/{name}", Share(torch.tensor(step), 0, torch.Size()), False)
    for name, share in (ema.average if ema is not None else {}).items():
        yield _Item(f"ema/{name}", share, update.sharded)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of the state dict, each place in memory once."""
    found, seen = {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) or (_place(tensor) in seen and tensor.numel()):
            continue
        seen.add(_place(tensor))
        found[name] = tensor.detach()
    return found


def _place(tensor: Tensor) -> tuple:
    """What two names of one tensor have in common; parameters under ZeRO-3 are empty, so theirs is the object."""
    if isinstance(tensor, nn.Parameter):
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.shape, tensor.stride())


def _optimizer_keys(name: str) -> set[str]:
    return {f"optimizer/{kind}/{name}" for kind in ("step", *MOMENTS)}


def _check_optimizer(keys: set[str], update: Update) -> None:
    stored = {key.split("/", 2)[2] for key in keys if key.startswith("optimizer/")}
    trained = update.weights().keys()
    other = sorted(stored - trained)
    if other:
        raise ValueError(
            f"the checkpoint has optimizer state for '{other[0]}', which is not trained; freeze the same parts."
        )
    bare = sorted(name for name in trained if stored and not _optimizer_keys(name) <= keys)
    if bare:
        raise ValueError(
            f"the checkpoint has no optimizer state for '{bare[0]}', which is trained; freeze it as before."
        )


def _check_fit(items: Iterable[_Item], stored: Stored, keys: set[str]) -> None:
    own = {item.key: item.share.shape for item in items}
    kinds = {key.partition("/")[0] for key in own}
    theirs = {key for key in keys if key.partition("/")[0] in kinds and not key.startswith("optimizer/step/")}
    if "ema" in kinds and not any(key.startswith("ema/") for key in keys):
        raise ValueError("the checkpoint has no averaged weights; keep optim.ema_decay as it was.")
    missing, unknown = sorted(own.keys() - theirs), sorted(theirs - own.keys())
    shapes = [key for key in sorted(own.keys() & theirs) if own[key] != stored.get(key).shape]
    if missing or unknown or shapes:
        raise ValueError(
            f"the checkpoint does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}, other shape "
            f"{shapes[:3]} ({len(missing)}, {len(unknown)}, {len(shapes)} in all); use the config it was made with."
        )


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
