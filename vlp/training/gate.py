"""Where the ranks meet before each step: nobody begins one before all have their clips, or all stop.

    clips are there     READY   --.                             READY: the step begins
    not yet             WAITING --+--> the largest of all ranks WAITING: meet again, about once a second
    told to leave       LEAVING --+                             LEAVING: all stop here, save, exit 75
    storage was away    LOST    --'                             LOST: all stop here, save, exit 74
    for too long

So a collective of a step never waits for storage: nothing times out, no rank looks hung, and a signal is answered in
a second or two, however long the storage is away.
"""

import time
from typing import Any

import torch

from vlp import dist
from vlp.data.outage import Announcer, Outage
from vlp.data.storage import OutageError
from vlp.training.stopping import Wish

_READY, _WAITING, _LEAVING, _LOST = range(4)


class Gate:
    """Is `vlp.data.loader.Gate`.

    Args:
        module: a `Pretraining`, whose device the ranks meet on. wish: of this rank to stop.
    """

    def __init__(self, module: Any, *, wish: Wish) -> None:
        self.module, self.wish = module, wish
        self.is_closed = False  # all ranks stop before the next step
        self.loss = ""  # what storage was away for too long, if that is why; the same on all ranks
        self._was_away, self._announce = False, Announcer()

    def waiting(self, outage: Outage | None) -> bool:
        """Meet the others without a batch; the first rank that waits for storage says so, once a minute."""
        return self._meet(_WAITING, outage) == _WAITING

    def ready(self) -> bool:
        """Meet the others until all of them have a batch, or stop."""
        while (state := self._meet(_READY)) == _WAITING:
            pass
        if self._was_away:
            self.wish.restart()  # the time of an outage is no step's
            self._was_away = False
        return state == _READY

    def lost(self, error: OutageError) -> None:
        """Tell the others that this rank gets no batch any more."""
        self._meet(_LOST, loss=str(error))

    def shut(self, loss: str) -> None:
        """Close it for storage that was away for too long in an evaluation; called on all ranks."""
        self.is_closed, self.loss = True, loss

    def _meet(self, state: int, outage: Outage | None = None, *, loss: str = "") -> int:
        """Exchange states with all ranks, once; return the largest."""
        if self.is_closed:
            return _LOST if self.loss else _LEAVING
        began = time.perf_counter()
        self.module.mark("data")
        state = _LEAVING if state < _LEAVING and self.wish() is not None else state
        speaker = dist.world_size() - dist.rank() if outage is not None else 0  # the largest is the first rank's
        mine = torch.tensor([state, speaker], device=self.module.device)
        state, first = dist.max_over_ranks(mine).tolist()
        self._was_away |= first > 0
        if outage is not None and first == speaker:
            self._announce(outage)
        self.is_closed = state >= _LEAVING
        if state == _LOST:
            self.loss = dist.first_text(loss, self.module.device)
        self.module.gate_s += time.perf_counter() - began
        return state
