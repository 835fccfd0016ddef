"""Every hazard net: planned as expected, converted, checked, and rebuilt from its state."""

import pytest
import torch
from equality import assert_same_output, assert_same_state
from nets import CASES, Case, FunctionalNorm, conv
from torch import nn

import normswap


def converted(case: Case) -> tuple[nn.Module, nn.Module, normswap.Plan]:
    model = case.build().eval()
    plan = normswap.inspect(model, example_input=torch.zeros(case.shape))
    return model, normswap.apply(model, plan), plan


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_plan(case: Case) -> None:
    plan = normswap.inspect(case.build(), example_input=torch.zeros(case.shape))
    assert {entry.name: entry.groups for entry in plan.norms} == case.norms
    assert {entry.name for entry in plan.convs if entry.changes} == case.convs
    reasons = {entry.name: entry.reason for entry in plan.convs if not entry.changes}
    for name, part in case.kept.items():
        assert any(text in reasons[name] for text in part.split("|")), reasons[name]
    assert case.warns in " ".join(plan.warnings)
    assert bool(plan.warnings) == bool(case.warns)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_plan_survives_json(case: Case) -> None:
    import json

    plan = normswap.inspect(case.build(), example_input=torch.zeros(case.shape))
    assert normswap.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


WHOLE = {name: case for name, case in CASES.items() if name != "function inside"}


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_checks_hold(case: Case) -> None:
    model, result, _ = converted(case)
    checks = normswap.check(result, model)
    assert checks, str(checks)


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_rebuilt_from_state(case: Case) -> None:
    _, result, plan = converted(case)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    again = normswap.apply(case.build().eval(), plan)
    again.load_state_dict(result.state_dict())
    x = torch.randn(case.shape)
    assert_same_state(again, result)
    assert_same_output(again(x), result(x))


def test_one_value_a_sample_is_scaled_and_not_erased() -> None:
    case = CASES["one value"]
    model = case.build()
    for tensor, value in ((model.bn.running_mean, 3.0), (model.bn.running_var, 4.0)):
        nn.init.constant_(tensor, value)
    model.eval()
    result = normswap.convert(model)
    x = torch.randn(case.shape)
    torch.testing.assert_close(result(x), model(x))
    assert model(x).std() > 0


def test_activation_inside_a_function_is_not_lost_silently() -> None:
    case = CASES["function inside"]
    with pytest.raises(normswap.NothingToConvert, match="bn: its forward also computes relu"):
        normswap.convert(case.build(), example_input=torch.zeros(case.shape))


def test_functional_batch_norm_fails_the_check() -> None:
    model = FunctionalNorm(conv=conv(), bn=nn.BatchNorm2d(8))
    with pytest.raises(normswap.CheckFailed, match="no BatchNorm left: 1 left: the model \\(calls batch_norm\\)"):
        normswap.convert(model, example_input=torch.zeros(2, 3, 8, 8))


def test_rare_dropout_does_not_fail_the_check() -> None:
    rare = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Dropout(0.01))
    checks = normswap.check(normswap.convert(rare, example_input=torch.zeros(2, 3, 8, 8)))
    assert checks, checks
    assert "every layer with parameters" in str(checks)
