"""Fold weight-standardized convolutions back into plain ones, for deployment."""

from dataclasses import replace

from torch import nn

from normswap.conversion.surgery import PLAN, replace_modules, set_plan
from normswap.layers.convs import WeightStandardized, plain_conv
from normswap.networks.copying import copy_model
from normswap.networks.validation import unwrap
from normswap.planning.plan import Action, Plan


def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace every weight-standardized convolution by a plain one with the kernel it uses.

    >>> deployed = fold(converted)

    The function is the same to float32 rounding; what standardization costs is gone. Training goes on unstandardized,
    so fold when training is over.

    Args:
        model: A converted network, or any that holds normswap's convolutions.
        inplace: Change `model` itself instead of a copy.
    """
    model = unwrap(model)
    model = model if inplace else copy_model(model)
    folded = {id(m): plain_conv(m) for m in model.modules() if isinstance(m, WeightStandardized)}
    model = replace_modules(model, folded)
    plan = vars(model).get(PLAN)
    if isinstance(plan, Plan):
        kept = {
            e.name: replace(
                e, action=Action.KEEP, reason=f"weight standardization ({e.ws}) folded in", ws=None, eps=None
            )
            for e in plan.convs
            if e.changes
        }
        set_plan(model, plan.with_entries(kept))
    return model
