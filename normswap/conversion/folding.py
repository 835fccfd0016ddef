"""Fold weight-standardized convolutions back into plain ones, for deployment."""

from dataclasses import replace

from torch import nn

from normswap.conversion.carried_plan import carried_plan, carry_plan
from normswap.conversion.surgery import replace_modules
from normswap.layers.convs import plain_conv
from normswap.networks.copying import copy_model
from normswap.networks.network import Network
from normswap.networks.settings import own_settings
from normswap.networks.validation import unwrap
from normswap.planning.choices import Action
from normswap.planning.entry import ConvEntry


@own_settings()
def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace every weight-standardized convolution by a plain one with the kernel it uses.

    >>> deployed = fold(converted)

    The function is the same to float32 rounding; what standardization costs is gone. Training goes on unstandardized,
    so fold when training is over.

    Args:
        model: A converted network, or any that holds normswap's convolutions.
        inplace: Change `model` itself instead of a copy.

    Returns:
        The folded network; its plan says which convolutions were folded.

    Raises:
        UnsupportedModel: It cannot be copied.
    """
    model = unwrap(model)
    model = model if inplace else copy_model(model)
    model = replace_modules(model, {id(conv): plain_conv(conv) for _, conv in Network(model).standardized()})
    plan = carried_plan(model)
    if plan is not None:
        carry_plan(model, plan.with_entries({entry.name: _folded(entry) for entry in plan.convs if entry.changes}))
    return model


def _folded(entry: ConvEntry) -> ConvEntry:
    reason = f"weight standardization ({entry.ws}) folded in"
    return replace(entry, action=Action.KEEP, reason=reason, ws=None, eps=None)
