"""Put off garbage collection while much is made that stays."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collecting_later() -> Iterator[None]:
    """Have nothing collected within the block.

    A look at a network makes objects by the thousands that live to its end. Between them the collector would look at
    them again and again, and at all that the program holds already, and find nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
