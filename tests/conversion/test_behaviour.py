"""Checks by numbers where a network is random, has no numbers, or gives something else by mode."""

import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import broken
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import normswap


def row(model: nn.Module, name: str) -> normswap.Check:
    converted = normswap.convert(model, example_input=broken.X)
    return next(row for row in normswap.check(converted, model).rows if row.name == name)


class Moody(nn.Module):
    """A layer with a parameter that computes something else in train mode."""

    def __init__(self, moody: bool) -> None:
        super().__init__()
        self.weight, self.moody = nn.Parameter(torch.ones(4)), moody

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (2 if self.training and self.moody else 1)


@pytest.mark.parametrize("moody", [False, True], ids=["same", "other"])
def test_where_a_network_is_random_its_layers_are_compared(moody: bool) -> None:
    found = row(broken.Net(nn.Dropout(0.5), Moody(moody)), "train() equals eval()")
    assert found.ok is not moody
    assert found.detail.endswith("(every layer with parameters; the network itself differs by mode)")


def test_a_network_that_gives_more_in_train_mode_is_compared_by_layer() -> None:
    class Auxiliary(broken.Net):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return (y, y) if self.training else y

    found = row(Auxiliary(), "train() equals eval()")
    assert found.ok
    assert "the network itself differs by mode" in found.detail


@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_layers_whose_kernel_moves_in_train_mode_are_left_in_eval_mode(
    spectral_norm: Callable[[nn.Module], nn.Module],
) -> None:
    """Both divide by an estimate that each pass in train mode improves."""
    torch.manual_seed(0)
    found = row(broken.Net(spectral_norm(nn.Conv2d(8, 8, 3))), "train() equals eval()")
    assert found.ok
    assert "the network itself differs by mode" in found.detail


def test_on_the_meta_device_there_are_no_numbers() -> None:
    with torch.device("meta"):
        model = broken.Net()
    rows = normswap.check(normswap.convert(model, example_input=broken.X), model).rows
    assert [(row.name, row.ok) for row in rows] == [
        ("shapes", True), ("no BatchNorm left", True), ("numbers", None),
    ]  # fmt: skip


def summed(x: Tensor) -> Tensor:
    return x.sum(0)


def listed(x: Tensor) -> list[Tensor]:
    return list(x.unbind())


def leaking(x: Tensor) -> list[Tensor]:
    return list((x + x.sum(0)).unbind())


class After(broken.Net):
    def __init__(self, then: Callable[[Tensor], Tensor | list[Tensor]]) -> None:
        super().__init__()
        self.then = then

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:  # type: ignore[override]
        return self.then(super().forward(x))


@pytest.mark.parametrize(
    ("then", "ok", "detail"),
    [
        (summed, None, "no output has one row per sample"),
        (listed, True, "changing the other samples moves a sample by"),
        (leaking, False, "changing the other samples moves a sample by"),
    ],
    ids=["sum", "list", "list that leaks"],
)
def test_batch_independence_by_what_a_network_gives(
    then: Callable[[Tensor], Tensor | list[Tensor]], ok: bool | None, detail: str
) -> None:
    found = row(After(then), "batch independence")
    assert found.ok is ok
    assert found.detail.startswith(detail)


def test_one_sample_cannot_tell_of_others() -> None:
    model = broken.Net()
    checks = normswap.check(normswap.convert(model, example_input=broken.X[:1]), model)
    assert ("batch independence", None, "the example holds one sample") in [
        (row.name, row.ok, row.detail) for row in checks.rows
    ]


def test_frozen_networks_want_no_gradient() -> None:
    found = row(broken.Net().requires_grad_(False), "gradients")
    assert (found.ok, found.detail) == (None, "no parameter wants a gradient")


def test_modes_flags_and_gradients_stay_as_they_were() -> None:
    model = broken.Net().eval()
    converted = normswap.convert(model, example_input=broken.X).train()
    converted.conv1.requires_grad_(False)  # type: ignore[union-attr]
    assert normswap.check(converted, model)
    assert converted.training
    assert not model.training
    assert not converted.conv1.weight.requires_grad  # type: ignore[union-attr]
    assert all(p.grad is None for p in [*model.parameters(), *converted.parameters()])


Pair = namedtuple("Pair", ["logits", "name"])


@dataclass
class Data:
    logits: Tensor


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.itself = logits, self


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def nested(logits: Tensor) -> dict[str, Any]:
    return {"scores": [{"a": Plain(logits)}]}


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "named tuple": lambda x: Pair(x, "cat"),
    "dataclass": Data,
    "class": Plain,
    "class with slots": Slots,
    "model output": lambda x: ModelOutput(logits=x),
    "nested": nested,
    "array": lambda x: x.detach().numpy() if not x.is_meta else x,
    "numbers": lambda x: x.tolist() if not x.is_meta else x,
    "set": lambda x: {x},
    "nested tensor": lambda x: torch.nested.nested_tensor(list(x)) if not x.is_meta else x,
    "eight bits": lambda x: x.to(torch.float8_e5m2),
    "complex number": lambda x: complex(x.sum()) if not x.is_meta else x,
    "number of an array": lambda x: x.detach().numpy().sum() if not x.is_meta else x,
}


class Centred(nn.Module):
    """A norm of one's own that no recognition knows: it takes the batch's mean in train mode, and has a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        return y - y.mean((0, 2, 3), keepdim=True) if self.training else y


class Halved(Centred):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        return y / 2 if self.training else y


@pytest.mark.parametrize(("kind", "said"), [(Centred, True), (Halved, False)])
def test_samples_that_are_mixed_in_train_mode_alone_are_told_of(kind: Callable[[], nn.Module], said: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), kind(), nn.ReLU()).eval()
    checks = normswap.check(normswap.convert(model, example_input=broken.X), model)
    (found,) = (row for row in checks.rows if row.name == "train() equals eval()")
    assert ("mixes samples in train mode" in found.detail) is said


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("moody", [False, True], ids=["same", "other"])
def test_outputs_are_looked_at_wherever_they_are(holder: Callable[[Tensor], Any], moody: bool) -> None:
    model = broken.Net(last=Moody(moody))
    converted = normswap.convert(model, example_input=broken.X)
    for net in (model, converted):
        net.register_forward_hook(lambda _m, _a, output: holder(output))
    found = {row.name: row for row in normswap.check(converted, example_input=broken.X).rows}
    assert found["finite"].ok
    assert found["train() equals eval()"].ok is not moody


def test_what_cannot_be_looked_at_is_said() -> None:
    converted = normswap.convert(broken.Net(last=Moody(True)), example_input=broken.X)
    handle = converted.register_forward_hook(lambda _m, _a, output: (value for value in output))
    found = {row.name: row for row in normswap.check(converted).rows}
    assert (found["finite"].ok, found["train() equals eval()"].ok) == (None, None)
    assert found["finite"].detail == "the output holds a generator: nothing that could be looked at"
    handle.remove()
    converted.register_forward_hook(lambda _m, _a, output: (output, print))
    (finite,) = (row for row in normswap.check(converted).rows if row.name == "finite")
    assert finite.detail == "outputs are finite; a builtin_function_or_method among them could not be looked at"


class Gated(nn.Module):
    """A branch that starts with zeros; the zero is a parameter of the given shape."""

    def __init__(self, body: nn.Module, *shape: int) -> None:
        super().__init__()
        self.body, self.gate = body, nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.body(x)


class Mean(nn.Module):
    """What reads the other samples, without statistics that anybody could recognize."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("shape", [(), (4,), (1, 4)], ids=["scalar", "channels", "matrix"])
@pytest.mark.parametrize(
    ("body", "name"),
    [(Moody(True), "train() equals eval()"), (Mean(), "batch independence")],
    ids=["by mode", "by batch"],
)
def test_a_gate_that_starts_at_zero_hides_nothing(body: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    assert row(broken.Net(last=Gated(body, *shape)), name).ok is False
    assert row(broken.Net(last=Gated(nn.Linear(4, 4), *shape)), name).ok


class Counting(nn.Module):
    """A training step that needs an attribute of BatchNorm, where there is data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not x.is_meta and self.bn.num_batches_tracked > 9:  # type: ignore[operator]
            self.bn.momentum = 0.01
        return self.bn(self.conv(x))


@pytest.mark.parametrize("given", [True, False], ids=["with the original", "without"])
def test_a_network_that_cannot_train_is_found(given: bool) -> None:
    model = Counting()
    converted = normswap.convert(model, example_input=broken.X)
    (failed,) = normswap.check(converted, model if given else None, example_input=broken.X).failed
    assert failed.name == "gradients"
    where = "'GroupNorm' object has no attribute 'num_batches_tracked' in bn, which was replaced"
    assert failed.detail == f"a step in train mode raises AttributeError: {where}"


def test_a_network_that_asks_for_targets_is_not_said_to_be_broken() -> None:
    class Detector(broken.Net):
        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:  # type: ignore[override]
            if self.training and targets is None:
                raise ValueError("targets should not be none")
            return super().forward(x)

    model = Detector()
    checks = normswap.check(normswap.convert(model, example_input=broken.X), model)
    assert checks
    assert checks.rows[-1].detail.endswith("; in train mode no pass ran (targets should not be none)")


def test_a_kernel_that_loses_its_gradient_in_train_mode_is_found() -> None:
    class Cut(broken.Net):
        cut = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn1(self.conv1(x)).relu()
            y = y.detach() if self.cut and self.training else y
            return self.head(self.pool(self.bn2(self.conv2(y)).relu()).mean((2, 3)))

    model = Cut()
    converted = normswap.convert(model, example_input=broken.X)
    converted.cut = True  # type: ignore[assignment]
    (failed,) = normswap.check(converted, model).failed
    assert failed.detail == "3 parameters lost theirs in train mode: bn1.bias, bn1.weight, conv1.weight"


class Contrast(nn.Module):
    """Compare every sample with every other."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.a, self.t = (nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)) for _ in range(2))
        self.softmax = softmax

    def forward(self, x: Tensor) -> Tensor:
        scores = self.a(x).mean((2, 3)) @ self.t(x).mean((2, 3)).T
        return scores.softmax(1) if self.softmax else scores


@pytest.mark.parametrize(("softmax", "ok"), [(False, True), (True, None)], ids=["scores", "softmax"])
@pytest.mark.parametrize("count", [2, 3])
def test_outputs_over_pairs_of_samples(softmax: bool, ok: bool | None, count: int) -> None:
    model, x = Contrast(softmax), torch.randn(count, 3, 9, 9)
    checks = normswap.check(normswap.convert(model, example_input=x), model, example_input=x)
    assert checks, checks
    assert next(row for row in checks.rows if row.name == "batch independence").ok is ok


class Neck(nn.Module):
    """Take a list of feature maps, as the neck of a detector does."""

    def __init__(self, leaks: bool = False) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(nn.Conv2d(c, 16, 1), nn.BatchNorm2d(16)) for c in (8, 12, 24))
        self.leaks = leaks

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        made = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        return [x + x.mean(0) for x in made] if self.leaks else made


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_list_of_feature_maps_is_no_list_of_samples(count: int) -> None:
    maps = [torch.randn(count, c, s, s) for c, s in ((8, 16), (12, 8), (24, 4))]
    for leaks in (False, True):
        model = Neck(leaks)
        converted = normswap.convert(model, example_input=(maps,))
        found = {row.name: row.ok for row in normswap.check(converted, model, example_input=(maps,)).rows}
        assert normswap.plan_of(converted).warnings == ()
        assert found["batch independence"] is (None if count == 1 else not leaks)
        assert found["batch size 1"]


def test_noise_in_eval_mode_is_no_dependence_on_the_batch() -> None:
    model = broken.Net(last=Noise())
    checks = normswap.check(normswap.convert(model, example_input=broken.X), model)
    assert checks, checks


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


@pytest.mark.parametrize("drawn", [random.random, np.random.rand], ids=["Python's", "numpy's"])
def test_a_network_for_which_python_or_numpy_draws_passes(drawn: Callable[[], float]) -> None:
    class Drawing(broken.Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (0.5 + drawn())

    model = Drawing()
    checks = normswap.check(normswap.convert(model, example_input=broken.X), model)
    assert checks, checks


def test_torchs_random_numbers_stay_as_they_were() -> None:
    model = broken.Net(last=nn.Dropout(0.5))
    converted, state = normswap.convert(model, example_input=broken.X), torch.get_rng_state()
    normswap.check(converted, model)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_are_looked_at_one_by_one() -> None:
    """As the backward pass comes to the first layer, those of the layers behind it are gone."""

    class Jealous(broken.Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            if y.requires_grad:
                y.register_hook(self.look)
            return self.head(self.pool(self.bn2(self.conv2(self.bn1(y).relu())).relu()).mean((2, 3)))

        def look(self, _: Tensor) -> None:
            if any(parameter.grad is not None for parameter in self.parameters()):
                raise MemoryError("gradients of all layers at once")

    assert row(Jealous(), "gradients").ok


def test_a_forward_that_cannot_be_watched_is_run_as_it_is() -> None:
    """Functions of torch.func refuse the hooks with which kernels are made again."""

    class Functional(broken.Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            slopes: Tensor = torch.func.grad(lambda z: z.square().sum())(y)
            return y + slopes

    assert row(Functional(), "gradients").ok


class Graph(nn.Module):
    """Samples are the nodes of a graph, which a sparse matrix holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        y: Tensor = self.last(torch.sparse.mm(edges, self.norm(self.first(x))))
        return y


EDGES = torch.eye(6) + torch.eye(6).flip(0)


@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr], ids=["coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_examples_stay_as_they_are(sparse: Callable[[Tensor], Tensor]) -> None:
    model, example = Graph(), (torch.randn(6, 4), sparse(EDGES))
    converted = normswap.convert(model, example_input=example)
    found = {row.name: row.ok for row in normswap.check(converted, model, example_input=example).rows}
    assert found["finite"]
    assert found["gradients"]
    assert all(ok is not False for ok in found.values())
    assert found["batch size 1"] is found["batch independence"] is None
    assert normswap.plan_of(converted).inputs is None  # shapes alone would make up a dense one


def test_images_that_are_sparse() -> None:
    model = broken.Net()
    sparse = nn.Sequential(Dense(), model)
    example = broken.X.relu().to_sparse()
    assert normswap.check(normswap.convert(sparse, example_input=example), sparse, example_input=example)


class Dense(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to_dense()


class Beside(broken.Net):
    """Returns a mean over the batch beside its logits, expanded to a row per sample."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, y.mean(0).expand_as(y)


def test_a_mean_over_the_batch_beside_other_outputs_is_not_the_conversions() -> None:
    model = Beside()
    result = normswap.convert(model, example_input=broken.X)
    checks = normswap.check(result, model)
    assert checks, checks
    detail = next(own.detail for own in checks.rows if own.name == "batch independence")
    assert detail.endswith("but for 1 of 2 outputs that mix samples as before")
    assert [own.name for own in normswap.check(result).failed] == ["batch independence"]
    leaking = Beside(last=Mean())
    assert not normswap.check(normswap.convert(leaking, example_input=broken.X), leaking)
