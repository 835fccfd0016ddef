"""What a plan warns of."""

from typing import Any

import torch
from nets import CASES, Direct, bn, conv

import normswap


class Caching(Direct):
    """Folds a kernel as it is set to eval mode."""

    def train(self, mode: bool = True) -> "Caching":
        if not mode:
            self.fold()
        return super().train(mode)

    def fold(self) -> None:
        self.kernel = self.conv.weight / self.bn.running_var.sqrt()[:, None, None, None]


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


def test_a_mode_that_folds_is_warned_of() -> None:
    plan = normswap.inspect(Caching(conv=conv(), bn=bn()), example_input=torch.zeros(2, 3, 8, 8))
    assert plan.warnings[0].startswith("1 modules can fold BatchNorm into convolutions (the model, …)")
