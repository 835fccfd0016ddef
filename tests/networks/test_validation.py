"""Models that are refused, each with its own message, and wrappers that are taken off."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import conv
from torch import nn

import normswap


def small() -> nn.Sequential:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()).eval()


def sharded() -> nn.Module:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = small()
        fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        return model
    finally:
        dist.destroy_process_group()


def quantization_aware() -> nn.Module:
    model = small()
    model[0] = torch.ao.nn.qat.Conv2d(3, 8, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig())
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "scripted": (
        lambda: torch.jit.script(small()),
        "is a ScriptModule; convert the Python model before torch.jit.script",
    ),
    "traced": (lambda: torch.jit.trace(small(), torch.zeros(1, 3, 8, 8)), "is a ScriptModule"),
    "scripted part": (lambda: nn.Sequential(torch.jit.script(small())), "^0 is a ScriptModule"),
    "exported": (
        lambda: torch.export.export(small(), (torch.zeros(1, 3, 8, 8),)),
        "an ExportedProgram holds no modules to replace; convert the model before torch.export",
    ),
    "lazy conv": (
        lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)),
        "^0 is an uninitialized Lazy module; run one forward pass first",
    ),
    "lazy norm": (lambda: nn.Sequential(conv(3, 8), nn.LazyBatchNorm2d()), "^1 is an uninitialized Lazy module"),
    "QAT": (quantization_aware, "^0 is a quantized or QAT module"),
    "sharded": (sharded, "is sharded \\(FSDP or DTensor parameters\\); convert before sharding"),
    "no module": (lambda: "resnet50", "str is not an nn.Module; pass the network itself"),
    "state dict": (lambda: small().state_dict(), "OrderedDict is not an nn.Module"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused(build: Callable[[], Any], message: str) -> None:
    model = build()
    with pytest.raises(normswap.UnsupportedModel, match=message):
        normswap.convert(model)


def test_a_lazy_network_converts_after_one_forward() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
    model(torch.zeros(2, 3, 8, 8))
    assert isinstance(normswap.convert(model)[1], nn.GroupNorm)  # type: ignore[index]


def test_quantizable_but_not_quantized() -> None:
    from torchvision.models.quantization import resnet18

    result = normswap.convert(resnet18(weights=None, quantize=False))
    assert len(normswap.plan_of(result).norms) == 20


def test_models_that_cannot_be_copied_say_why() -> None:
    import threading

    model = small()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(
        normswap.UnsupportedModel, match=r"Sequential cannot be copied \(TypeError: cannot pickle '_thread"
    ):
        normswap.convert(model)


def test_nothing_to_convert() -> None:
    with pytest.raises(normswap.NothingToConvert, match="Linear holds no BatchNorm; nothing to convert"):
        normswap.convert(nn.Linear(3, 3))


def test_distributed_wrapper_is_taken_off() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = small().train()
        result = normswap.convert(nn.parallel.DistributedDataParallel(model))
    finally:
        dist.destroy_process_group()
    assert type(result) is nn.Sequential
