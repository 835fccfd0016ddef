"""Put replacements in the place of layers: the only file that changes a model."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from normswap.conversion.replacements import build_all
from normswap.errors import UnsupportedModel
from normswap.layers.convs import WeightStandardized
from normswap.layers.in_place import entering, leaving
from normswap.networks.network import Network
from normswap.networks.recognition import fold_methods
from normswap.networks.references import references
from normswap.planning.plan import Plan


def operate(network: Network, plan: Plan) -> nn.Module:
    """Replace the layers that a plan names, in place, and nothing else.

    Every replacement is built before the first is put in place; an error leaves the model as it was.

    Args:
        network: The network, which the plan fits.
        plan: What to do.

    Returns:
        The model, or its replacement where the model itself is a layer that is replaced.
    """
    replacements, changes = build_all(network, plan)
    _refuse_to_fold(network, replacements)
    model = replace_modules(network.model, replacements)
    with torch.no_grad():
        for parameter, value in changes:
            parameter.copy_(value())
    return model


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Put every replacement, by ``id`` of its original, into every place that holds the original.

    Returns:
        The model, or its replacement where the model itself is replaced.
    """
    for place in list(references(model, replacements)):
        if place.slots is not None:
            place.slots[place.key] = replacements[place.to]
    return replacements.get(id(model), model)


def switch_in_place_off(model: nn.Module) -> None:
    """Have activations make new tensors, and augmented assignments too where backward hooks look at their operand."""
    for module in model.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
    if entering not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(entering, prepend=True)
        model.register_forward_hook(leaving, always_call=True)


def _refuse_to_fold(network: Network, replacements: Mapping[int, nn.Module]) -> None:
    """Make the methods that fold BatchNorm raise on every module that loses one: some would return wrong numbers."""
    norms = {key for key, new in replacements.items() if not isinstance(new, WeightStandardized)}
    for name, module in network.modules.items():
        methods = fold_methods(module)
        if methods and any(id(inner) in norms for inner in module.modules()):
            where = name or network.kind
            vars(module).update({method: partial(_refuse, f"{where}.{method}") for method in methods})


def _refuse(method: str, *_: object, **__: object) -> None:
    raise UnsupportedModel(
        f"{method}() folds BatchNorm into convolutions and this network has none left; fold before converting or not"
    )
