"""What holds for every network, drawn at random; HYPOTHESIS_PROFILE=thorough draws some thousand of them."""

import copy
import json
import tempfile
from typing import Any

import pytest
import torch
from equality import assert_same_output
from hypothesis import given
from hypothesis import strategies as st
from strategies import Drawn, convs, networks
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from normswap.layers.convs import WeightStandardized, ws_class
from normswap.layers.norms import ChannelScale
from normswap.layers.standardization import EPS


def converted(drawn: Drawn, **more: Any) -> nn.Module:
    return normswap.convert(drawn.model, example_input=drawn.x, **drawn.options, **more)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    """Whether two states hold the same names, types and bits."""
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(
        value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]) for key, value in ours.items()
    )


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@given(networks())
def test_apply_of_the_plan_is_convert(drawn: Drawn) -> None:
    plan = normswap.inspect(drawn.model, example_input=drawn.x, **drawn.options)
    result, applied = converted(drawn), normswap.apply(drawn.model, plan)
    assert normswap.plan_of(result) == plan
    assert repr(applied) == repr(result)
    assert same_tensors(applied, result)
    assert_same_output(run(applied.eval(), drawn.x), run(result.eval(), drawn.x))


@given(networks())
def test_a_plan_survives_json(drawn: Drawn) -> None:
    plan = normswap.inspect(drawn.model, example_input=drawn.x, **drawn.options)
    assert normswap.Plan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan


@given(networks())
def test_in_place_is_the_same_with_the_same_parameters(drawn: Drawn) -> None:
    result = converted(drawn)
    before = dict(drawn.model.named_parameters())
    changed = converted(drawn, inplace=True)
    assert changed is drawn.model
    assert same_tensors(changed, result)
    assert all(p is before[name] for name, p in changed.named_parameters() if name in before)


@given(networks())
def test_converting_twice_changes_nothing(drawn: Drawn) -> None:
    once = converted(drawn)
    for inplace in (False, True):
        with pytest.warns(normswap.AlreadyConverted, match="was converted before .*; unchanged$"):
            twice = normswap.convert(once, example_input=drawn.x, inplace=inplace, **drawn.options)
        assert (twice is once) is inplace
        assert repr(twice) == repr(once)
        assert same_tensors(twice, once)
        assert normswap.plan_of(twice) == normswap.plan_of(once)


@given(networks(), st.booleans())
def test_saved_and_loaded_is_the_same_bit_for_bit(drawn: Drawn, tuned: bool) -> None:
    result = converted(drawn).eval()
    if tuned:  # the file then holds the kernels, so that what is saved and what is loaded differ by rounding
        with torch.no_grad():
            for parameter in result.parameters():
                parameter.mul_(1.25)
    with tempfile.TemporaryDirectory() as folder:
        normswap.save(result, folder)
        loaded = normswap.load(folder, model=copy.deepcopy(drawn.model))
        again = normswap.load(normswap.save(loaded, folder), model=copy.deepcopy(drawn.model))
    if tuned:
        eps = torch.finfo(drawn.x.dtype).eps
        torch.testing.assert_close(run(loaded, drawn.x), run(result, drawn.x), rtol=64 * eps, atol=64 * eps)
    else:
        assert same_tensors(loaded, result)
        assert_same_output(run(loaded, drawn.x), run(result, drawn.x))
    assert same_tensors(again, loaded)
    assert normswap.plan_of(loaded) == normswap.plan_of(result)
    assert not any(flags(loaded).values())


@given(networks())
def test_folded_is_the_same_function(drawn: Drawn) -> None:
    """The kernel is the one the layer uses, rounded to the same type: only the order of a sum could differ."""
    result = converted(drawn)
    before = copy.deepcopy(result.state_dict())
    folded = normswap.fold(result)
    assert not any(isinstance(module, WeightStandardized) for module in folded.modules())
    assert_same_output(run(folded, drawn.x), run(result, drawn.x))
    assert flags(folded) == flags(result)
    assert all(torch.equal(value, before[key]) for key, value in result.state_dict().items())
    assert set(folded.state_dict()) == {key for key in before if not key.endswith(("ws_gain", "ws_offset"))}
    assert not any(entry.changes for entry in normswap.plan_of(folded).convs)


@given(networks())
def test_samples_do_not_see_each_other(drawn: Drawn) -> None:
    result = converted(drawn)
    others = drawn.x.clone()
    others[1:] = float("nan")
    assert torch.equal(run(result, others)[:1], run(result, drawn.x)[:1])
    assert not torch.isnan(run(result, drawn.x)).any()


@given(networks())
def test_train_is_eval_and_nothing_is_counted(drawn: Drawn) -> None:
    result = converted(drawn)
    before = copy.deepcopy(result)
    assert torch.equal(run(result.train(), drawn.x), run(result.eval(), drawn.x))
    assert same_tensors(result, before)
    assert {name.rpartition(".")[2] for name, _ in result.named_buffers()} <= {"ws_gain", "ws_offset"}


@given(networks())
def test_flags_types_and_hooks_are_carried(drawn: Drawn) -> None:
    model = drawn.model
    calls: list[str] = []
    hooked = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    for name, module in hooked:
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    run(copy.deepcopy(model).eval(), drawn.x)
    expected, wanted = list(calls), {name: p.requires_grad for name, p in model.named_parameters()}
    result = converted(drawn)
    calls.clear()
    run(result, drawn.x)
    assert calls == expected
    assert flags(result) == flags(model)
    assert {p.dtype for p in result.parameters()} <= {drawn.x.dtype}
    found = {name: p.requires_grad for name, p in result.named_parameters()}
    made = set(found) - set(wanted)
    assert {name: found[name] for name in wanted} == wanted
    assert not any(found[name] for name in made)
    affine = {f"{name}.{key}" for name, m in model.named_modules() if isinstance(m, _BatchNorm) and not m.affine
              for key in ("weight", "bias")}  # fmt: skip
    assert {name for name in made if not name.endswith(("ws_gain", "ws_offset"))} == affine


@given(networks())
def test_the_users_model_is_left_alone(drawn: Drawn) -> None:
    model, before = drawn.model, copy.deepcopy(drawn.model)
    slots = {name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    x = drawn.x.clone()
    result = converted(drawn)
    normswap.check(result, model, example_input=drawn.x)
    run(result, drawn.x).sum()
    normswap.fold(result, inplace=True)
    assert repr(model) == repr(before)
    assert same_tensors(model, before)
    assert flags(model) == flags(before)
    assert {name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()} == slots
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(drawn.x, x)
    memory = {p.data_ptr() for p in model.parameters()}
    assert not memory & {p.data_ptr() for p in result.parameters()}


@given(networks())
def test_every_norm_and_convolution_is_accounted_for(drawn: Drawn) -> None:
    model, result = drawn.model, converted(drawn)
    plan, made = normswap.plan_of(result), dict(result.named_modules())
    assert [e.name for e in plan.norms] == [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    assert [e.name for e in plan.convs] == [n for n, m in model.named_modules() if hasattr(m, "kernel_size")]
    assert all(entry.reason for entry in plan.entries)
    for entry in plan.norms:
        norm = made[entry.name]
        assert isinstance(norm, ChannelScale if entry.groups is None else nn.GroupNorm)
        if isinstance(norm, nn.GroupNorm):
            assert (norm.num_groups, norm.num_channels, norm.eps) == (entry.groups, entry.channels, entry.eps)
            assert entry.channels % norm.num_groups == 0
    for entry in plan.convs:
        assert isinstance(made[entry.name], WeightStandardized) is entry.changes
        assert drawn.options["ws"] != "none" or not entry.changes


@given(networks())
def test_the_checks_hold(drawn: Drawn) -> None:
    result = converted(drawn)
    checks = normswap.check(result, drawn.model, example_input=drawn.x)
    assert checks, str(checks)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, nn.Module, Tensor]:
    """A convolution in float64, its weight-standardized twin, and an input."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims, inputs, side = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    conv, _ = draw(convs(dims, inputs, side, same=draw(st.booleans())))
    conv.double()
    twin = ws_class(type(conv)).of(conv, adaptive=draw(st.booleans()))
    return conv, twin, torch.randn(2, inputs, *[side] * dims, dtype=torch.float64)


def plain_kernel(conv: nn.Module, weight: Tensor, gain: Tensor | None, offset: Tensor | None) -> Tensor:
    """gain·(w − mean)/√(var + eps) + offset, filter by filter; a transposed kernel is (in, out/groups, …)."""
    groups, outputs = int(conv.groups), int(conv.out_channels)  # type: ignore[arg-type]
    kernel = torch.zeros_like(weight)
    for channel in range(outputs):
        index: Any = channel
        if conv.transposed:
            share, rows = outputs // groups, weight.shape[0] // groups
            index = (slice(channel // share * rows, (channel // share + 1) * rows), channel % share)
        one = weight[index]
        mean = one.sum() / one.numel()
        var = (one - mean).pow(2).sum() / one.numel()
        value = (one - mean) / torch.sqrt(var + EPS)
        value = value if gain is None else value * gain[channel]
        value = value if offset is None else value + offset[channel]
        kernel = kernel.index_put(_coordinates(kernel, index), value)
    return kernel


def _coordinates(tensor: Tensor, index: Any) -> tuple[Tensor, ...]:
    places = torch.arange(tensor.numel()).view(tensor.shape)[index]
    return torch.unravel_index(places, tensor.shape)


@given(layers())
def test_outputs_and_gradients_are_those_of_the_formula(drawn: tuple[nn.Module, nn.Module, Tensor]) -> None:
    conv, twin, x = drawn
    x.requires_grad_()
    values = dict(conv.named_parameters())
    frozen = [None if p is None else p.detach() for p in (twin.ws_gain, twin.ws_offset)]  # type: ignore[union-attr]
    kernel = plain_kernel(conv, values["weight"], *frozen)
    ours, theirs = twin(x), functional_call(conv, values | {"weight": kernel}, (x,))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    away = torch.randn_like(ours)
    wanted = [x, *values.values()]
    found, expected = (torch.autograd.grad(y, wanted, away) for y in (ours, theirs))
    scale = 1 + max(float(g.abs().max()) for g in expected)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * scale)


@given(layers())
def test_gradients_pass_gradcheck_twice(drawn: tuple[nn.Module, nn.Module, Tensor]) -> None:
    conv, twin, x = drawn
    names, values = zip(*conv.named_parameters(), strict=True)
    torch.nn.init.normal_(values[0])  # small filters bend too much for the finite steps of gradcheck

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(twin, dict(zip(names, values, strict=True)), (x,))

    given_values = (x.requires_grad_(), *(v.detach().clone().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(output, given_values, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, given_values, fast_mode=True, atol=1e-3)
