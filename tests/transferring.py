"""What tests of `transfer` share: networks as if trained, and how far two are apart."""

import torch
from equality import off
from torch import Tensor, nn


@torch.no_grad()
def lived(model: nn.Module) -> nn.Module:
    """Give norms the statistics and the affine parts of a trained network."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in (module.running_mean, -0.2), (module.running_var, 0.5), (module.weight, 0.5):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)  # type: ignore[union-attr]
    return model.eval()


@torch.no_grad()
def difference(ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
    return off(ours.eval()(x), theirs.eval()(x))
