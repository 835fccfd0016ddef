"""Look inside wrappers, and refuse models that cannot be converted as they are."""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from normswap.errors import BadStatistics, UnsupportedModel


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside ``torch.compile``, DistributedDataParallel and DataParallel wrappers.

    Raises:
        UnsupportedModel: It is no module.
    """
    model = as_module(model)
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is not None:
            model = inner
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def as_module(given: object) -> nn.Module:
    """Return what was given, or raise UnsupportedModel where it is no network."""
    if not isinstance(given, nn.Module):
        raise UnsupportedModel(f"{type(given).__name__} is not an nn.Module; pass the network itself")
    return given


def refuse_unsupported(model: object) -> None:
    """Raise where surgery would do nothing or do harm.

    Raises:
        UnsupportedModel: With the way on.
    """
    if isinstance(model, torch.export.ExportedProgram):
        raise UnsupportedModel("an ExportedProgram holds no modules to replace; convert the model before torch.export")
    network = as_module(model)
    if not _runs_its_forward(network):
        inner = next((f", .{name}" for name, _ in network.named_children()), "")
        raise UnsupportedModel(
            f"calling a {type(network).__name__} runs something else than its forward; pass the network inside{inner}"
        )
    try:
        modules = list(network.named_modules())
    except RecursionError as error:
        raise UnsupportedModel(
            f"{type(model).__name__} nests its modules too deeply for Python; flatten them"
        ) from error
    for name, module in modules:
        where = name or type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(f"{where} is a ScriptModule; convert the Python model before torch.jit.script")
        graph = module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()
        if any(isinstance(node.target, torch._ops.OpOverload) for node in graph):
            raise UnsupportedModel(f"{where} is an exported graph of operators; convert the model before torch.export")
        stub = isinstance(module, (torch.ao.nn.quantized.FloatFunctional, torch.ao.quantization.QuantStub))
        stub = stub or isinstance(module, torch.ao.quantization.DeQuantStub)  # none of these does anything yet
        if type(module).__module__.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic")) and not stub:
            raise UnsupportedModel(
                f"{where} is a quantized or QAT module ({type(module).__name__}); convert before torch.ao.quantization"
            )
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(isinstance(tensor, (UninitializedParameter, UninitializedBuffer)) for tensor in own):
            raise UnsupportedModel(f"{where} is an uninitialized Lazy module; run one forward pass first")
        sharded = any("DTensor" in (type(tensor).__name__, type(tensor.data).__name__) for tensor in own)
        if sharded or type(module).__name__ == "FullyShardedDataParallel":
            raise UnsupportedModel(f"{where} is sharded (FSDP or DTensor parameters); convert before sharding")


def _runs_its_forward(model: nn.Module) -> bool:
    """Tell whether a call of a model leads to its forward: torch's own does, and what hands on to that."""
    own = type(model).__call__
    if own is nn.Module.__call__ or isinstance(model, torch.fx.GraphModule):
        return True
    names = set(getattr(getattr(own, "__code__", None), "co_names", ()))
    return bool(names & {"__call__", "forward", "_call_impl", "_wrapped_call_impl"})


def must_have_data(model: nn.Module) -> None:
    """Raise where a tensor of a network is on the meta device, and has no values to compute with.

    Raises:
        UnsupportedModel: With the tensor's name.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise UnsupportedModel(f"{name} has no data (meta device); load the network's weights first")


def must_be_finite(model: nn.Module, *, but: Collection[str] = ()) -> None:
    """Raise where a parameter holds NaN or infinity: nothing that is computed with it means anything.

    Args:
        model: The network.
        but: Names of parameters that are looked at elsewhere.

    Raises:
        BadStatistics: With the parameter's name.
    """
    for name, parameter in model.named_parameters():
        if name not in but and not is_finite(parameter):
            raise not_finite(name)


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values are finite, or unknown."""
    if tensor.is_meta or math.isfinite(abs(tensor.detach().sum().item())):
        return True
    return bool(tensor.isfinite().all())  # sums of finite values overflow, too


def not_finite(name: str) -> BadStatistics:
    """Return the error for a tensor of a name."""
    return BadStatistics(f"{name}: holds NaN or infinity; repair the checkpoint or take an earlier one")
