"""What a plan warns of."""

import re
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


class Watched(Direct):
    """Has a hook that notes what its convolution makes: on the network that it was made for, or on what calls it."""

    def watch(self, known: bool) -> "Watched":
        self.seen: dict[str, torch.Tensor] = {}
        if known:
            self.conv.register_forward_hook(lambda _m, _args, output: self.seen.update(conv=output))
        else:
            self.conv.register_forward_hook(self.note)
        return self

    def note(self, _module: torch.nn.Module, _args: Any, output: torch.Tensor) -> None:
        self.seen["conv"] = output


def test_a_hook_that_knows_the_network_is_warned_of() -> None:
    """A copy's hook wrote to the original, and the copy went on with what that had seen."""
    x = torch.zeros(2, 3, 8, 8)
    plans = [normswap.inspect(Watched(conv=conv(), bn=bn()).watch(known), example_input=x) for known in (True, False)]
    (warning,) = plans[0].warnings
    assert re.fullmatch(
        r"conv._forward_hooks\[\d+\] \(a function\) knows the network itself, and of a converted copy it goes on with "
        r"the original's: make it a method, which is copied, or convert with inplace=True",
        warning,
    )
    assert plans[1].warnings == ()
    model = Watched(conv=conv(), bn=bn()).watch(True)
    result = normswap.convert(model, example_input=x, inplace=True)
    result(x)
    assert result.seen["conv"].shape == (2, 8, 8, 8)
