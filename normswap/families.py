"""Which modules are BatchNorm-like, which are convolutions: decided by class family and by what they hold."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.layers import WeightStandardized


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether `module` normalizes by batch or running statistics.

    True for torch's BatchNorm family and for duck types such as ``FrozenBatchNorm2d``: (C,) running statistics beside
    an affine part of the same size. Instance norms are not.
    """
    if isinstance(module, _InstanceNorm):
        return False
    if isinstance(module, _BatchNorm):
        return True
    mean, var = _vector(module, "running_mean"), _vector(module, "running_var")
    affine = [_vector(module, key) for key in ("weight", "bias")]
    return (
        mean is not None
        and var is not None
        and mean.shape == var.shape
        and all(value is None or value.shape == mean.shape for value in affine)
        and not _own_matrices(module)
    )


def is_conv(module: nn.Module) -> bool:
    """Tell whether `module` is a convolution of torch's family that is not weight-standardized yet."""
    return isinstance(module, _ConvNd) and not isinstance(module, WeightStandardized)


def num_channels(norm: nn.Module) -> int:
    """Return the channels C of a BatchNorm-like module."""
    mean = _vector(norm, "running_mean")
    return int(norm.num_features) if mean is None else mean.numel()  # type: ignore[arg-type]


def eps_of(norm: nn.Module) -> float:
    """Return the module's epsilon; 1e-5, torch's default, where a duck type keeps it in its code."""
    return float(getattr(norm, "eps", 1e-5))


def _vector(module: nn.Module, name: str) -> Tensor | None:
    value = {**module._buffers, **module._parameters}.get(name)
    return value if isinstance(value, Tensor) and value.ndim == 1 else None


def _own_matrices(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(tensor is not None and tensor.ndim > 1 for tensor in tensors)
