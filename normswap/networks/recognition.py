"""Which modules are BatchNorm-like and which are convolutions: decided by what they hold, or taught by the user."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.errors import InvalidOption, UnsupportedModel, described
from normswap.layers.convs import WeightStandardized

FOLDS = ("fuse", "reparameterize", "switch_to_deploy", "convert_to_deploy")
"""Methods by which networks fold a BatchNorm into its convolution, as timm and the papers' code name them."""


REGISTERED = ("_modules", "_parameters", "_buffers")
"""Where torch keeps what belongs to a module; what is kept elsewhere is neither saved nor moved."""

DEPTH = 4
"""Containers within containers that are looked into."""


@dataclass(frozen=True)
class NormParts:
    """What a BatchNorm-like module computes with.

    Attributes:
        num_channels: Channels C.
        eps: Added to the variance.
        weight: γ, shape (C,); None for one.
        bias: β, shape (C,); None for zero.
        mean: Running mean, shape (C,), or None.
        var: Running variance, shape (C,), or None.
        then: Modules by name that run after the normalization and must go on doing so; None where the trace tells.
    """

    num_channels: int
    eps: float = 1e-5
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    then: dict[str, nn.Module] | None = None

    def affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return γ and β, (C,), without gradient, of the type and device of `like`; 1 and 0 where there are none."""
        ones, zeros = like.new_ones(self.num_channels), like.new_zeros(self.num_channels)
        weight, bias = (None if value is None else value.detach().to(like) for value in (self.weight, self.bias))
        return ones if weight is None else weight, zeros if bias is None else bias

    @property
    def is_trained(self) -> bool:
        """Whether the statistics or the affine part have left their initial values, 0 and 1; never on meta."""
        for value, fresh in ((self.mean, 0), (self.var, 1), (self.bias, 0)):
            if value is not None and not value.is_meta and bool((value != fresh).any()):
                return True
        weight = self.weight  # some networks start with a weight of zero throughout
        return weight is not None and not weight.is_meta and bool((weight != weight[:1]).any())


_NORMS: dict[type[nn.Module], Callable[[nn.Module], NormParts]] = {}
_CONVS: set[type[nn.Module]] = set()


def register_norm(norm_class: type[nn.Module], parts: Callable[[nn.Module], NormParts]) -> None:
    """Teach normswap a norm class of your own.

    >>> register_norm(MyNorm, lambda m: NormParts(m.size, m.eps, m.gamma, m.beta, m.mean, m.var, {"act": m.activation}))

    Args:
        norm_class: The class; subclasses count too.
        parts: Function from a module of the class to what it computes with. Parameters among it are carried over.

    Raises:
        InvalidOption: `norm_class` is no class of modules of its own, or `parts` no function of one argument.
    """
    _must_be_own_class("register_norm", norm_class)
    try:
        inspect.signature(parts).bind(None)
    except TypeError as error:
        raise InvalidOption(
            f"register_norm: parts={parts!r:.60} is no function of one argument, the module; "
            "pass one that returns its NormParts"
        ) from error
    except ValueError:  # a function of C that does not tell its arguments
        pass
    _NORMS[norm_class] = parts


def register_conv(conv_class: type[nn.Module]) -> None:
    """Teach normswap that the ``weight`` of a class may be standardized although its forward computes with it first.

    >>> register_conv(MaskedConv2d)  # its forward convolves with self.weight * self.mask

    Inside the forward pass, reading ``self.weight``, of shape (out, in/groups, *kernel), then gives the standardized
    kernel. Convolution classes that read ``self.weight`` as it is need no registration.

    Raises:
        InvalidOption: `conv_class` is no class of modules of its own.
    """
    _must_be_own_class("register_conv", conv_class)
    _CONVS.add(conv_class)


def _must_be_own_class(function: str, given: Any) -> None:
    if isinstance(given, nn.Module):
        given = type(given)
        raise InvalidOption(f"{function}: this is a {given.__name__} and no class; pass {given.__name__} itself")
    if not isinstance(given, type) or not issubclass(given, nn.Module) or given in (nn.Module, nn.Sequential):
        raise InvalidOption(f"{function}: {given!r:.60} must be a class of your own, derived from nn.Module")


def is_registered_norm(module: nn.Module) -> bool:
    """Tell whether the user taught the module's class with `register_norm`."""
    return isinstance(module, tuple(_NORMS))


def is_registered_conv(module: nn.Module) -> bool:
    """Tell whether the user taught the module's class with `register_conv`."""
    return isinstance(module, tuple(_CONVS))


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether `module` normalizes by batch or running statistics.

    True for torch's BatchNorm family, for registered classes, and for duck types such as ``FrozenBatchNorm2d``: (C,)
    running statistics beside an affine part of the same size. Instance norms are not.
    """
    if isinstance(module, _InstanceNorm):
        return False
    if isinstance(module, _BatchNorm) or is_registered_norm(module):
        return True
    mean, var = _vector(module, "running_mean"), _vector(module, "running_var")
    if mean is None or var is None:
        return False
    affine = [_vector(module, key) for key in ("weight", "bias")]
    return (
        mean.shape == var.shape
        and all(value is None or value.shape == mean.shape for value in affine)
        and not _own_matrices(module)
    )


def norm_parts(norm: nn.Module) -> NormParts:
    """Return what a BatchNorm-like module computes with.

    A duck type that keeps its epsilon in its code gets 1e-5, which all known ones use.
    """
    registered = next((parts for cls, parts in _NORMS.items() if isinstance(norm, cls)), None)
    if registered is not None:
        return registered(norm)
    weight, bias, mean, var = (_vector(norm, key) for key in ("weight", "bias", "running_mean", "running_var"))
    channels = int(norm.num_features) if mean is None else mean.numel()  # type: ignore[arg-type]
    return NormParts(channels, float(getattr(norm, "eps", 1e-5)), weight, bias, mean, var)


def checked_parts(name: str, norm: nn.Module) -> NormParts:
    """Return what a norm computes with, or raise where that makes no sense.

    Raises:
        UnsupportedModel: With the norm's name.
    """
    advice = "correct it, or the function given to normswap.register_norm"
    try:
        parts = norm_parts(norm)
    except Exception as error:  # whatever the user's own function does
        raise UnsupportedModel(f"{name}: what it computes with is unknown ({described(error)}); {advice}") from error
    if not isinstance(parts, NormParts):
        raise UnsupportedModel(f"{name}: what it computes with is a {type(parts).__name__}, no NormParts; {advice}")
    if is_registered_norm(norm) and (flaw := _ill_made(parts) or misshapen(parts)):
        raise UnsupportedModel(f"{name}: {flaw}; {advice}")
    return parts


def _ill_made(parts: NormParts) -> str:
    """Return which part of a norm is of a type that nothing can be computed with; empty where none is."""
    if type(parts.num_channels) is not int:
        return f"its num_channels is {parts.num_channels!r:.60}, no whole number"
    if not isinstance(parts.eps, (int, float)) or not 0 <= parts.eps < math.inf:
        return f"its eps is {parts.eps!r:.60}, no number of at least 0"
    for key in ("weight", "bias", "mean", "var"):
        if not isinstance(value := getattr(parts, key), (Tensor, NoneType)):
            return f"its {key} is a {type(value).__name__}, no tensor"
    then: Any = parts.then
    if then is not None and not isinstance(then, dict):
        return f"its then is a {type(then).__name__}, no dict of modules by name"
    strange = [(name, module) for name, module in (then or {}).items() if not isinstance(module, nn.Module)]
    return f"its then holds {strange[0][0]}, a {type(strange[0][1]).__name__} and no module" if strange else ""


def misshapen(parts: NormParts) -> str:
    """Return which tensor of a norm is not one number a channel; empty where all are."""
    for key in ("weight", "bias", "mean", "var"):
        value = getattr(parts, key)
        if value is not None and tuple(value.shape) != (parts.num_channels,):
            return f"its {key} is {tuple(value.shape)}, for {parts.num_channels} channels"
    return ""


def is_unknown_norm(module: nn.Module) -> bool:
    """Tell whether a module keeps running statistics and is no known norm: BatchNorm of another layout, maybe."""
    known = is_batch_norm(module) or isinstance(module, _InstanceNorm)
    return not known and all(module._buffers.get(key) is not None for key in ("running_mean", "running_var"))


def carried_modules(norm: nn.Module) -> dict[str, nn.Module] | None:
    """Return the modules that the user said run after a norm, in order; None where the trace tells.

    A module that is a child of the norm keeps the child's name, whatever the user called it.
    """
    then = norm_parts(norm).then
    if then is None:
        return None
    children = {id(child): name for name, child in norm.named_children()}
    return {children.get(id(module), name): module for name, module in then.items()}


def computed_tensors(norm: nn.Module) -> list[str]:
    """Return the names under which a norm of torch's family holds tensors that something computes: a pruning mask.

    Those are neither its parameters nor its buffers, and a replacement would not have them.
    """
    if not isinstance(norm, _BatchNorm) or is_registered_norm(norm):
        return []
    own = {**norm._parameters, **norm._buffers}
    names = ("weight", "bias", "running_mean", "running_var")
    return [name for name in names if name not in own and isinstance(getattr(norm, name, None), Tensor)]


def is_conv(module: nn.Module) -> bool:
    """Tell whether `module` is a convolution of torch's family that is not weight-standardized yet."""
    return isinstance(module, _ConvNd) and not isinstance(module, WeightStandardized)


def has_kernel(module: nn.Module) -> bool:
    """Tell whether `module` holds a kernel to standardize: a parameter ``weight`` with three axes or more."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim >= 3 and not isinstance(module, WeightStandardized)


def out_channels(conv: nn.Module) -> int:
    """Return the output channels of a convolution, whatever its class calls them."""
    weight = conv._parameters.get("weight")
    return int(getattr(conv, "out_channels", 0 if weight is None else weight.shape[0]))


def rows_of(layer: nn.Module) -> int:
    """Return how many filters a convolution or a linear layer has."""
    return layer.out_features if isinstance(layer, nn.Linear) else out_channels(layer)


def fold_methods(module: nn.Module) -> list[str]:
    """Return the methods that fold norms into convolutions: named so, and callable without arguments.

    A method that takes arguments merges features, not weights.
    """
    found = []
    for name in FOLDS:
        method = getattr(type(module), name, None)
        if inspect.isfunction(method):
            parameters = list(inspect.signature(method).parameters.values())[1:]
            if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
                found.append(name)
    return found


def stray_norms(model: nn.Module) -> list[str]:
    """Return the attributes, by qualified name, that hold BatchNorm which is no part of the network's modules."""
    registered = {id(module) for module in model.modules()}
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if (isinstance(value, nn.Module) or (isinstance(value, (list, tuple, dict)) and value))
        and key not in REGISTERED
        and any(
            id(held) not in registered and any(is_batch_norm(inner) for inner in held.modules())
            for held in _modules_in(value, DEPTH)
        )
    ]


def refuse_strays(model: nn.Module) -> None:
    """Raise where a network holds BatchNorm that no replacement could reach.

    Raises:
        UnsupportedModel: With the attribute that holds it.
    """
    for where in stray_norms(model):
        raise UnsupportedModel(
            f"{where} keeps BatchNorm where torch does not register it, so that it is neither saved, moved nor "
            "converted; use nn.ModuleList or nn.ModuleDict"
        )


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item, depth - 1)


def _vector(module: nn.Module, name: str) -> Tensor | None:
    value = module._parameters.get(name, module._buffers.get(name))
    return value if isinstance(value, Tensor) and value.ndim == 1 else None


def _own_matrices(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(tensor is not None and tensor.ndim > 1 for tensor in tensors)
