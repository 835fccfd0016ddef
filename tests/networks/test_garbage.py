"""Garbage collection is put off, and goes on as it was."""

import gc
from collections.abc import Iterator

import pytest

from normswap.networks.garbage import collecting_later


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("fails", [True, False], ids=["fails", "runs"])
def test_the_collector_is_as_it_was(on: bool, fails: bool) -> None:
    gc.enable() if on else gc.disable()
    with pytest.raises(ZeroDivisionError) if fails else collecting_later(), collecting_later():
        assert not gc.isenabled()
        1 / (0 if fails else 1)
    assert gc.isenabled() == on
