"""Reading weights that others published, from a local file and without unpickling.

Only tensors are read: safetensors, or torch files under `weights_only=True`. Training scripts put objects of their own
beside the tensors; every class and function that a file names is replaced by one that does nothing.
"""

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_NESTS = ("state_dict", "model", "module")  # where training scripts keep the weights inside their checkpoint


def read_weights(path: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name, without the wrapper's "module." prefix.

    Raises:
        ValueError: there is no such file, or it holds no tensors, or what cannot be left out.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint '{path}' does not exist; give the path of a local .safetensors or .pth file.")
    try:
        is_safe = path.endswith(".safetensors")
        content = load_file(path) if is_safe else _without_objects(path)
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint '{path}' holds more than tensors; convert it to safetensors.") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"checkpoint '{path}' cannot be read ({str(error).splitlines()[0]}).") from error
    for nest in _NESTS:
        if isinstance(content, dict) and isinstance(content.get(nest), dict):
            content = content[nest]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ValueError(f"checkpoint '{path}' holds no tensors by name; save the model's state_dict() instead.")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


class _Nothing:
    """Stands for any class or function: it takes everything and keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> "_Nothing":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        return

    def __setstate__(self, _: object) -> None:
        return


def _without_objects(path: str) -> object:
    """Load a torch file; an object of a class that torch does not vouch for becomes a `_Nothing`."""
    names = get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
    with safe_globals([(_Nothing, name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_exactly(module: torch.nn.Module, weights: dict[str, Tensor], path: str, spare: tuple[str, ...] = ()) -> None:
    """Load `weights` into `module`: all names and shapes must fit, but names that start with one of `spare` may stay.

    Raises:
        ValueError: names the first missing, unknown or misshapen tensors.
    """
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - weights.keys()),
        "unknown": sorted(k for k in weights.keys() - own.keys() if not k.startswith(spare)),
        "of another shape": sorted(k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape),
    }
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names)
        raise ValueError(f"checkpoint '{path}' does not fit this model: {text}; check the model's name and overrides.")
    module.load_state_dict({name: weights[name] for name in own})
