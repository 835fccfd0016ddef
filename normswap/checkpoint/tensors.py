"""What a checkpoint stores: a state dict whose filters a plain convolution can use as they are."""

from functools import cache

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from normswap.errors import CheckpointError
from normswap.layers.convs import WeightStandardized
from normswap.layers.standardization import gain_and_offset
from normswap.networks.network import Network
from normswap.sources.state_dicts import kept_apart


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state's tensors as a file holds them: contiguous, on the CPU, none sharing memory with another.

    Those of the network that are so already are in its own memory.

    Of a weight-standardized convolution the kernel it uses is stored, with the gain and offset that belong to it: the
    network that loads them computes what it did, and so does a network of plain convolutions that loads the same file.
    Where no training has moved the filters they are stored bit for bit.

    Raises:
        CheckpointError: A tensor has no data, no name that is UTF-8, or is of a kind that the file cannot hold, or an
            entry of the state is no tensor.
    """
    state = model.state_dict()
    for name, value in state.items():
        if is_traceable_wrapper_subclass(value):
            raise CheckpointError(
                f"{name}: is a {type(value).__name__}, whose values are in other tensors (sharded or quantized); fill "
                "a network that is not with its full state dict, and save that"
            )
    moved = _moved_filters(model)
    tensors, held = dict[str, Tensor](), set[int]()
    for name, value in state.items():
        if not name.isprintable() and name.encode("utf-8", "replace") != name.encode("utf-8", "surrogatepass"):
            raise CheckpointError(f"{name!a}: no file can hold this name, it is no UTF-8; rename the module first")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: is a {type(value).__name__}, not a tensor; it cannot be saved")
        if value.is_meta:
            raise CheckpointError(f"{name}: has no data (meta device); it cannot be saved")
        if value.layout is not torch.strided or value.is_quantized or not _has_a_format(value.dtype):
            kind = f"{str(value.layout).removeprefix('torch.')} {str(value.dtype).removeprefix('torch.')}"
            raise CheckpointError(f"{name}: is {kind}, which safetensors cannot hold; it cannot be saved")
        stored = moved.get(name, value).detach().cpu().resolve_conj().resolve_neg().contiguous()
        tensors[name] = kept_apart(stored, held)
    return tensors


@cache
def _has_a_format(dtype: torch.dtype) -> bool:
    try:
        safetensors.torch.save({"": torch.empty(0, dtype=dtype)})
    except (KeyError, safetensors.SafetensorError):
        return False
    return True


@torch.no_grad()
def _moved_filters(model: nn.Module) -> dict[str, Tensor]:
    """Return kernels, gains and offsets, by name in the state, of the convolutions whose filters training has moved."""
    network, moved = Network(model), dict[str, Tensor]()
    for _, conv in network.standardized():
        if conv.ws_gain is None or conv.ws_gain.is_meta or conv.is_computed:
            continue
        if all(torch.equal(value, getattr(conv, key)) for key, value in settled(conv, conv.raw_weight).items()):
            continue
        kernel = conv.standardized_weight()
        for key, value in {"weight": kernel, **settled(conv, kernel)}.items():
            moved |= {f"{name}.{key}".lstrip("."): value for name in network.names[id(conv)]}
    return moved


def settled(module: WeightStandardized, weight: Tensor) -> dict[str, Tensor]:
    """Return the gain, and the offset where the form has one, with which `module` uses `weight` as its kernel.

    >>> module.load_state_dict({"weight": kernel, **settled(module, kernel)}, strict=False)

    Args:
        module: A weight-standardized convolution with a gain.
        weight: A kernel of the shape of the module's.
    """
    gain, offset = (value.to(weight.dtype) for value in gain_and_offset(module.ws_filters(weight), module.ws_eps))
    return {"ws_gain": gain} | ({} if module.ws_offset is None else {"ws_offset": offset})
