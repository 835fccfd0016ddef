"""Distillation: what is mixed, hinted and scheduled."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.calibration.distillation import distill, mixed
from normswap.networks.network import Network


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


def pair() -> tuple[Network, Network]:
    """Return a network whose head answers zero to everything, converted, and itself."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    nn.init.zeros_(model[5].weight)
    nn.init.zeros_(model[5].bias)
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    converted = normswap.convert(model.eval(), example_input=torch.zeros(2, 3, 9, 9), check=False)
    return Network(converted.eval()), Network(model)


def images() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(4, 3, 9, 9, generator=generator)


def test_what_the_outputs_do_not_tell_is_learned_from_hints() -> None:
    student, teacher = pair()
    before = student.slots["1"].weight.detach().clone()
    distill(student, teacher, ["1"], images(), steps=3, rate=5e-4)
    assert (student.slots["1"].weight - before).abs().min() > 1e-4  # type: ignore[operator]


def test_the_rate_falls_along_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Watched(torch.optim.Adam):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    distill(*pair(), ["1"], images(), steps=8, rate=5e-4)
    assert rates == pytest.approx([5e-4 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
