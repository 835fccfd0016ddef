"""Networks that are hard to convert, as functions that the command line can name: ``badnets:scripted``."""

from typing import Any

import torch
import torch.nn.utils.prune
from nets import conv
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize

X = torch.zeros(2, 3, 16, 16)


def trained(model: nn.Module) -> Any:
    """Give every norm statistics and an affine part that look trained."""
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            for tensor, low, high in ((norm.running_mean, -1, 1), (norm.running_var, 0.5, 2), (norm.weight, 0.5, 1.5)):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, high)
    return model.eval()


def small(num_classes: int = 5) -> nn.Sequential:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    body = (conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())
    model: nn.Sequential = trained(nn.Sequential(*body, *head))
    return model


def holding(name: str, value: float) -> nn.Sequential:
    """Return a network with one value in one of its tensors."""
    model = small()
    model.state_dict()[name].view(-1)[0] = value
    return model


def nan_kernel() -> nn.Module:
    return holding("0.weight", float("nan"))


def infinite_kernel() -> nn.Module:
    return holding("3.weight", float("inf"))


def nan_gamma() -> nn.Module:
    return holding("1.weight", float("nan"))


def nan_head() -> nn.Module:
    return holding("8.weight", float("nan"))


def nan_mean() -> nn.Module:
    return holding("4.running_mean", float("nan"))


def infinite_variance() -> nn.Module:
    return holding("4.running_var", float("inf"))


def negative_variance() -> nn.Module:
    return holding("1.running_var", -1.0)


def constant_channel() -> nn.Module:
    return holding("1.running_var", 0.0)


def half_infinite() -> nn.Module:
    return holding("0.weight", 1e5).half()


def scripted() -> Any:
    return torch.jit.script(small())


def scripted_part() -> nn.Module:
    return nn.Sequential(torch.jit.script(small()), nn.Identity())


def jit_traced() -> Any:
    return torch.jit.trace(small(), X)


def exported() -> Any:
    return torch.export.export(small(), (X,))


def exported_module() -> Any:
    return exported().module()


def lazy_conv() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8))


def lazy_norm() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.LazyBatchNorm2d())


def quantization_prepared() -> nn.Module:
    model = nn.Sequential(torch.ao.quantization.QuantStub(), *small(), torch.ao.quantization.DeQuantStub()).eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")  # type: ignore[assignment]
    return torch.ao.quantization.prepare(model)


def quantized() -> nn.Module:
    model = quantization_prepared()
    model(X)
    return torch.ao.quantization.convert(model)


def quantized_dynamically() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(small(), {nn.Linear})


class FullyShardedDataParallel(nn.Module):
    """A wrapper of FSDP1's name, whose own needs a process group to be built."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, x: Tensor) -> Tensor:
        return self._fsdp_wrapped_module(x)  # type: ignore[no-any-return]


def fsdp() -> nn.Module:
    return FullyShardedDataParallel(small())


class Listed(nn.Module):
    """A norm in a plain container, which torch does not register."""

    def __init__(self, container: type, *, runs: bool = True, own: bool = True) -> None:
        super().__init__()
        self.conv, self.runs = conv(3, 8), runs
        self.bn = nn.BatchNorm2d(8) if own else nn.Identity()
        self.extra = {"bn": nn.BatchNorm2d(8)} if container is dict else container([conv(8, 8), nn.BatchNorm2d(8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        for layer in (self.extra.values() if isinstance(self.extra, dict) else self.extra) if self.runs else ():
            x = layer(x)
        return x


def plain_list() -> nn.Module:
    return Listed(list).eval()


def plain_tuple() -> nn.Module:
    return Listed(tuple).eval()


def plain_dict_and_nothing_else() -> nn.Module:
    return Listed(dict, own=False).eval()


def list_that_does_not_run() -> nn.Module:
    return Listed(list, runs=False).eval()


class Functional(nn.Module):
    """Batch normalization without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("spread", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(self.conv(x), self.mean, self.spread)  # type: ignore[arg-type]


def functional() -> nn.Module:
    return Functional().eval()


def graph_with_functional() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(small()[:3], nn.Conv2d(8, 3, 1), Functional()).eval())


def pruned_norm() -> nn.Module:
    model = small()
    torch.nn.utils.prune.l1_unstructured(model[1], "weight", 0.5)
    return model


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def parametrized_norm() -> nn.Module:
    model = small()
    parametrize.register_parametrization(model[1], "weight", Square())
    return model


def pruned() -> nn.Module:
    model = small()
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def weight_normed() -> nn.Module:
    model = small()
    parametrizations.weight_norm(model[0])
    return model


def spectral_normed() -> nn.Module:
    model = small()
    parametrizations.spectral_norm(model[0])
    return model.eval()


def tied() -> nn.Module:
    first, second = conv(8, 8), conv(8, 8)
    second.weight = first.weight
    return trained(nn.Sequential(conv(3, 8), first, nn.BatchNorm2d(8), second, nn.BatchNorm2d(8)))  # type: ignore[no-any-return]


def shared_norm_of_two_sizes() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    return trained(nn.Sequential(conv(3, 8), norm, nn.MaxPool2d(2), conv(8, 8), norm))  # type: ignore[no-any-return]


def synchronized() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(small())


def without_affine() -> nn.Module:
    return trained(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, affine=False)))  # type: ignore[no-any-return]


def without_statistics() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False)).eval()


def fresh() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)).eval()


def after_a_pool() -> nn.Module:
    return trained(nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(3, 16, 1), nn.BatchNorm2d(16)))  # type: ignore[no-any-return]


def half() -> nn.Module:
    return small().half()


def brain_half() -> nn.Module:
    return small().bfloat16()


def graph() -> nn.Module:
    return torch.fx.symbolic_trace(small())


def compiled() -> Any:
    return torch.compile(small(), backend="eager")


def compiled_part() -> nn.Module:
    return nn.Sequential(torch.compile(small()[:3], backend="eager"), conv(8, 8)).eval()


def data_parallel() -> nn.Module:
    return nn.DataParallel(small())


def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(small())


def hooked() -> nn.Module:
    model = small()
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    return model


def no_norm() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU())


def state_dict() -> Any:
    return small().state_dict()


def raises() -> nn.Module:
    raise OSError("two\nlines")


def leaves() -> nn.Module:
    raise SystemExit(3)
