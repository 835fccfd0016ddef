"""What stands for a method that folds norms into convolutions, on a module whose norms or convolutions are replaced."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import UnsupportedModel
from normswap.networks.copying import PLAIN, copy_model


class OnModule:
    """What stands for a method of a module, kept on the module itself: a copy's is the copy's.

    Args:
        module: The module that has the method.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Unfoldable(OnModule):
    """Leave a module as it is where its own method finds nothing to fold, and raise where it would fold all the same.

    Packages fold before they validate or export, whatever the network holds. The method runs on a copy: where it raises
    for want of a BatchNorm, or changes nothing, there is nothing to fold. What else it does is computed from filters
    and norms that mean something else now.

    Args:
        module: The module that has the method.
        method: The method's name.
        where: The method in words.
    """

    def __init__(self, module: nn.Module, method: str, where: str) -> None:
        super().__init__(module)
        self.method, self.where = method, where

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the module itself, as it is.

        Raises:
            UnsupportedModel: The method would change what the module computes.
        """
        if self._folds_on(*args, **kwargs):
            raise UnsupportedModel(
                f"{self.where}() folds BatchNorm into convolutions and this network has none left; "
                "fold before converting or not"
            )
        warnings.warn(
            f"{type(self.module).__name__}.{self.method}() finds no BatchNorm to fold: the network stays as it is, "
            "and computes what it did",
            stacklevel=2,
        )
        return self.module

    def _folds_on(self, *args: Any, **kwargs: Any) -> bool:
        copy = copy_model(self.module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                getattr(type(copy), self.method)(copy, *args, **kwargs)
            except UnsupportedModel:
                return True
            except Exception:  # it asks for what only BatchNorm has
                return False
        return not _same(self.module, copy)


def _same(module: nn.Module, other: nn.Module) -> bool:
    """Tell whether two modules hold the same, layer by layer; objects of any other kind are not looked at."""
    ours, theirs = dict(module.named_modules()), dict(other.named_modules())
    return ours.keys() == theirs.keys() and all(_same_layer(layer, theirs[name]) for name, layer in ours.items())


def _same_layer(layer: nn.Module, other: nn.Module) -> bool:
    ours, theirs = ({**m._parameters, **m._buffers} for m in (layer, other))
    held, again = (
        {key: value for key, value in vars(m).items() if type(value) in PLAIN and key != "training"}
        for m in (layer, other)
    )
    return (
        type(layer) is type(other)
        and held == again
        and ("forward" in vars(layer)) == ("forward" in vars(other))
        and ours.keys() == theirs.keys()
        and all(_same_tensor(tensor, theirs[key]) for key, tensor in ours.items())
    )


def _same_tensor(tensor: Tensor | None, other: Tensor | None) -> bool:
    if tensor is None or other is None:
        return tensor is other
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    return tensor.is_meta or torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)
