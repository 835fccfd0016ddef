"""What a plan warns of."""

from typing import Any

import torch
from nets import CASES

import normswap


def plan_for(name: str, **options: Any) -> normswap.Plan:
    case = CASES[name]
    return normswap.inspect(case.build(), example_input=torch.zeros(case.shape), **options)


def test_warnings() -> None:
    assert plan_for("direct").warnings == ()
    assert plan_for("flattened batch").warnings == (
        "1 norms see a flattened batch (bn and others): "
        "GroupNorm takes its statistics from one row of it, not from one sample",
    )
    assert plan_for("dead code").warnings == (
        "1 norms were never reached (old_bn, …); their convolutions stay plain",
    )  # fmt: skip
    assert plan_for("fusable").warnings == (
        "1 modules can fold BatchNorm into convolutions (the model, …); "
        "that no longer works after conversion: fold before it, or not at all",
    )
