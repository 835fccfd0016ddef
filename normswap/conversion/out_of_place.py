"""Have a network's in-place operations go with other packages' backward hooks, as Opacus sets them."""

from torch import nn

from normswap.conversion.surgery import switch_in_place_off
from normswap.networks.copying import copy_model
from normswap.networks.settings import own_settings
from normswap.networks.validation import unwrap


@own_settings()
def out_of_place(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Make in-place operations behave where layers have backward hooks, which autograd does not let go together.

    >>> private = GradSampleModule(out_of_place(converted))

    Activations that work in place are switched off (``module.inplace = False``). Where the forward itself says
    ``out += shortcut`` on what a layer with a backward hook has returned, ``out`` becomes a new tensor; without such
    hooks it stays as it is. A forward pass costs some microseconds for each operator, and the memory that in-place
    operations save.

    Args:
        model: Any network, converted or not.
        inplace: Change `model` itself instead of a copy.

    Returns:
        The network; its function is the same.

    Raises:
        UnsupportedModel: It cannot be copied.
    """
    model = unwrap(model)
    model = model if inplace else copy_model(model)
    switch_in_place_off(model)
    return model
