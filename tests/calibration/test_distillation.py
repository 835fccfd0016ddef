"""Distillation: what is mixed, hinted and scheduled."""

import torch

from normswap.calibration.distillation import mixed


def test_mixing_takes_less_than_half_of_another_sample_and_leaves_whole_numbers() -> None:
    torch.manual_seed(0)
    images, sizes = torch.eye(64).view(64, 8, 8), torch.arange(64)
    batch = mixed({"images": images, "sizes": sizes, "scale": torch.tensor(2.0)})
    own = (batch["images"] * images).sum((1, 2))
    other = (batch["images"] * images.flip(0)).sum((1, 2))
    torch.testing.assert_close(own + other, torch.ones(64))
    assert 0.5 <= own.min() < 0.6
    assert own.max() > 0.9
    assert torch.equal(batch["sizes"], sizes)
    assert batch["scale"] == 2
