"""torch's own tools, and timm's averages, on converted networks."""

import copy
from typing import Any

import pytest
import torch
from nets import conv, moved
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules, get_default_qat_qconfig, prepare_qat
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import normswap

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def original() -> nn.Sequential:
    model = nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, stride=2), nn.BatchNorm2d(8),
        nn.ReLU(), conv(8, 4),
    )  # fmt: skip
    for _ in range(3):
        model(X + torch.randn(X.shape))
    return model.eval()


@pytest.fixture
def converted() -> nn.Module:
    return normswap.convert(original(), example_input=X)


def stepped(model: nn.Module, rate: float = 0.1) -> None:
    """Train one step."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_fx_graph_is_converted() -> None:
    graph = torch.fx.symbolic_trace(original())
    result = normswap.convert(graph, example_input=X)
    assert isinstance(result, torch.fx.GraphModule)
    assert sum(isinstance(module, nn.GroupNorm) for module in result.modules()) == 2
    torch.manual_seed(1)
    plain = original()
    graph = torch.fx.symbolic_trace(plain)
    ours = normswap.convert(plain, example_input=X)
    torch.testing.assert_close(normswap.convert(graph, example_input=X)(X), ours(X))


def test_fx_traces_the_standardization_and_not_its_result(converted: nn.Module) -> None:
    graph = torch.fx.symbolic_trace(converted)
    assert torch.equal(graph(X), converted(X))
    assert not any("tensor_constant" in name for name in vars(graph) | graph._buffers)
    stepped(converted)
    reference = copy.deepcopy(converted)
    again = copy.deepcopy(graph)  # its parameters are those of the network
    torch.testing.assert_close(again(X), reference(X))
    stepped(again)
    stepped(reference)
    torch.testing.assert_close(again(X), reference(X))
    assert not torch.equal(reference[0].weight, converted[0].weight)  # type: ignore[index]


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of every shape
def test_traced_and_scripted(converted: nn.Module) -> None:
    moved(converted)
    assert torch.equal(torch.jit.trace(converted, X)(X), converted(X))
    with pytest.raises(normswap.UnsupportedModel, match=r"cannot compile a WSConv2d; script normswap.fold\(model\)"):
        torch.jit.script(converted)
    scripted = torch.jit.script(normswap.fold(converted))
    torch.testing.assert_close(scripted(X), converted(X))
    assert type(converted[0]).__name__ == "WSConv2d"  # type: ignore[index]


def test_a_shallow_copy_is_converted_beside_its_original() -> None:
    model = original()
    result = normswap.convert(copy.copy(model), example_input=X)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(result[1], nn.GroupNorm)  # type: ignore[index]
    assert torch.equal(copy.copy(result)(X), result(X))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_weights(converted: nn.Module, use_buffers: bool) -> None:
    averaged = AveragedModel(converted, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    averaged.update_parameters(converted)
    with torch.no_grad():
        averaged(X)  # what it keeps is not to outlive the update
    first = {key: value.clone() for key, value in converted.named_parameters()}
    stepped(converted)
    averaged.update_parameters(converted)
    by_hand = copy.deepcopy(converted)
    with torch.no_grad():
        for key, value in by_hand.named_parameters():
            value.copy_((value + first[key]) / 2)
    update_bn([X], averaged)
    with torch.no_grad():
        torch.testing.assert_close(averaged(X), by_hand(X))
    assert normswap.plan_of(averaged.module) == normswap.plan_of(converted)


def test_timm_averages(converted: nn.Module) -> None:
    averaged = ModelEmaV3(converted, decay=0.5)
    with torch.no_grad():
        averaged.module(X)
    first = {key: value.clone() for key, value in converted.named_parameters()}
    stepped(converted)
    averaged.update(converted)
    by_hand = copy.deepcopy(converted)
    with torch.no_grad():
        for key, value in by_hand.named_parameters():
            value.copy_((value + first[key]) / 2)
    with torch.no_grad():
        torch.testing.assert_close(averaged.module(X), by_hand(X))


def test_nothing_is_fused(converted: nn.Module) -> None:
    before = converted(X)
    assert torch.equal(fuse(copy.deepcopy(converted))(X), before)
    with pytest.raises(AttributeError, match="running_mean"):
        fuse_conv_bn_eval(converted[0], converted[1])  # type: ignore[index]
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fuse_modules(converted, [["0", "1", "2"]])
    assert torch.equal(converted(X), before)


def test_a_norm_added_later_is_not_fused_in_silence(converted: nn.Module) -> None:
    """Its scales went to filters, of which standardization takes the scale back."""
    conv, norm = copy.deepcopy(converted[0]), nn.BatchNorm2d(converted[0].out_channels).eval()  # type: ignore[index]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    with pytest.raises(normswap.UnsupportedModel, match=r"filters scaled, .* takes normswap.fold\(model\)"):
        fuse_conv_bn_eval(conv, norm)
    plain = normswap.fold(converted)[0]  # type: ignore[index]
    torch.testing.assert_close(fuse_conv_bn_eval(plain, norm)(X), norm(conv(X)))
    decayed = nn.Parameter(0.999 * conv.weight.detach())
    conv.weight = decayed
    assert conv.weight is decayed
    scaled = {key: value * (2 if key == "weight" else 1) for key, value in conv.state_dict().items()}
    conv.load_state_dict(scaled, assign=True)


@pytest.mark.filterwarnings("ignore")
def test_quantization_aware_training_after_folding(converted: nn.Module) -> None:
    def prepared(model: nn.Module) -> Any:
        model = model.train()
        model.qconfig = get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
        return prepare_qat(model)

    def off(found: Tensor) -> float:
        return float((found - converted(X)).abs().max() / converted(X).abs().max())

    model = prepared(normswap.fold(converted))
    model(X)
    assert isinstance(model[0], torch.ao.nn.qat.Conv2d)
    print(f"{off(model(X)):.2f}")
    assert off(model(X)) < 0.15
    assert not isinstance(prepared(copy.deepcopy(converted))[0], torch.ao.nn.qat.Conv2d)
