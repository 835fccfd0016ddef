"""Standardize filters again in the backward pass, rather than keep every kernel for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import ref

import torch
from torch import Tensor, nn

from normswap.layers.convs import WeightStandardized, given


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Within the block, have autograd keep of each kernel which convolution made it; it makes it again when asked.

    The backward pass gives the gradients that it gives without, for the time of one more standardization; the filters
    must not change before it. Functions of ``torch.func`` cannot be in the forward pass.
    """
    made: dict[int, tuple[ref[Tensor], WeightStandardized]] = {}

    def pack(tensor: Tensor) -> Tensor | WeightStandardized:
        kept, conv = made.get(tensor.untyped_storage()._cdata, (None, None))
        kernel = None if kept is None else kept()
        same = kernel is not None and (kernel.shape, kernel.stride()) == (tensor.shape, tensor.stride())
        return conv if same and conv is not None else tensor

    def unpack(packed: Tensor | WeightStandardized) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return packed.fresh_kernel()

    def again(conv: WeightStandardized) -> Tensor:
        kernel = conv.fresh_kernel()
        made[kernel.untyped_storage()._cdata] = ref(kernel), conv
        return kernel

    convs = (module for module in model.modules() if isinstance(module, WeightStandardized) and not module.is_computed)
    with given({conv: partial(again, conv) for conv in convs}), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
