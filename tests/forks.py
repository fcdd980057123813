"""Processes forked from a server that has imported everything and computed nothing.

To fork a test process itself can deadlock: by then the thread pools of torch and the tokenizers hold locks that no
thread of the child would ever free. To spawn costs each process the seconds of the imports.
"""

import multiprocessing
from multiprocessing.context import ForkServerContext

_IMPORTED = ["safetensors.torch", "torch.distributed", "pytorch_lightning", "vlp.training.launch"]


def context() -> ForkServerContext:
    """The one context of all tests: a server keeps the imports with which it was started first."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(_IMPORTED)
    return forkserver
