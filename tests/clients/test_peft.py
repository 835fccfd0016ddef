"""PEFT: adapters on a converted network, adapters that a network carries into its conversion, and their merges."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.layers.convs import WeightStandardized

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
MERGED = 5e-6
"""Rounding of a float32 network of 20 convolutions; plain convolutions are off by as much."""

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CONVS = r".*conv\d|.*downsample\.0"
EARLY = r"layer[12].*conv\d"
ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=CONVS),
    "lora of two layers": lambda: peft.LoraConfig(r=4, target_modules=["layer1.0.conv1", "layer3.0.conv2"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=CONVS),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=CONVS),
    "adalora": lambda: peft.AdaLoraConfig(r=4, lora_alpha=64, target_modules=EARLY, total_step=10),
}
PRODUCTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=CONVS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=3, target_modules=EARLY),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=EARLY),
    "ia3": lambda: peft.IA3Config(target_modules=EARLY, feedforward_modules=[]),
    "ia3 of inputs": lambda: peft.IA3Config(target_modules=EARLY, feedforward_modules=EARLY),
}
"""Methods that make a product of the weight, or of its norm, and not a sum with it."""

each = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
each_and_products = pytest.mark.parametrize("adapter", (ADAPTERS | PRODUCTS).values(), ids=ADAPTERS | PRODUCTS)


def network() -> nn.Module:
    """A ResNet-18 with made-up statistics."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def moved(model: nn.Module, by: float = 0.05) -> None:
    """Move what trains, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))


def distance(ours: nn.Module | Tensor, theirs: nn.Module | Tensor) -> float:
    with torch.no_grad():
        a, b = (model(X) if isinstance(model, nn.Module) else model for model in (ours, theirs))
    return float((a - b).norm() / b.norm())


def trained(model: nn.Module) -> list[float]:
    """Take three steps and return the losses."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model.train()(X), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@each_and_products
@pytest.mark.parametrize("ws", ["adaptive", "standard"])
def test_adapters_train_and_merge_on_a_converted_network(adapter: Callable[[], peft.PeftConfig], ws: str) -> None:
    converted = normswap.convert(network(), ws=ws, example_input=X[:2])
    adapted = peft.get_peft_model(copy.deepcopy(converted), adapter())
    losses = trained(adapted)
    assert losses[-1] < losses[0]
    moved(adapted)
    assert distance(adapted, converted) > 0.02
    assert distance(copy.deepcopy(adapted).merge_and_unload(), adapted) < MERGED
    assert distance(copy.deepcopy(adapted).merge_and_unload(safe_merge=True), adapted) < MERGED
    assert distance(copy.deepcopy(adapted).unload(), converted) < MERGED


@each
def test_filters_that_have_trained_since_conversion_merge_too(adapter: Callable[[], peft.PeftConfig]) -> None:
    converted = normswap.convert(network(), example_input=X[:2])
    moved(converted)
    adapted = peft.get_peft_model(converted, adapter())
    moved(adapted)
    expected = adapted(X).detach()
    again = copy.deepcopy(adapted)
    for pass_between in (False, True):
        again.merge_adapter()
        assert not pass_between or distance(again, expected) < MERGED
        again.unmerge_adapter()
        assert distance(again, expected) < MERGED
    assert distance(adapted.merge_and_unload(), expected) < MERGED


@pytest.mark.parametrize("adapter", PRODUCTS.values(), ids=PRODUCTS)
def test_products_take_filters_that_have_trained_once_they_are_folded(adapter: Callable[[], peft.PeftConfig]) -> None:
    converted = normswap.convert(network(), example_input=X[:2])
    moved(converted)
    adapted = peft.get_peft_model(normswap.fold(converted), adapter())
    assert distance(adapted, converted) < MERGED
    moved(adapted)
    expected = adapted(X).detach()
    assert distance(adapted.merge_and_unload(), expected) < MERGED


def test_two_adapters_merge_one_after_the_other() -> None:
    model = normswap.convert(network(), example_input=X[:2])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=CONVS))
    moved(adapted)
    merged = adapted.merge_and_unload()
    both = peft.get_peft_model(merged, peft.LoraConfig(r=2, target_modules=CONVS))
    moved(both)
    expected = both(X).detach()
    assert distance(both.merge_and_unload(), expected) < MERGED


def by_state_dict(model: nn.Module, folder: Path) -> nn.Module:
    again = normswap.convert(network(), ws="adaptive", example_input=X[:2])
    again.load_state_dict(model.state_dict())
    return again


CARRIED: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "itself": lambda model, folder: model,
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "state dict": by_state_dict,
    "save and load": lambda model, folder: normswap.load(normswap.save(model, folder / "OUT")),
    "fold": lambda model, folder: normswap.fold(model),
    "another type and back": lambda model, folder: model.double().float(),
}


@pytest.mark.parametrize("carried", CARRIED.values(), ids=CARRIED)
def test_a_merge_goes_along_where_no_pass_has_run_since(
    carried: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    converted = normswap.convert(network(), ws="adaptive", example_input=X[:2])
    adapted = peft.get_peft_model(converted, peft.LoraConfig(r=4, target_modules=CONVS))
    moved(adapted)
    expected = adapted(X).detach()
    assert distance(carried(adapted.merge_and_unload(), tmp_path), expected) < MERGED


def test_what_merging_leaves_trains_standardized() -> None:
    converted = normswap.convert(network(), example_input=X[:2])
    adapted = peft.get_peft_model(converted, peft.LoraConfig(r=4, target_modules=CONVS))
    moved(adapted)
    merged = adapted.merge_and_unload().requires_grad_(True)
    expected = merged(X).detach()
    layers = [module for module in merged.modules() if isinstance(module, WeightStandardized)]
    assert len(layers) == 20
    assert all(bool(layer.weight.requires_grad) for layer in layers)
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(2)
    for layer in layers:  # a filter's scale is nothing to the convolution, but for the epsilon
        mean = layer.weight.mean((1, 2, 3), keepdim=True)
        spread = layer.weight.var((1, 2, 3), correction=0, keepdim=True).add(1e-6).sqrt()
        gain, offset = (value[:, None, None, None] for value in (layer.ws_gain, layer.ws_offset))
        oracle = (layer.weight - mean) / spread * gain + offset
        torch.testing.assert_close(layer.standardized_weight(), oracle, rtol=1e-4, atol=1e-5)
    assert distance(merged, expected) < 0.02


@each_and_products
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh adapters", "trained adapters"])
def test_adapters_that_a_network_carries_merge_after_its_conversion(
    adapter: Callable[[], peft.PeftConfig], fresh: bool
) -> None:
    adapted = peft.get_peft_model(network(), adapter())
    if not fresh:
        moved(adapted)
    converted = normswap.convert(adapted, example_input=X[:2])
    losses = trained(converted)
    assert losses[-1] < losses[0]
    moved(converted)
    expected = converted(X).detach()
    assert distance(converted.merge_and_unload(), expected) < MERGED


def test_the_plan_says_why_adapted_layers_stay_plain_and_what_to_do() -> None:
    adapted = peft.get_peft_model(network(), peft.LoraConfig(r=4, target_modules=["layer1.0.conv1"]))
    plan = normswap.inspect(adapted, example_input=X[:2])
    (entry,) = [entry for entry in plan.convs if entry.name.endswith("layer1.0.conv1.base_layer")]
    other = entry.name.replace("base_layer", "lora_B.default")
    assert entry.reason == f"adds up over one input with {other}, as a layer and its adapter do"
    assert sum(entry.changes for entry in plan.convs) == 19
    (warning,) = [warning for warning in plan.warnings if "adapter" in warning]
    assert "merge the adapters before converting" in warning
    merged = normswap.inspect(adapted.merge_and_unload(), example_input=X[:2])
    assert sum(entry.changes for entry in merged.convs) == 20
    assert not any("adapter" in warning for warning in merged.warnings)


@pytest.mark.parametrize("convert", [lambda net: net, lambda net: normswap.convert(net, example_input=X[:2])])
def test_transposed_convolutions_are_refused_converted_or_not(convert: Callable[[nn.Module], nn.Module]) -> None:
    net = convert(nn.Sequential(nn.ConvTranspose2d(3, 16, 3), nn.BatchNorm2d(16)).eval())
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
