"""Put replacements in the place of layers: the only file that changes a model."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from normswap.conversion.replacements import build_all
from normswap.errors import UnsupportedModel
from normswap.layers.in_place import entering, leaving
from normswap.networks.network import Network
from normswap.networks.recognition import fold_methods
from normswap.networks.references import references
from normswap.networks.unfoldable import Unfoldable
from normswap.planning.plan import Plan


def operate(network: Network, plan: Plan, borrowed: Collection[nn.Parameter] = (), *, own: bool = True) -> nn.Module:
    """Replace the layers that a plan names, in place, and nothing else.

    Every replacement is built before the first is put in place; an error leaves the model as it was.

    Args:
        network: The network, which the plan fits.
        plan: What to do.
        borrowed: Parameters that are in another network's memory; those that change get memory of their own.
        own: Whether the others get it, too.

    Returns:
        The model, or its replacement where the model itself is a layer that is replaced.

    Raises:
        UnsupportedModel: Values of parameters were to be changed that nobody may change.
    """
    waiting = {id(parameter): parameter for parameter in borrowed}
    replacements, changes = build_all(network, plan, at_once=waiting if own else ())
    if any(parameter.is_inference() for parameter, _ in changes if id(parameter) not in waiting):
        raise UnsupportedModel(
            f"parameters of {network.kind} were made in torch.inference_mode and cannot change; leave inplace=True out"
        )
    _fold_no_more(network, replacements)
    model = replace_modules(network.model, replacements)
    with torch.no_grad():
        for parameter, value in changes:
            if waiting.pop(id(parameter), None) is None:
                parameter.copy_(value())
            else:
                parameter.data = _laid_out_like(parameter, value())
        for parameter in waiting.values() if own else ():
            parameter.data = parameter.data.clone()
    return model


def _laid_out_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return a value that nothing else holds as it is to lie in memory."""
    same = value.stride() == parameter.stride() and value.dtype == parameter.dtype
    return value if same else torch.empty_like(parameter).copy_(value)


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Put every replacement, by ``id`` of its original, into every place that holds the original.

    Returns:
        The model, or its replacement where the model itself is replaced.
    """
    for place in list(references(model, replacements)):
        if place.slots is not None:
            place.slots[place.key] = replacements[place.to]
    for new in replacements.values():  # a convolution may hold its norm
        for key, child in new._modules.items():
            new._modules[key] = replacements.get(id(child), child)
    return replacements.get(id(model), model)


def switch_in_place_off(model: nn.Module) -> None:
    """Have activations make new tensors, and augmented assignments too where backward hooks look at their operand."""
    for module in model.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
    if entering not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(entering, prepend=True)
        model.register_forward_hook(leaving, always_call=True)


@torch.no_grad()
def fill(
    network: Network, values: Mapping[tuple[str, str], Tensor], attributes: Mapping[tuple[str, str], float]
) -> None:
    """Give tensors of a network new values, and attributes of its modules.

    Args:
        network: The network.
        values: Values by the module's name and the tensor's.
        attributes: Values by the module's name and the attribute's.
    """
    for (name, key), value in values.items():
        module = network.slots[name]
        (module._parameters if key in module._parameters else module._buffers)[key].copy_(value)  # type: ignore[union-attr]
    for (name, key), number in attributes.items():
        setattr(network.slots[name], key, number)


def _fold_no_more(network: Network, replacements: Mapping[int, nn.Module]) -> None:
    """Put something else in the place of methods that fold norms, on every module that loses a layer."""
    for name, module in network.modules.items():
        methods = fold_methods(module)
        if methods and any(id(inner) in replacements for inner in module.modules()):
            where = name or network.kind
            vars(module).update({method: Unfoldable(module, method, f"{where}.{method}") for method in methods})
