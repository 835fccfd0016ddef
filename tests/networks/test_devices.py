"""A default device that the user has set: normswap's own numbers are made on the CPU, the network's where they were."""

from pathlib import Path

import pytest
import torch
from nets import warm
from torch import Tensor, nn

import normswap

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Says where its forward would make a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        print(torch.get_default_device().type)
        y: Tensor = self.head(self.bn(self.conv(x)).relu().mean((2, 3)))
        return y


def net() -> nn.Module:
    torch.manual_seed(0)
    return warm(Net()).eval()


@pytest.mark.parametrize("batches", [None, "synthetic", [X]], ids=["filters", "made up", "images"])
def test_a_conversion_is_the_same(batches: object) -> None:
    model = net()
    expected = normswap.convert(model, example_input=X, batches=batches)
    with torch.device("meta"):
        found = normswap.convert(model, example_input=X, batches=batches)
    pairs = zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert normswap.plan_of(found) == normswap.plan_of(expected)


def test_all_that_follows_runs(tmp_path: Path) -> None:
    model = net()
    converted = normswap.convert(model, example_input=X)
    with torch.device("meta"):
        assert normswap.check(converted, model, example_input=X)
        normswap.calibrate(converted, model, [X + 0.1 * number for number in range(5)], steps=2)
        normswap.save(converted, tmp_path, source=None)
        loaded = normswap.load(tmp_path, model=model)
        folded = normswap.fold(loaded)
    assert torch.equal(loaded(X), converted(X))
    torch.testing.assert_close(folded(X), converted(X))


def test_the_networks_own_code_has_the_users_device(capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    converted = normswap.convert(model, example_input=X)
    capsys.readouterr()
    with torch.device("meta"):
        normswap.calibrate(converted, model, [X, X + 1])
        assert torch.get_default_device().type == "meta"
    assert set(capsys.readouterr().out.split()) == {"cpu", "meta"}  # traces, which need no device, and passes with data
