"""Converted layers and networks in torch.compile's own code against the same in float64."""

import copy
import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import normswap
from normswap.demo.digits import BasicBlock
from normswap.layers.standardization import EPS, standardize

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile needs a compiler and Python's headers",
)

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
ROUNDING = 32
"""Units of the type's epsilon, relative to the largest value and to what the normalization makes of it."""

VALUES: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "normal": torch.randn,
    "constant": lambda shape: torch.full(shape, 0.1),
    "zero": torch.zeros,
    "tiny": lambda shape: 1e-6 * torch.randn(shape),
    "huge": lambda shape: 1e4 * torch.randn(shape),
    "far from zero": lambda shape: 1 + 1e-3 * torch.randn(shape),
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def compiled(module: Any) -> tuple[Any, CompileCounterWithBackend]:
    """Compile for every size, and count the graphs."""
    backend = CompileCounterWithBackend("inductor")
    return torch.compile(module, backend=backend, dynamic=True, fullgraph=True), backend


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result and the gradient of a weighted sum of it."""
    x = x.clone().requires_grad_()
    result = function(x)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape).sin()
    (grad,) = torch.autograd.grad(result, x, weights)
    return result.detach().double(), grad.double()


def group_norm(x: Tensor) -> Tensor:
    return F.group_norm(x, 2)


@TYPES
@pytest.mark.parametrize(
    ("function", "shapes", "eps"),
    [(standardize, [(6, 36)], EPS), (group_norm, [(2, 8, 6, 7), (3, 8, 9, 5)], 1e-5)],
    ids=["filters", "activations"],
)
def test_functions(function: Any, shapes: list[tuple[int, ...]], eps: float, dtype: torch.dtype) -> None:
    ours, _ = compiled(function)
    for shape in shapes:
        for name, make in VALUES.items():
            x = make(shape).to(dtype)
            (found, slope), (wanted, steep) = with_gradient(ours, x), with_gradient(function, x.double())
            grouped = x.double() if function is standardize else x.double().view(shape[0], 2, -1)
            rstd = (grouped.var(-1, correction=0) + eps).rsqrt().max()
            unit = ROUNDING * (torch.finfo(dtype).eps if function is group_norm else torch.finfo(torch.float32).eps)
            largest = x.double().abs().max()
            off = unit * (wanted.abs().max() + rstd * largest)
            assert (found - wanted).abs().max() <= off, name
            off = ROUNDING * torch.finfo(dtype).eps * steep.abs().max() + unit * largest * rstd**2
            assert (slope - steep).abs().max() <= off, name


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, stride=2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def network() -> nn.Module:
    torch.manual_seed(0)
    model = SmallResNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    converted = normswap.convert(model, example_input=torch.randn(2, 3, 12, 12))
    assert any(hasattr(module, "ws_gain") for module in converted.modules())
    return converted


def step(runner: Any, model: nn.Module, x: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """Return the outputs and, in train mode, the gradients of all parameters, in one row."""
    model.zero_grad()
    with torch.set_grad_enabled(model.training), torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = runner(x)
    if not model.training:
        return output.double(), output.double()
    output.double().sin().sum().backward()
    return output.detach().double(), torch.cat(
        [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    )


@pytest.mark.parametrize("half", [False, True], ids=["f32", "autocast bf16"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_network(training: bool, half: bool) -> None:
    """No further from float64 than four times what eager is, for other sizes in eval mode by the same graph."""
    model = network().train(training)
    exact = copy.deepcopy(model).double()
    runner, backend = compiled(model)
    eps = torch.finfo(torch.bfloat16 if half else torch.float32).eps
    step(runner, model, torch.randn(4, 3, 12, 10), half)
    graphs = backend.frame_count
    for shape in [(4, 3, 12, 10), (3, 3, 20, 14)]:
        for name, make in VALUES.items():
            x = make(shape)
            found, eager, wanted = (
                step(runner, model, x, half),
                step(model, model, x, half),
                step(exact, exact, x.double(), False),
            )
            for a, b, c in zip(found, eager, wanted, strict=True):
                assert torch.isfinite(a).all(), name
                assert (a - c).abs().max() <= 4 * (b - c).abs().max() + ROUNDING * eps * c.abs().max(), name
    assert backend.frame_count <= graphs + training, "compiled again"  # once in train mode: BatchNorm in bf16, too
    assert not counters["graph_break"]


class Wrapped(nn.Sequential):
    """A network of which one layer was compiled by itself."""

    def __init__(self, compiled: int) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self[compiled] = torch.compile(self[compiled], backend="eager")


def test_a_layer_that_was_compiled_alone_is_left_with_the_way_on() -> None:
    x, way = torch.randn(2, 3, 8, 8), "torch.compile was called on it alone, .*: compile it after that"
    with pytest.raises(normswap.CheckFailed, match=rf"1 left: 1._orig_mod; 1._orig_mod: {way}"):
        normswap.convert(Wrapped(1), example_input=x)
    plan = normswap.inspect(Wrapped(0), example_input=x)
    assert re.match(way, {entry.name: entry.reason for entry in plan.convs}["0._orig_mod"])
    plain = Wrapped(0)
    plain[1].compile(backend="eager")  # its replacement is not compiled, and needs no wrapper
    result = normswap.convert(plain, example_input=x)
    assert isinstance(result[1], nn.GroupNorm)  # type: ignore[index]
    assert normswap.check(result, plain)
