"""Run every operator of a forward pass, on meta tensors where any operand is one, and have it noted."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normswap.networks.inputs import tensors_in
from normswap.tracing.meta_results import all_meta, answer, shape_alone
from normswap.tracing.operators import base_name
from normswap.tracing.recorder import Recorder


class Dispatch(TorchDispatchMode):
    """See every operator that runs under it.

    Args:
        recorder: What notes each operator, once it has run.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operator and have it noted."""
        kwargs = kwargs or {}
        name = base_name(func)
        operands = list(tensors_in((args, kwargs)))
        on_meta = any(tensor.is_meta for tensor in operands)
        if on_meta:
            args, kwargs = all_meta(args, operands), all_meta(kwargs, operands)
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": torch.device("meta")}
        name = "batch_norm" if "batch_norm" in name else name
        result = _on_meta(func, name, args, kwargs, operands) if on_meta else NotImplemented
        if result is NotImplemented:
            result = func(*args, **kwargs)
        self._recorder.note(func, name, operands, result)
        return result


def _on_meta(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]) -> Any:
    result = shape_alone(func, name, args, operands)
    return answer(func, name, args, kwargs) if result is NotImplemented else result
