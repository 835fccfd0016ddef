"""Methods that fold norms leave a converted network as it is, and raise where they would go on folding."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import timm
import torch
from nets import Direct, conv, warm
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

import normswap


class Folds(Direct):
    """As most packages fold: whatever is called bn must be a BatchNorm."""

    def fuse(self) -> "Folds":
        if hasattr(self, "bn"):
            self.conv = fuse_conv_bn_eval(self.conv, self.bn)  # type: ignore[type-var,arg-type]
            self.bn = nn.Identity()
        return self


class Looks(Folds):
    """Folds where there is a BatchNorm."""

    def fuse(self) -> "Folds":
        return super().fuse() if isinstance(self.bn, nn.BatchNorm2d) else self


class FoldsOn(nn.Module):
    """Adds a shortcut to filters that are taken to be folded by then."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Looks(conv=conv(8, 8), bn=nn.BatchNorm2d(8))
        self.fused = False

    @torch.no_grad()
    def fuse(self) -> "FoldsOn":
        self.branch.fuse()
        for channel in range(8):
            self.branch.conv.weight[channel, channel, 1, 1] += 1  # type: ignore[union-attr,index,operator]
        self.fused = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) if self.fused else x + self.branch(x)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [Folds, Looks], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("held", ["itself", "copied", "pickled"])
def test_a_network_without_batch_norm_stays_as_it_is(kind: type[Direct], held: str) -> None:
    model = normswap.convert(warm(kind(conv=conv(), bn=nn.BatchNorm2d(8))))
    model = {"itself": lambda m: m, "copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}[held](
        model
    )
    before, state = model(X), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match=rf"^{kind.__name__}.fuse\(\) finds no BatchNorm to fold: the network stays"):
        assert model.fuse() is model  # type: ignore[operator]
    assert torch.equal(model(X), before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_folding_on_raises() -> None:
    model = normswap.convert(warm(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), FoldsOn())))
    before = model(X)
    with pytest.raises(
        normswap.UnsupportedModel, match=r"^2\.fuse\(\) folds BatchNorm into convolutions and this network has none"
    ):
        model[2].fuse()  # type: ignore[operator]
    assert torch.equal(model(X), before)


def norm_count(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", "repvgg_a0 mobileone_s0 fastvit_t8 repvit_m0_9 levit_128s repghostnet_050".split())
def test_timm_reparameterizes_nothing(name: str) -> None:
    model = timm.create_model(name).eval()
    plan = normswap.inspect(model)
    assert any("fold BatchNorm" in warning for warning in plan.warnings)
    result = normswap.apply(model, plan)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        before = result(x)
        again = reparameterize_model(result)
        assert torch.equal(again(x), before)
    assert any("finds no BatchNorm to fold" in str(warning.message) for warning in said)
    norms, left = (norm_count(network) for network in (model, reparameterize_model(model)))
    assert left < norms


@pytest.mark.filterwarnings("ignore:.*finds no BatchNorm to fold")
def test_timm_raises_where_it_would_fold_on() -> None:
    result = normswap.convert(timm.create_model("efficientvim_m1").eval(), check=False)
    message = r"\(\) folds BatchNorm into convolutions and this network has none"
    with pytest.raises(normswap.UnsupportedModel, match=message):
        reparameterize_model(result)


def test_what_is_left_of_batch_norm_can_be_folded() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Folds(conv=conv(), bn=nn.BatchNorm2d(8)), Folds(conv=conv(8), bn=nn.BatchNorm2d(8))

        def forward(self, x: Tensor) -> Any:
            return self.two(self.one(x))

    model = normswap.convert(warm(Two()), exclude="two", keep="live").eval()
    before = model(X)
    model.two.fuse()  # type: ignore[union-attr,operator]
    torch.testing.assert_close(model(X), before)
    assert isinstance(model.two.bn, nn.Identity)  # type: ignore[union-attr]
