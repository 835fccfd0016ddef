"""What the user has set in torch: normswap's own numbers are what they are without, the network's code has it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import warm
from torch import Tensor, nn

import normswap
from normswap.checkpoint.folder import read_config

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


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "float64": lambda: default_type(torch.float64),
    "bfloat16": lambda: default_type(torch.bfloat16),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("how", [{}, {"groups": "auto"}], ids=["filters", "auto"])
def test_a_conversion_is_the_same(how: dict[str, Any], setting: Callable[[], Any]) -> None:
    model = net()
    expected = normswap.convert(model, example_input=X, **how)
    with setting():
        found = normswap.convert(model, example_input=X, **how)
    pairs = zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert normswap.plan_of(found) == normswap.plan_of(expected)
    found(X).sum().backward()  # not of tensors that torch makes in inference mode


@pytest.mark.parametrize("batches", ["synthetic", [X]], ids=["made up", "images"])
@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "autocast"])
def test_a_conversion_by_images_is_the_same_where_the_network_computes_the_same(setting: str, batches: object) -> None:
    model = net()
    expected = normswap.convert(model, example_input=X, batches=batches)
    with SETTINGS[setting]():
        found = normswap.convert(model, example_input=X, batches=batches)
    assert normswap.plan_of(found) == normswap.plan_of(expected)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_all_that_follows_runs(setting: Callable[[], Any], tmp_path: Path) -> None:
    model = net()
    converted = normswap.convert(model, example_input=X)
    with setting():
        assert normswap.check(converted, model, example_input=X)
        normswap.calibrate(converted, model, [X + 0.1 * number for number in range(5)], steps=2)
        normswap.save(converted, tmp_path, source=None)
        assert len(read_config(tmp_path)["normswap"]["outputs"]) == 5  # the input, the network, its layers
        loaded = normswap.load(tmp_path, model=model)
        made = [normswap.fold(loaded), normswap.out_of_place(loaded), normswap.apply(model, tmp_path / "config.json")]
    assert torch.equal(loaded(X), converted(X))
    torch.testing.assert_close(made[0](X), converted(X))
    for network in (loaded, *made):
        network(X).sum().backward()


def test_a_network_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = net()
    converted = normswap.convert(model, example_input=X)
    converted(X).sum().backward()
    with pytest.raises(normswap.UnsupportedModel, match=r"^parameters of Net were made in torch.inference_mode and"):
        normswap.convert(model, example_input=X, inplace=True)
    assert isinstance(model.bn, nn.BatchNorm2d)


@pytest.mark.filterwarnings("ignore:calibration did not help")  # a network that nobody trained
def test_the_networks_own_code_has_the_users_device(capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    converted = normswap.convert(model, example_input=X)
    capsys.readouterr()
    with torch.device("meta"):
        normswap.calibrate(converted, model, [X, X + 1])
        assert torch.get_default_device().type == "meta"
    assert set(capsys.readouterr().out.split()) == {"cpu", "meta"}  # traces, which need no device, and passes with data
