"""The layers of a network in the order in which a forward pass reaches them, and the operators that a layer runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from normswap.errors import TransferFailed, described
from normswap.layers.convs import WeightStandardized
from normswap.layers.norms import ChannelScale
from normswap.networks.copying import copy_model, in_mode
from normswap.networks.inputs import call, fresh, tensors_in
from normswap.networks.randomness import normal, seed_all
from normswap.networks.surroundings import undisturbed


@dataclass(frozen=True)
class Layer:
    """A module with tensors of its own, at its first call.

    Attributes:
        name: Its first name.
        module: The module, of the copy that ran.
        input: Shape of the first tensor it was given.
    """

    name: str
    module: nn.Module
    input: tuple[int, ...]

    @property
    def role(self) -> tuple[Any, ...]:
        """What it is, and of which size: layers of one role can stand for each other."""
        own = own_tensors(self.module)
        weight = own.get("weight")
        if isinstance(self.module, (_ConvNd, WeightStandardized)) and weight is not None:
            return ("a convolution", tuple(weight.shape))
        if isinstance(self.module, ChannelScale):
            return ("a channel scale", (self.module.weight.numel(),))
        if isinstance(self.module, nn.GroupNorm) or (own.keys() == {"weight", "bias"} and _are_vectors(own)):
            size = getattr(self.module, "num_channels", None)
            return ("a norm", (int(size if size is not None else own["weight"].numel()),))
        return (f"a {type(self.module).__name__}", *sorted(tuple(tensor.shape) for tensor in own.values()))

    def __str__(self) -> str:
        kind, *sizes = self.role
        return f"{self.name or 'the network'} ({kind}, {' and '.join(map(str, sizes))})"


def _are_vectors(own: dict[str, Tensor]) -> bool:
    return all(tensor.ndim == 1 for tensor in own.values())


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and buffers by name, without those of its children."""
    return {key: value for key, value in (*module._parameters.items(), *module._buffers.items()) if value is not None}


@torch.no_grad()
def executed(model: nn.Module, example: Any) -> tuple[list[Layer], Any]:
    """Run a copy of a network in eval mode; return its layers in the order they were reached, and its output.

    Raises:
        TransferFailed: It does not run on the example.
    """
    copy = in_mode(copy_model(model), False)
    found: dict[int, Layer] = {}

    def entering(name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            shape = next((tuple(tensor.shape) for tensor in tensors_in((args, kwargs))), ())
            found.setdefault(id(module), Layer(name, module, shape))

        return note

    handles = [
        module.register_forward_pre_hook(entering(name), with_kwargs=True)
        for name, module in copy.named_modules()
        if own_tensors(module) or isinstance(module, nn.GroupNorm)
    ]
    with undisturbed(model):
        seed_all(0)
        try:
            output = call(copy, fresh(example))
        except Exception as error:  # whatever the network's own code does with it
            raise TransferFailed(
                f"{type(model).__name__} does not run on the example ({described(error)}); pass example_input="
            ) from error
    for handle in handles:
        handle.remove()
    return list(found.values()), output


class _Operands(TorchDispatchMode):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.found = name, list[tuple[Any, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func._schema.name == f"aten::{self.name}":
            self.found.append(tuple(a.clone() if isinstance(a, Tensor) else a for a in args))
        return func(*args, **(kwargs or {}))


@contextmanager
def operands_of(name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Yield the arguments of every call of an operator of torch within the block."""
    with _Operands(name) as mode:
        yield mode.found


@torch.no_grad()
def kernel_in_use(module: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None] | None:
    """Return the kernel and the bias that a convolution convolves with, whatever it makes them of; None where it fails.

    Args:
        module: The convolution, in eval mode; it runs on random values.
        shape: An input that it met.
    """
    weight = module._parameters.get("weight")
    like = weight if weight is not None else torch.empty(0)
    x = normal(shape, torch.Generator().manual_seed(0)).to(like)
    with operands_of("convolution") as found:
        try:
            module(x)
        except Exception:  # it does not run by itself
            return None
    if len(found) != 1:
        return None
    _, kernel, bias, *_ = found[0]
    return kernel, bias
