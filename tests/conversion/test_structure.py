"""What a trace shows of a converted network where the original is not at hand, and what was left on purpose."""

import re
from collections.abc import Callable

import broken
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import normswap
from normswap.layers.norms import ChannelScale


def test_a_planned_norm_that_met_another_shape_is_found_without_the_original() -> None:
    converted = normswap.convert(broken.Net(), example_input=broken.X)
    converted.conv2.stride = (2, 2)  # type: ignore[union-attr, assignment]
    row = normswap.check(converted).rows[0]
    assert (row.name, row.ok) == ("shapes", False)
    assert row.detail == "bn2: ((2, 8, 12, 12),) became ((2, 8, 6, 6),)"


def test_norms_left_as_asked_are_counted_and_not_reported() -> None:
    converted = normswap.convert(broken.Net(), exclude="bn2", example_input=broken.X)
    row = normswap.check(converted).rows[1]
    assert (row.name, row.ok, row.detail) == ("no BatchNorm left", True, "1 of 2 replaced, 1 kept frozen")
    converted = normswap.convert(broken.Net(), exclude="bn2", keep="live", example_input=broken.X)
    row = normswap.check(converted).rows[1]
    assert (row.ok, row.detail) == (True, "1 of 2 replaced, 1 left as asked: live in train mode")


def test_a_norm_left_for_another_reason_is_reported_with_it() -> None:
    model = broken.Net()
    prune.random_unstructured(model.bn2, "weight", amount=0.5)
    (entry,) = (entry for entry in normswap.inspect(model, example_input=broken.X).norms if not entry.changes)
    assert (entry.name, "weight" in entry.reason) == ("bn2", True)
    message = (
        f"no BatchNorm left: 1 left: bn2; bn2: {entry.reason}; or teach it with normswap.register_norm, or leave it "
        "alone with exclude=; convert with check=False to look at the result"
    )
    with pytest.raises(normswap.CheckFailed, match=f"^{re.escape(message)}$"):
        normswap.convert(model, example_input=broken.X)


class Asking(nn.Module):
    """A network that adds something by what its code finds its layers to be."""

    def __init__(self, asks: Callable[["Asking"], bool]) -> None:
        super().__init__()
        self.conv, self.bn, self.asks = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), asks

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y if self.asks(self) else y.sigmoid()


ASKING = {
    "class of a norm, or one made of it": lambda net: isinstance(net.bn, nn.BatchNorm2d),
    "very class of a norm": lambda net: type(net.bn) is nn.BatchNorm2d,
    "attribute that holds it": lambda net: net.bn.__class__ == nn.BatchNorm2d,
    "class of a convolution": lambda net: type(net.conv) is nn.Conv2d,
    "buffers": lambda net: len(list(net.buffers())) == 3,
    "text": lambda net: "BatchNorm" in str(net.bn),
}


@pytest.mark.parametrize("asks", ASKING.values(), ids=ASKING)
def test_other_operators_after_conversion_are_found(asks: Callable[[Asking], bool]) -> None:
    model = Asking(asks).eval()
    with pytest.raises(normswap.CheckFailed, match="^shapes: sigmoid in the network did not run before; its code may"):
        normswap.convert(model, example_input=broken.X)
    converted = normswap.convert(model, example_input=broken.X, check=False)
    assert not normswap.check(converted, model).rows[0].ok


def test_layers_that_are_called_past_their_hooks_are_no_other_operators() -> None:
    """A norm of one value becomes a scale and a shift, which then run in the network itself."""

    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 1, 8), nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn.forward(self.conv.forward(x))

    converted = normswap.convert(Past().eval(), example_input=torch.zeros(2, 3, 8, 8))
    assert type(converted.bn) is ChannelScale


def test_a_layer_that_is_chosen_by_values_is_no_layer_left_out() -> None:
    """A second pass takes the other; that a norm besides is never reached is no reason to miss the first."""

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)])
            self.bn, self.unused = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.convs[int(x.sum() > 0)](x))  # type: ignore[no-any-return]

    assert isinstance(normswap.convert(Choosing(), example_input=torch.ones(2, 3, 8, 8)).bn, nn.GroupNorm)
