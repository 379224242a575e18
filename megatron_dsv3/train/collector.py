"""Python's garbage collector during training."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def few_collections() -> Iterator[None]:
    """Leaves what is there now out of every collection until the end; what comes later is not.

    A full collection looks at all objects that torch, Megatron-Core and transformers have made, and
    meanwhile nothing is launched; each rank has its own moment for it, while all others wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
