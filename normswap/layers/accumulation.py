"""Standardize filters once for several micro-batches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normswap.errors import UnsupportedModel, WeightsChanged
from normswap.layers.convs import GIVEN, WeightStandardized, given
from normswap.layers.keeping import Origin
from normswap.layers.standardization import Remembered


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Share every standardized kernel among the micro-batches of one optimizer step.

    >>> with accumulate(model):
    ...     for images, labels in micro_batches:
    ...         loss(model(images), labels).backward()
    >>> optimizer.step()

    Every backward pass gives the weights the gradients that it gives them without; they may be clipped, dropped and
    asked for at any time. It costs the memory of the kernels. Other threads, copies, compiled code and functions of
    ``torch.func`` standardize for themselves, as do filters whose weight is pruned or parametrized.

    Args:
        model: A converted network; not inside DistributedDataParallel or FSDP.

    Raises:
        WeightsChanged: A weight changed within the block (an optimizer's step, a loaded state dict, another parameter,
            type or memory format), or what it is standardized with. Of changes in place through ``.data`` torch tells
            nothing; on the CPU some values of every filter are looked at.
        UnsupportedModel: The model is wrapped for data-parallel training, or is accumulating already.
    """
    _refuse(model)
    convs = ((name, m) for name, m in model.named_modules() if isinstance(m, WeightStandardized))
    shared: dict[nn.Module, SharedKernel] = {
        conv: SharedKernel(name, conv) for name, conv in convs if not conv.is_computed
    }
    with given(shared):
        yield
    for kernel in shared.values():
        kernel.verify()


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kinds = {type(module).__name__, *(type(parameter).__name__ for parameter in module.parameters(recurse=False))}
        parallel = kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "DTensor"}
        if parallel:
            raise UnsupportedModel(
                f"accumulate cannot share kernels under {parallel.pop()}, which exchanges gradients in every backward "
                "pass; leave accumulate out"
            )
        if module in GIVEN.get():
            raise UnsupportedModel(f"{name} is accumulating already; blocks of accumulate do not nest")


class SharedKernel:
    """One convolution's standardized filters, in the graph of every micro-batch."""

    def __init__(self, name: str, module: WeightStandardized) -> None:
        self.name, self.module = name, module
        with torch.inference_mode(False), torch.no_grad():
            self.origin = Origin.of(module, module.raw_weight)
            self.found = Remembered.of(module.ws_filters(), module.ws_eps, **module.constants())

    def __call__(self) -> Tensor:
        """Return the kernel."""
        self.verify()
        return self.module.kernel_of(self.found.standardized(self.module.ws_filters()))

    def verify(self) -> None:
        """Raise where the layer no longer standardizes what the kernel was made from."""
        if not self.origin.holds(self.module, self.module.raw_weight):
            raise WeightsChanged(
                f"{self.name}.weight changed inside accumulate; step the optimizer and load weights after the block"
            )
