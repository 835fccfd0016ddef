"""A kernel is kept while a layer is only evaluated, and until anything that it is made from changes."""

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

import normswap
from normswap.layers.convs import WeightStandardized, WSConv2d
from normswap.layers.keeping import KEPT, _places

EPS = 1e-6


def layer(*, adaptive: bool = True, **options: Any) -> WSConv2d:
    torch.manual_seed(0)
    return WSConv2d.of(nn.Conv2d(6, 8, 3, **options), adaptive=adaptive, eps=EPS).eval()


def expected(conv: Any, x: Tensor) -> Tensor:
    """Return the convolution by plain torch: standardized filters, gain and offset."""
    weight = conv._parameters["weight"].detach().clone().contiguous()
    var, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    kernel = (weight - mean) / (var + EPS).sqrt()
    if conv.ws_gain is not None:
        kernel = kernel * conv.ws_gain.view(-1, 1, 1, 1)
    if conv.ws_offset is not None:
        kernel = kernel + conv.ws_offset.view(-1, 1, 1, 1)
    return F.conv2d(x, kernel, None if conv.bias is None else conv.bias.detach())


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note every layer that standardizes."""
    found: list[Any] = []
    real = WeightStandardized.fresh_kernel

    def noting(self: WeightStandardized) -> Tensor:
        found.append(self)
        return real(self)

    monkeypatch.setattr(WeightStandardized, "fresh_kernel", noting)
    return found


X = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1))

PASSES: dict[str, Callable[[], Any]] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "standard"])
def test_passes_without_gradient_standardize_once(mode: Any, adaptive: bool, made: list[Any]) -> None:
    conv = layer(adaptive=adaptive)
    with mode():
        outputs = [conv(X) for _ in range(3)]
    assert len(made) == 1
    assert all(close(output, expected(conv, X)) for output in outputs)


def test_frozen_filters_are_kept_where_gradients_pass_through(made: list[Any]) -> None:
    conv = layer().requires_grad_(False)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    for _ in range(2):
        conv(x).square().sum().backward()
        expected(conv, y).square().sum().backward()
    assert len(made) == 1
    assert close(x.grad, y.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("then", PASSES.values(), ids=PASSES)
def test_what_one_mode_kept_serves_the_other(first: Any, then: Any) -> None:
    conv = layer()
    with first():
        conv(X)
    with then():
        assert close(conv(X), expected(conv, X))
    conv.train()
    loss = conv(X).square().sum()
    loss.backward()
    assert conv.weight.grad.abs().sum() > 0


def test_a_recorded_gradient_is_the_filters(made: list[Any]) -> None:
    conv = layer()
    with torch.no_grad():
        conv(X)
    conv(X).square().sum().backward()
    assert conv.weight.grad.abs().sum() > 0
    assert len(made) == 2


def test_train_gives_the_memory_back() -> None:
    conv = layer()
    with torch.no_grad():
        conv(X)
    kernel = weakref.ref(KEPT[conv].kernel)
    conv.train()
    gc.collect()
    assert kernel() is None
    with torch.no_grad():
        assert close(conv(X), expected(conv, X))
    assert conv not in KEPT


def _optimizer(conv: Any) -> None:
    with torch.enable_grad():
        conv(X).square().sum().backward()
    torch.optim.SGD(conv.parameters(), 0.1).step()


def _data_replaced_twice(conv: Any) -> None:
    for _ in range(8):  # memory of what was there before is used again
        conv.weight.data = torch.randn(8, 6, 3, 3)


def _load(conv: Any, assign: bool) -> None:
    torch.manual_seed(3)
    state = {key: torch.randn_like(value) for key, value in conv.state_dict().items()}
    conv.load_state_dict(state, assign=assign)


def _numpy(conv: Any) -> None:
    conv.weight.detach().numpy()[...] *= 3
    conv.weight.detach().numpy()[:4] += 1


def _ema(conv: Any) -> None:
    for parameter in conv.parameters():
        parameter.data.mul_(0.9).add_(0.1 * torch.randn_like(parameter))


def _new_parameter(conv: Any) -> None:
    conv.weight = nn.Parameter(torch.randn(8, 6, 3, 3))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda conv: conv.weight.mul_(-2).add_(0.3),
    "one value in place": lambda conv: conv.weight[3, 2, 1].fill_(9),
    "through a view": lambda conv: conv.weight.detach().view(-1)[5:9].zero_(),
    "optimizer": _optimizer,
    "data": lambda conv: setattr(conv.weight, "data", torch.randn(8, 6, 3, 3)),
    "data, many times": _data_replaced_twice,
    "data, in place": _ema,
    "data, one filter": lambda conv: conv.weight.data[2].neg_(),
    "data, one input channel": lambda conv: conv.weight.data[:, 4].zero_(),
    "data, one position": lambda conv: conv.weight.data[:, :, 2, 1].zero_(),
    "numpy": _numpy,
    "new parameter": _new_parameter,
    "load_state_dict": lambda conv: _load(conv, False),
    "load_state_dict, assigned": lambda conv: _load(conv, True),
    "gain in place": lambda conv: conv.ws_gain.mul_(2),
    "gain's data": lambda conv: conv.ws_gain.data.mul_(2),
    "new gain": lambda conv: setattr(conv, "ws_gain", conv.ws_gain * 3),
    "offset's data": lambda conv: conv.ws_offset.data.add_(1),
    "offset in place": lambda conv: conv.ws_offset.add_(1),
    "new offset": lambda conv: setattr(conv, "ws_offset", conv.ws_offset + 1),
    "channels last": lambda conv: conv.to(memory_format=torch.channels_last),
    "bias": lambda conv: conv.bias.add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", PASSES.values(), ids=PASSES)
def test_a_change_is_noticed(change: Callable[[Any], Any], mode: Any) -> None:
    conv = layer()
    with mode():
        conv(X)
    with torch.no_grad():
        change(conv)
    with mode():
        assert close(conv(X), expected(conv, X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_another_type(dtype: torch.dtype) -> None:
    conv = layer()
    with torch.no_grad():
        conv(X)
        conv.to(dtype)
        found = conv(X.to(dtype))
        fresh = F.conv2d(X.to(dtype), conv.standardized_weight(), conv.bias)
    assert found.dtype is dtype
    assert torch.equal(found, fresh)


def test_autocast_has_a_kernel_of_its_own(made: list[Any]) -> None:
    conv = layer()
    with torch.no_grad():
        plain = conv(X)
        with torch.autocast("cpu", torch.bfloat16):
            half = conv(X)
        again = conv(X)
    assert plain.dtype is again.dtype is torch.float32
    assert half.dtype is torch.bfloat16
    assert torch.equal(plain, again)
    assert len(made) == 3


def test_the_modes_of_the_network_reach_its_layers(made: list[Any]) -> None:
    model = normswap.convert(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)), example_input=X)
    model.train()
    made.clear()
    with torch.no_grad():
        for _ in range(2):
            model(X)
    assert len(made) == 2
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            model(X)
    assert len(made) == 3


def test_nothing_of_it_is_copied_pickled_or_saved() -> None:
    conv = layer()
    clean = len(pickle.dumps(conv)), set(conv.state_dict()), set(vars(conv))
    with torch.no_grad():
        conv(X)
    assert (len(pickle.dumps(conv)), set(conv.state_dict()), set(vars(conv))) == clean
    twins = [copy.deepcopy(conv), copy.copy(conv), pickle.loads(pickle.dumps(conv))]
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    twins.append(torch.load(buffer, weights_only=False))
    assert not any(twin in KEPT for twin in twins)
    with torch.no_grad():
        twins[0].weight.mul_(2).add_(1)
        assert close(conv(X), expected(conv, X))
        assert all(close(twin(X), expected(twin, X)) for twin in twins)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_setting_the_mode_shows_what_torch_does_not_tell(mode: str) -> None:
    conv = layer()
    with torch.no_grad():
        conv(X)
        conv.weight.data[7, 5, 2, 2] += 3
        getattr(conv, mode)()
        assert close(conv(X), expected(conv, X))


def test_a_layer_that_is_gone_keeps_nothing() -> None:
    conv = layer()
    with torch.no_grad():
        conv(X)
    kernel = weakref.ref(KEPT[conv].kernel)
    del conv
    gc.collect()
    assert kernel() is None


def test_folding_shares_nothing_with_what_is_kept() -> None:
    model = nn.Sequential(layer())
    with torch.no_grad():
        before = model(X)
        folded = normswap.fold(model)
        folded[0].weight.zero_()  # type: ignore[index, union-attr, operator]
        model[0].standardized_weight().zero_()  # type: ignore[union-attr, operator]
        assert torch.equal(model(X), before)


def test_functional_call_and_vmap_standardize_what_they_are_given() -> None:
    conv = layer()
    other = {key: torch.randn_like(value) for key, value in conv.state_dict().items()}
    twin = layer()
    twin.load_state_dict(other)
    with torch.no_grad():
        conv(X)
        assert close(torch.func.functional_call(conv, other, (X,)), expected(twin, X))
        assert close(conv(X), expected(conv, X))
        pairs = {key: torch.stack([value, other[key]]) for key, value in conv.state_dict().items()}
        both = torch.func.vmap(lambda state: torch.func.functional_call(conv, state, (X,)))(pairs)
        assert close(both[0], expected(conv, X))
        assert close(both[1], expected(twin, X))
        one = torch.func.vmap(lambda x: conv(x[None])[0])(X)
        assert close(one, expected(conv, X))


def test_gradients_of_functions_reach_the_filters() -> None:
    conv = layer()
    with torch.no_grad():
        conv(X)
        state = {key: value.detach() for key, value in conv.state_dict().items()}
        slope = torch.func.grad(lambda own: torch.func.functional_call(conv, own, (X,)).square().sum())(state)
    assert slope["weight"].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Using len to get tensor shape")
def test_a_trace_holds_the_filters_and_no_kernel() -> None:
    conv = layer()
    with torch.no_grad():
        conv(X)
        traced = torch.jit.trace(conv, X)
        traced.weight.mul_(-1).add_(0.5)
        assert close(traced(X), expected(traced, X))


def test_an_exported_program_holds_the_filters_and_no_kernel() -> None:
    conv = layer()
    with torch.no_grad():
        conv(X)
        program = torch.export.export(conv, (X,))
    assert {"weight", "bias", "ws_gain", "ws_offset"} == set(program.state_dict)
    assert not program.constants
    with torch.no_grad():
        assert close(program.module()(X), expected(conv, X))


def test_compiled_code_standardizes_in_its_graph() -> None:
    conv = layer()
    compiled = torch.compile(conv, backend="eager")
    with torch.no_grad():
        conv(X)
        compiled(X)
        conv.weight.mul_(-1).add_(0.5)
        assert close(compiled(X), expected(conv, X))


def test_pruned_filters_are_not_kept() -> None:
    conv = layer()
    with torch.no_grad():
        conv(X)
        before = conv(X)
    torch.nn.utils.prune.random_unstructured(conv, "weight", 0.5)
    with torch.no_grad():
        assert not torch.equal(conv(X), before)
        conv.weight_mask.zero_()  # type: ignore[union-attr, operator]
        assert close(conv(X), conv.bias.detach().view(1, -1, 1, 1).expand(2, 8, 3, 3))  # type: ignore[union-attr]


class Own(nn.Parameter):
    """A parameter of another class, which may compute what torch's functions see."""


@torch.no_grad()
def test_parameters_of_other_classes_are_not_kept(made: list[Any]) -> None:
    conv = layer()
    conv(X)
    conv.weight = Own(conv.weight)  # the same memory
    for _ in range(2):
        conv(X)
    assert made == [conv] * 3


def test_parameters_made_in_inference_mode_have_no_version() -> None:
    with torch.inference_mode():
        conv = layer()
        conv(X)
        conv.weight.mul_(-1).add_(0.5)
        assert close(conv(X), expected(conv, X))
    assert conv not in KEPT


def test_the_meta_device() -> None:
    conv = layer()
    with torch.no_grad():
        conv(X)
        assert conv.to("meta")(X.to("meta")).is_meta
    assert conv not in KEPT


def test_threads_get_what_one_gets() -> None:
    conv = layer()
    found: list[Tensor] = []

    def run() -> None:
        with torch.inference_mode():
            found.extend(conv(X) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(close(output, expected(conv, X)) for output in found)


def test_the_default_device_is_not_where_values_are_looked_at() -> None:
    conv, x = layer().requires_grad_(False), torch.randn(1, 6, 5, 5)
    _places.cache_clear()
    with torch.device("meta"):
        found = conv(x)
    look = KEPT[conv].origin.look
    assert look is not None
    assert look.places.is_cpu
    assert found.equal(conv(x))
