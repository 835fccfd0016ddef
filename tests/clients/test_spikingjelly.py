"""spikingjelly's networks in multi-step mode, (T, N, C, H, W), and step by step."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import moved
from torch import nn

import normswap
from normswap.layers.norms import GroupNormAct

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(4, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def functional() -> Any:
    reason = "needs loguru"
    return pytest.importorskip("spikingjelly.activation_based.functional", reason=reason, exc_type=ImportError)


def network(functional: Any, mode: str) -> nn.Module:
    from spikingjelly.activation_based import layer, neuron, surrogate

    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 16)):
        spikes = neuron.LIFNode(v_threshold=0.3, surrogate_function=surrogate.ATan())
        parts += [layer.Conv2d(inputs, outputs, 3, padding=1, bias=False), layer.BatchNorm2d(outputs), spikes]
    model = nn.Sequential(*parts, layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(16, 5))
    functional.set_step_mode(model, "m")
    for _ in range(8):
        model(3 * torch.randn_like(X) + 1)
        functional.reset_net(model)
    functional.set_step_mode(model, mode)
    return model.eval()


@pytest.mark.parametrize(("mode", "example"), [("m", X), ("s", X[0])], ids=["all steps", "one step"])
def test_networks_of_both_modes_convert_and_train(functional: Any, mode: str, example: torch.Tensor) -> None:
    model = network(functional, mode)
    converted = normswap.convert(model, example_input=example)
    assert isinstance(converted[1], GroupNormAct) is (mode == "m")  # type: ignore[index]
    assert normswap.check(converted, model, example_input=example)
    assert sum(entry.changes for entry in normswap.plan_of(converted).entries) == 4
    optimizer = torch.optim.Adam(converted.train().parameters(), 0.01)
    before = [p.detach().clone() for p in converted.parameters()]
    losses = []
    for _ in range(3):
        output = converted(example)
        loss = F.cross_entropy(output.mean(0) if mode == "m" else output, torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        functional.reset_net(converted)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, old) for p, old in zip(converted.parameters(), before, strict=True))


@torch.no_grad()
def test_all_steps_at_once_are_what_the_steps_are_in_turn(functional: Any) -> None:
    at_once = moved(normswap.convert(network(functional, "m"), example_input=X))
    in_turn = normswap.convert(network(functional, "s"), example_input=X[0])
    in_turn.load_state_dict(at_once.state_dict())
    for ours, theirs in ((at_once[1], in_turn[1]), (at_once[4], in_turn[4])):  # type: ignore[index]
        theirs.num_groups, theirs.eps = ours.num_groups, ours.eps
    found = at_once(X)
    expected = torch.stack([in_turn(step) for step in X])
    assert float(found.std()) > 0
    assert float((found - expected).abs().max()) < 1e-6
