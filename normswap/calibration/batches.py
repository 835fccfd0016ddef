"""Batches to learn from and batches to judge by, prepared for a network."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from normswap.errors import CalibrationFailed
from normswap.networks.inputs import batch_size, rows_of

EVERY, MOST_HELD = 5, 4
"""Every fifth batch is held back to judge by, four at most: memory does not grow with the number of images."""


class Split:
    """Batches to judge by, and the others, which are all that is learned from."""

    def __init__(self, batches: Iterable[Any], judged: Iterable[Any] | None) -> None:
        self.batches = batches
        self._source = iter(batches)
        self._first = list(islice(self._source, EVERY * MOST_HELD))
        self._held: set[int] = set()
        if judged is not None:
            self.judged = list(judged)
        elif len(self._first) > 1:
            last = len(self._first) - 1
            self._held = set(range(EVERY - 1, len(self._first), EVERY)) or {last}
            self.judged = [self._first[index] for index in sorted(self._held)]
        else:
            self._halve()
        if not self.judged or not self._first:
            raise CalibrationFailed("calibration needs images to learn from and images to judge by; pass more batches")

    def _halve(self) -> None:
        half = batch_size(self._first[0]) // 2 if self._first else 0
        if not half:
            raise CalibrationFailed("calibration needs at least two images, one of them to judge by; pass more")
        self.judged = [rows_of(self._first[0], slice(half, None))]
        self.batches = self._first = [rows_of(self._first[0], slice(half))]

    def once(self) -> Iterator[Any]:
        """Yield the others in one pass; the iterable is not started anew."""
        yield from (batch for index, batch in enumerate(self._first) if index not in self._held)
        yield from self._source

    def passes(self, steps: int) -> float:
        """Return how often so many batches go through the others; 0 where nobody knows how many there are."""
        try:
            count = len(self.batches) - len(self._held)  # type: ignore[arg-type]
        except TypeError:
            return 0.0
        return steps / max(count, 1)

    def forever(self) -> Iterator[Any]:
        """Yield the others again and again."""
        while True:
            yield from (batch for index, batch in enumerate(self.batches) if index not in self._held)
