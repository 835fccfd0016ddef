"""Standardize filters once for several micro-batches."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from normswap.errors import UnsupportedModel, WeightsChanged
from normswap.layers.convs import WeightStandardized


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Share every standardized kernel among the micro-batches of one optimizer step.

    >>> with accumulate(model):
    ...     for images, labels in micro_batches:
    ...         loss(model(images), labels).backward()
    >>> optimizer.step()

    Gradients reach the kernels in every backward pass, and the weights once, when the block ends: clip them and step
    after it. They equal the ones without it to float32 rounding. It costs the memory of the kernels and of their
    gradients. Passes under ``torch.no_grad`` share the kernels too; a block that ends in an error leaves the gradients
    of the standardized weights as they were.

    Args:
        model: A converted network; not inside DistributedDataParallel or FSDP, whose gradients are exchanged in the
            backward passes.

    Raises:
        WeightsChanged: A weight changed within the block (an optimizer's step, a loaded state dict, another parameter
            in its place). Changes through ``.data`` are invisible to torch and to this check.
        UnsupportedModel: The model is wrapped for data-parallel training, or is accumulating already.
    """
    _refuse(model)
    shared = [SharedKernel(name, m) for name, m in model.named_modules() if isinstance(m, WeightStandardized)]
    with ExitStack() as stack:
        for kernel in shared:
            stack.enter_context(kernel.module.using(kernel))
        yield
    for kernel in shared:
        kernel.verify()
    used = [kernel for kernel in shared if kernel.leaf.grad is not None]
    if used:
        torch.autograd.backward([kernel.standardized for kernel in used], [kernel.leaf.grad for kernel in used])


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kinds = {type(module).__name__, *(type(parameter).__name__ for parameter in module.parameters(recurse=False))}
        parallel = kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "DTensor"}
        if parallel:
            raise UnsupportedModel(
                f"accumulate cannot share kernels under {parallel.pop()}, which exchanges gradients in every backward "
                "pass; leave accumulate out"
            )
        if isinstance(module, WeightStandardized) and module.is_given_a_kernel:
            raise UnsupportedModel(f"{name} is accumulating already; blocks of accumulate do not nest")


class SharedKernel:
    """One standardized kernel, a leaf in the graph of every micro-batch."""

    def __init__(self, name: str, module: WeightStandardized) -> None:
        self.name, self.module, self.weight = name, module, module.raw_weight
        self.version = self.weight._version
        with torch.enable_grad():
            self.standardized = module.fresh_kernel()
        self.leaf = self.standardized.detach().requires_grad_(self.standardized.requires_grad)

    def __deepcopy__(self, _memo: object) -> None:
        """Copies of the network standardize for themselves."""

    def __call__(self) -> Tensor:
        """Return the kernel; compiled code, which cannot ask for a version, is checked when the block ends."""
        if not torch.compiler.is_compiling():
            self.verify()
        return self.leaf

    def verify(self) -> None:
        """Raise where the weight is no longer what the kernel was made from."""
        if self.module.raw_weight is not self.weight or self.weight._version != self.version:
            raise WeightsChanged(
                f"{self.name}.weight changed inside accumulate; step the optimizer and load weights after the block"
            )
