"""One training step without data, device or memory: shapes only, for its FLOPs and its live bytes.

    parameters and frames are on the meta device; masks, labels and keys of the batch are real, because they decide how
    many words and patches an objective keeps

Nothing is estimated by formula: what autograd keeps for the backward pass is what stays alive here too.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from vlp.forward import ForwardPass, Graph, Node
from vlp.objectives.combine import combine
from vlp.planning.kernels import META, Kernels
from vlp.planning.system import Planned, batch_of


class Cost(NamedTuple):
    """Floating point operations of one part of a step, for one micro-batch."""

    name: str
    forward: int
    backward: int


class Peak(NamedTuple):
    """Bytes of one micro-batch's forward and backward pass on top of parameters and optimizer."""

    with_gradients: int  # largest sum of all that is alive, gradients of parameters among it
    without_gradients: int  # the same without them: what comes on top where they are kept from before
    gradients: int
    kept: int  # alive between the forward and the backward pass
    kernels: int  # operations that the device is asked for, views left out


ASSUMED_SHARE = 0.15  # of a selection whose size depends on features: the usual share of what is hidden
LARGEST_KNOWN = 2**22  # values of a mask that are computed; of larger ones, over pairs of tokens, the shape is enough


class Shapes(TorchDispatchMode):
    """Runs operations on shapes: real tensors really, all others on the meta device."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        """`given` exists before the step and is not counted."""
        super().__init__()
        self.given = {x.untyped_storage()._cdata for x in given}
        self.sizes: dict[int, int] = {}  # of live storages
        self.gradients: set[int] = set()
        self.kernels = 0
        self.live = self.live_gradients = self.peak = self.peak_without = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        flat, spec = tree_flatten((args, kwargs or {}))
        given = spec
        if not any(isinstance(x, Tensor) and x.is_meta for x in flat):
            out = self._followed(func(*args, **(kwargs or {})))
            if func is torch.ops.aten._to_copy.default and out.is_meta:
                out.known = args[0]  # type: ignore[attr-defined]
            return out
        known = [_real(x) for x in flat]
        is_known = not any(isinstance(x, Tensor) and x.is_meta for x in known) and not func._schema.is_mutable
        if is_known and func is torch.ops.aten._local_scalar_dense.default:
            return func(*known[:1])
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            flat, spec = tree_flatten(((args[0], _positions(args[1]), *args[2:]), kwargs or {}))
        args, kwargs = tree_unflatten([x.to(META) if isinstance(x, Tensor) else x for x in flat], spec)
        out = self._followed(func(*args, **kwargs))
        self.kernels += not func.is_view
        if is_known and isinstance(out, Tensor) and out.numel() <= LARGEST_KNOWN:
            # a mask that was moved to the device of the features
            args, kwargs = tree_unflatten(known, given)
            kwargs.pop("device", None)
            out.known = func(*args, **kwargs)  # type: ignore[attr-defined]
        return out

    def classify(self, gradient: Tensor) -> None:
        """Count the storage of a parameter's gradient as that from now on."""
        key = gradient.untyped_storage()._cdata
        if key in self.sizes and key not in self.gradients:
            self.gradients.add(key)
            self.live_gradients += self.sizes[key]

    def _followed(self, out: Any) -> Any:
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor) and x.is_meta:
                self._follow(x.untyped_storage())
        return out

    def _follow(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.sizes or key in self.given:
            return
        self.sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._free, key)
        self.live += self.sizes[key]
        self.peak = max(self.peak, self.live)
        self.peak_without = max(self.peak_without, self.live - self.live_gradients)

    def _free(self, key: int) -> None:
        size = self.sizes.pop(key)
        self.live -= size
        if key in self.gradients:
            self.gradients.discard(key)
            self.live_gradients -= size


def peak(planned: Planned, num_clips: int) -> Peak:
    """Follow the bytes through the forward and backward pass of a micro-batch."""
    system, batch = planned.system, batch_of(planned.cfg, num_clips)
    shapes = Shapes([*planned.module.parameters(), *planned.module.buffers(), batch.frames, batch.more_frames])
    parameters = [p for p in planned.module.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: shapes.classify(p.grad)) for p in parameters]  # type: ignore[arg-type]
    with shapes, Kernels(planned.half) as kernels:  # also in the backward pass, where blocks may be computed again
        forward = ForwardPass(system.model, batch, system.graph)
        terms = {n: system.objectives[n](*forward.roles(wiring)) for n, wiring in system.wirings.items()}
        counts = {name: term.count.float() for name, term in terms.items()}
        loss = combine(terms, system.weights, counts).loss
        kernels.weights.clear()  # from now on cast weights belong to the graph
        kept = shapes.live
        torch.autograd.backward([loss])
        found = Peak(shapes.peak, shapes.peak_without, shapes.live_gradients, kept, shapes.kernels)
    for hook in hooks:
        hook.remove()
    planned.module.zero_grad(set_to_none=True)
    return found


def costs(planned: Planned, num_clips: int) -> list[Cost]:
    """Count the FLOPs of each quantity and objective, forward and backward, by cutting the graph between them."""
    system = planned.system
    forward = ForwardPass(system.model, batch_of(planned.cfg, num_clips), system.graph)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
    found: dict[str, list[int]] = {}
    with Shapes(planned.module.parameters()), counter, Kernels(None):
        cuts: list[tuple[str, list[tuple[Tensor, Tensor]]]] = []
        for name, make in _stages(system, forward):
            before = counter.get_total_flops()
            cuts.append((name, make()))
            found[name] = [counter.get_total_flops() - before, 0]
        for name, pairs in reversed(cuts):
            wanted = [(out, leaf.grad) for out, leaf in pairs if leaf.grad is not None]
            if wanted:
                before = counter.get_total_flops()
                torch.autograd.backward([out for out, _ in wanted], [grad for _, grad in wanted])
                found[name][1] = counter.get_total_flops() - before
    planned.module.zero_grad(set_to_none=True)
    return [Cost(name, *flops) for name, flops in found.items() if sum(flops)]


def _addmm_flops(out: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    """The product of the blocks of contrast, which are made in place."""
    return 2 * a[0] * a[1] * b[1]


def _stages(system: Any, forward: ForwardPass) -> Iterator[tuple[str, Callable[[], list]]]:
    """Yield the name and the making of each quantity and view in the order of the plan, then of each objective."""
    graph: Graph = system.graph
    for step in graph.plan(system.wanted):
        yield str(step.node), lambda step=step: _cut_after(forward, step.node)
    for name, wiring in system.wirings.items():
        yield f"objective {name}", lambda name=name, wiring=wiring: _ended(system.objectives[name], forward, wiring)


def _cut_after(forward: ForwardPass, node: Node) -> list[tuple[Tensor, Tensor]]:
    """Compute a node, and put leaves in the place of what it gave, so that its backward pass can be run by itself."""
    before = set(forward.values)
    forward.take(str(node))
    pairs: list[tuple[Tensor, Tensor]] = []

    def cut(x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        leaf = x.detach().requires_grad_()
        pairs.append((x, leaf))
        return leaf

    for new in forward.values.keys() - before:
        forward.values[new] = tree_map_only(Tensor, cut, forward.values[new])
    return pairs


def _ended(objective: nn.Module, forward: ForwardPass, wiring: Any) -> list[tuple[Tensor, Tensor]]:
    total = objective(*forward.roles(wiring)).total
    end = torch.zeros_like(total).requires_grad_()
    end.grad = torch.ones_like(end)
    return [(total, end)]


def _positions(index: Any) -> list[Tensor | None]:
    """Replace real masks of an indexing by the positions where they are True."""
    positions: list[Tensor | None] = []
    for each in index:
        if each is None or each.dtype != torch.bool:
            positions.append(each)
            continue
        mask = _real(each)
        if mask.is_meta:  # where features choose, such as attention that says what to hide
            some = torch.arange(max(1, round(ASSUMED_SHARE * mask.numel())))
            positions += [place.to(META) for place in torch.unravel_index(some, mask.shape)]
        else:
            positions += list(mask.nonzero().to(META).unbind(1))
    return positions


def _real(x: Any) -> Any:
    """Return the values of a meta tensor where they are known, else what was given."""
    return vars(x).get("known", x) if isinstance(x, Tensor) and x.is_meta else x
