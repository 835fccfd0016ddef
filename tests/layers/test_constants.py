"""Gain and offset stay what they are, whatever trains the network, and go wherever it goes."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nets import CASES, warm
from torch import Tensor, nn

import normswap
from normswap.layers.convs import WeightStandardized, ws_class

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def converted(name: str = "pre-activation") -> nn.Module:
    torch.manual_seed(0)
    return normswap.convert(warm(CASES[name].build()), example_input=X).train()


def constants(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if key.endswith(("ws_gain", "ws_offset"))}


def decayed(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.1, weight_decay=0.5)


def momentum(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.5)


@pytest.mark.parametrize("optimizer", [decayed, momentum])
@pytest.mark.parametrize("case", ["pre-activation", "transposed", "conv subclass"])
def test_no_unfreezing_and_no_optimizer_moves_them(case: str, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model = converted(case)
    before = constants(model)
    assert before
    model.requires_grad_(False)
    model.requires_grad_(True)
    for p in model.parameters():
        p.requires_grad = True
    stepping = optimizer(model.parameters())
    for _ in range(3):
        stepping.zero_grad()
        model(X).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        stepping.step()
    assert all(value.equal(before[key]) for key, value in constants(model).items())


def test_every_parameter_has_a_gradient_and_one_of_second_order() -> None:
    model = converted().double()
    found = torch.autograd.grad(model(X.double()).square().mean(), list(model.parameters()), create_graph=True)
    assert all(gradient.isfinite().all() for gradient in found)
    again = torch.autograd.grad(sum(g.square().sum() for g in found), list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in again)


def test_they_are_moved_cast_copied_pickled_and_swapped_with_the_network() -> None:
    model = converted().eval()
    expected, keys = model(X), set(constants(model))
    written = io.BytesIO()
    torch.save(model.state_dict(), written)
    written.seek(0)
    state = torch.load(written, weights_only=True)
    other = copy.deepcopy(model)
    for value in other.state_dict().values():
        value.zero_()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(X).equal(expected)
    assert torch.func.functional_call(other, dict(model.state_dict()), (X,)).equal(expected)
    assert not other(X).equal(expected)
    other.load_state_dict(state)
    assert other(X).equal(expected)
    assert {value.dtype for value in constants(model.double()).values()} == {torch.float64}
    meta = other.to("meta")
    assert all(value.is_meta for value in meta.state_dict().values())
    meta.load_state_dict(state, assign=True)
    assert meta(X).equal(expected)
    assert set(constants(meta)) == keys
    empty = meta.to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert empty(X).equal(expected)


def test_ensembles_have_each_its_own() -> None:
    models = [converted().eval() for _ in range(2)]  # of one epsilon, which is no tensor
    for value in models[1].state_dict().values():
        value.add_(torch.rand_like(value))
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (X,))

    together = torch.func.vmap(run)(parameters, buffers)
    for found, model in zip(together, models, strict=True):
        torch.testing.assert_close(found, model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_copy_on_meta_runs_with_real_parameters(kind: type[nn.Module]) -> None:
    layer = ws_class(kind).of(kind(3, 6, 3), adaptive=True)
    away = copy.deepcopy(layer).to("meta")
    found = torch.func.functional_call(away, dict(layer.named_parameters()), (X,))
    assert found.equal(layer(X))


def test_only_real_buffers_are_told_of_one_layer() -> None:
    layer = ws_class(nn.Conv2d).of(nn.Conv2d(3, 6, 3), adaptive=True)
    layer.register_buffer("mask", torch.ones(1))
    assert [buffer is layer.mask for buffer in layer.buffers()] == [True]
    assert [name for name, _ in layer.named_buffers()] == ["ws_gain", "ws_offset", "mask"]
    assert len(list(nn.Sequential(layer).buffers())) == 3


def test_two_passes_before_one_backward_under_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = converted()
        want = copy.deepcopy(model)
        (want(X) - want(X.flip(0)).square()).mean().backward()
        parallel = nn.parallel.DistributedDataParallel(model.requires_grad_(True))
        (parallel(X) - parallel(X.flip(0)).square()).mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    for ours, theirs in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_standardized_layers_are_there() -> None:
    assert sum(isinstance(module, WeightStandardized) for module in converted().modules()) == 2
