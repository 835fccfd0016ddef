"""What "the same network" means in a test: its state bit for bit, its outputs to rounding.

A processor may take another path through the same kernel for tensors that lie elsewhere in memory (files are mapped
without regard to alignment), so that outputs of equal networks may differ in their last bits.
"""

import torch
from torch import Tensor, nn

ROUNDING = 128
"""Units of the type's epsilon, relative to the largest output, that outputs of equal networks may differ by."""


def assert_same_output(ours: Tensor, theirs: Tensor) -> None:
    """Raise unless two outputs are equal to rounding."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    bound = ROUNDING * torch.finfo(theirs.dtype).eps * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def assert_same_state(ours: nn.Module, theirs: nn.Module, *, prefix: str = "") -> None:
    """Raise unless two states hold the same names, types and bits; `prefix` stands before the names of `ours`."""
    found = {name.removeprefix(prefix): value for name, value in ours.state_dict().items()}
    expected = theirs.state_dict()
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def off(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of two outputs, relative to the largest value of the second."""
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())
