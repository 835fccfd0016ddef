"""Kernels shared among micro-batches."""

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import timm
import torch
from equality import assert_same_output
from nets import warm
from torch import Tensor, nn
from torch.nn.utils import prune

import normswap
from normswap.layers import accumulation
from normswap.layers.convs import GIVEN, WeightStandardized, ws_class


def converted(name: str = "efficientnet_b0", **options: object) -> nn.Module:
    torch.manual_seed(0)
    return normswap.convert(warm(timm.create_model(name, drop_path_rate=0.0, drop_rate=0.0)), **options)  # type: ignore[arg-type]


def micro_batches(count: int) -> list[Tensor]:
    return list(torch.randn(count, 1, 3, 64, 64))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ws", ["adaptive", "standard"])
def test_gradients_are_those_of_separate_passes(ws: str) -> None:
    model = converted(ws=ws).double()
    other, batches = copy.deepcopy(model), [batch.double() for batch in micro_batches(3)]
    for batch in batches:
        other(batch).square().mean().backward()
    with normswap.accumulate(model):
        for batch in batches:
            model(batch).square().mean().backward()
    expected, found = gradients(other), gradients(model)
    assert found.keys() == expected.keys()
    assert len(found) > 100
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max().clamp_min(1e-12), name


class Mapped(nn.Sequential):
    """Runs its convolution on one sample at a time."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](torch.vmap(lambda sample: self[0](sample[None])[0])(x))  # type: ignore[no-any-return]


def test_functions_of_torch_func_standardize_for_themselves() -> None:
    model = normswap.convert(warm(Mapped(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), example_input=torch.zeros(2, 3, 6, 6))
    assert isinstance(model[0], WeightStandardized)  # type: ignore[index]
    x, own = torch.randn(2, 3, 6, 6), dict(model.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().mean()  # type: ignore[no-any-return]

    model(x).square().mean().backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    with normswap.accumulate(model):
        model(x).square().mean().backward()
        found = torch.func.grad(loss)(own)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients(model)[name], gradient)
        torch.testing.assert_close(found[name], gradient)


def test_filters_are_standardized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = converted("resnet18"), []
    plain = accumulation.SharedKernel.__init__
    monkeypatch.setattr(accumulation.SharedKernel, "__init__", lambda *args: calls.append(args[2]) or plain(*args))
    monkeypatch.setattr(WeightStandardized, "fresh_kernel", lambda _: pytest.fail("standardized once more"))
    with normswap.accumulate(model):
        for batch in micro_batches(4):
            model(batch).sum().backward()
    assert len(calls) == len(set(map(id, calls))) == sum(isinstance(m, WeightStandardized) for m in model.modules())


def test_gradients_add_to_those_there_were() -> None:
    model = converted("resnet18")
    (batch,) = micro_batches(1)
    model(batch).sum().backward()
    before = {name: gradient.clone() for name, gradient in gradients(model).items()}
    with normswap.accumulate(model):
        model(batch).sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * before[name], rtol=1e-5, atol=1e-6)


def step(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.1).step()


def load_again(model: nn.Module) -> None:
    model.load_state_dict(model.state_dict())


def call_with_other_weights(model: nn.Module) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.func.functional_call(model, state, (micro_batches(1)[0],))


def step_through_data(model: nn.Module) -> None:  # as sharpness-aware minimization does
    for p in model.parameters():
        p.data.add_(0.1)


def another_memory_format(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def another_type(model: nn.Module) -> None:
    model.double()


def other_constants(model: nn.Module) -> None:
    model.conv1.ws_offset.add_(1)  # type: ignore[operator, union-attr]


def another_epsilon(model: nn.Module) -> None:
    model.conv1.ws_eps = 1e-3  # type: ignore[union-attr, assignment]


CHANGES = [
    step, load_again, call_with_other_weights, step_through_data, another_memory_format, another_type, other_constants,
    another_epsilon,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_inside_are_an_error_and_not_a_wrong_number(change: Callable[[nn.Module], None]) -> None:
    model = converted("resnet18")
    (batch,) = micro_batches(1)
    with pytest.raises(normswap.WeightsChanged, match=r"conv1\.weight changed"):
        accumulated(model, lambda: (model(batch).sum().backward(), change(model)))
    model(batch.to(next(model.parameters()).dtype)).sum().backward()


def test_steps_on_weights_with_gaps_in_memory_are_noticed() -> None:
    model = converted("resnet18")
    wide = torch.randn(64, 6, 7, 7)
    model.conv1.weight = nn.Parameter(wide[:, ::2])
    (batch,) = micro_batches(1)
    with pytest.raises(normswap.WeightsChanged, match=r"^conv1\.weight changed"):
        accumulated(model, lambda: (model(batch).sum().backward(), step(model)))


def accumulated(model: nn.Module, run: Callable[[], object]) -> None:
    with normswap.accumulate(model):
        run()


def test_an_error_inside_leaves_nothing_behind() -> None:
    model = converted("resnet18")
    (batch,) = micro_batches(1)
    with pytest.raises(ZeroDivisionError):
        accumulated(model, lambda: (model(batch).sum().backward(), 1 / 0))
    first = model.conv1.weight.grad.clone()
    copy.deepcopy(model)
    model(batch).sum().backward()
    torch.testing.assert_close(model.conv1.weight.grad, 2 * first)


def test_evaluation_and_inference_inside() -> None:
    model = converted("resnet18")
    (batch,) = micro_batches(1)
    expected = model(batch)
    with normswap.accumulate(model):
        with torch.inference_mode():
            torch.testing.assert_close(model(batch), expected.detach())
        with torch.no_grad():
            assert not model(batch).requires_grad
        model(batch).sum().backward()
    assert model.conv1.weight.grad is not None


def test_frozen_weights_stay_frozen() -> None:
    model = converted("resnet18")
    model.conv1.weight.requires_grad_(False)
    with normswap.accumulate(model):
        model(micro_batches(1)[0]).sum().backward()
    assert model.conv1.weight.grad is None
    assert model.layer1[0].conv1.weight.grad is not None


def test_compiled() -> None:
    model = converted("resnet18")
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    batches = micro_batches(2)
    for one in (model, compiled):
        with normswap.accumulate(one):
            for batch in batches:
                one(batch).square().mean().backward()
    expected, found = gradients(model), gradients(compiled._orig_mod)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_refusals() -> None:
    model = converted("resnet18")
    with pytest.raises(normswap.UnsupportedModel, match="do not nest"):
        accumulated(model, lambda: accumulated(model, list))
    accumulated(model, list)


class DistributedDataParallel(nn.Module):
    """Known by its name: the real one needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_data_parallel_wrappers_are_refused() -> None:
    with pytest.raises(normswap.UnsupportedModel, match="DistributedDataParallel, which exchanges gradients"):
        accumulated(DistributedDataParallel(converted("resnet18")), list)


def test_copies_made_inside_share_nothing() -> None:
    model = converted("resnet18").eval()
    (batch,) = micro_batches(1)
    expected = model(batch)
    with normswap.accumulate(model):
        folded, copied = normswap.fold(model), copy.deepcopy(model)
    with normswap.accumulate(copied), torch.no_grad():
        assert_same_output(copied(batch), expected)
    assert not [name for name, module in folded.named_modules() if "_shared" in vars(module)]
    assert_same_output(folded(batch), expected)


def drops_a_micro_batch(model: nn.Module, x: Tensor) -> None:
    (1e3 * model(x)).square().mean().backward()
    model.zero_grad()
    model(x).square().mean().backward()


def names_what_it_wants(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward(inputs=list(model.parameters()))


def asks_for_gradients(model: nn.Module, x: Tensor) -> None:
    found = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    for p, gradient in zip(model.parameters(), found, strict=True):
        p.grad = gradient


def unfreezes(model: nn.Module, x: Tensor) -> None:
    model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    model(x).sum().backward()
    model[0].weight.requires_grad_(True)  # type: ignore[index, union-attr, operator]
    model(x).square().mean().backward()


def penalizes_gradients(model: nn.Module, x: Tensor) -> None:
    found = torch.autograd.grad(model(x).square().mean(), list(model.parameters()), create_graph=True)
    sum(gradient.square().sum() for gradient in found).backward()  # type: ignore[union-attr]


def clips_and_counts_on(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    model(x).sum().backward()


def runs_two_passes_in_one(model: nn.Module, x: Tensor) -> None:
    (model(x).square().mean() + model(x.flip(0)).sum()).backward()


def runs_in_another_thread(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    thread = threading.Thread(target=lambda: model(x).sum().backward())
    thread.start()
    thread.join()


STEPS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    step.__name__: step
    for step in (
        drops_a_micro_batch, names_what_it_wants, asks_for_gradients, unfreezes, penalizes_gradients,
        clips_and_counts_on, runs_two_passes_in_one, runs_in_another_thread,
    )
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_gradients_do_not_depend_on_sharing(kind: type[nn.Module], step: Callable[[nn.Module, Tensor], None]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(kind(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), kind(8, 8, 3), nn.BatchNorm2d(8))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model = normswap.convert(warm(net), example_input=x.float()).double()
    assert sum(isinstance(module, WeightStandardized) for module in model.modules()) == 2
    other = copy.deepcopy(model)
    step(other, x)
    with normswap.accumulate(model):
        step(model, x)
    expected, found = gradients(other), gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-9 * (1 + expected[name].abs().max()), name


def test_threads_share_nothing() -> None:
    model, seen = converted("resnet18"), []
    with normswap.accumulate(model):
        thread = threading.Thread(target=lambda: seen.append(model.conv1 in GIVEN.get()))
        thread.start()
        thread.join()
        assert model.conv1 in GIVEN.get()
    assert seen == [False]
    assert not GIVEN.get()


def test_pickled_and_pruned_inside() -> None:
    model = converted("resnet18").eval()
    prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)
    (batch,) = micro_batches(1)
    expected = model(batch).detach()
    with normswap.accumulate(model):
        assert_same_output(model(batch), expected)
        again = pickle.loads(pickle.dumps(model))
    assert_same_output(again(batch), expected)


class Slow(nn.Conv2d):
    """Waits for another thread between padding and reading its weight."""

    meet = threading.Barrier(2)

    def forward(self, x: Tensor) -> Tensor:
        self.meet.wait(30)
        output = nn.functional.conv2d(x, self.weight, self.bias)
        self.meet.wait(30)
        return output


def test_threads_do_not_take_each_others_kernels() -> None:
    torch.manual_seed(0)
    ws = ws_class(Slow).of(Slow(3, 8, 3), adaptive=True)
    with torch.no_grad():
        ws.weight.add_(torch.randn_like(ws.weight))
    x, found = torch.randn(2, 1, 3, 8, 8), {}
    expected = [torch.conv2d(one, ws.standardized_weight(), ws.bias) for one in x]
    threads = [threading.Thread(target=lambda i=i: found.update({i: ws(x[i])})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        torch.testing.assert_close(found[i], expected[i])
