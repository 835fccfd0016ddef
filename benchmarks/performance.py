"""Measure what weight standardization, conversion, a training step and deployment cost; every variant in turns.

python benchmarks/performance.py [ws accumulation convert fold step compiled onnx]   # then performance_docs.py

Needs opacus, onnxruntime and timm. Runs on the GPU where there is one.
"""

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, product
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from opacus.validators import ModuleValidator
from records import RESULTS
from timing import Variant, device, device_name, interleaved, summary
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer

import normswap
from normswap.layers.convs import WeightStandardized, given
from normswap.layers.standardization import gain_and_offset, standardize

Rows = Iterator[dict[str, Any]]


def trained(model: nn.Module) -> nn.Module:
    """Give norms statistics that look trained, so that conversion is adaptive."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def textbook(rows: Tensor, _gain: Tensor, _offset: Tensor) -> Tensor:
    centred = rows - rows.mean(1, keepdim=True)
    return centred / (centred.std(1, keepdim=True) + 1e-5)


def bit(rows: Tensor, _gain: Tensor, _offset: Tensor) -> Tensor:
    var, mean = torch.var_mean(rows, dim=1, keepdim=True, correction=0)
    return (rows - mean) / torch.sqrt(var + 1e-10)


def timm_std(rows: Tensor, _gain: Tensor, _offset: Tensor) -> Tensor:
    return F.batch_norm(rows[None], None, None, training=True, momentum=0.0, eps=1e-6).view_as(rows)


def standard(rows: Tensor, _gain: Tensor, _offset: Tensor) -> Tensor:
    return standardize(rows)


def adaptive(rows: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return standardize(rows, gain=gain, offset=offset)


FORMS = {"textbook": textbook, "BiT": bit, "timm StdConv2d": timm_std, "standard": standard, "adaptive": adaptive}


def ws(rounds: int) -> Rows:
    """Yield the cost of standardizing all filters of a ResNet-50."""
    model = timm.create_model("resnet50").to(device())
    rows = [m.weight.detach().flatten(1).requires_grad_() for m in model.modules() if isinstance(m, nn.Conv2d)]
    values = [gain_and_offset(row.detach()) for row in rows]
    gradients = [torch.randn_like(row) for row in rows]

    def forward(form: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            for row, (gain, offset) in zip(rows, values, strict=True):
                form(row, gain, offset)

    def both(form: Callable[..., Tensor]) -> None:
        outputs = [form(row, gain, offset) for row, (gain, offset) in zip(rows, values, strict=True)]
        torch.autograd.grad(outputs, rows, gradients)

    for name, part in (("forward", forward), ("forward + backward", both)):
        seconds = interleaved({form: lambda f=f, p=part: p(f) for form, f in FORMS.items()}, rounds=rounds)
        for form, row in summary(seconds, "timm StdConv2d").items():
            yield {"form": form, "part": name, **row}


def accumulating(rounds: int) -> Rows:
    """Yield what standardization adds to a training step of a ResNet-50 at batch size 2, and to four micro-batches."""
    model = trained(timm.create_model("resnet50")).to(device())
    converted = normswap.convert(model)
    plain = normswap.fold(converted)
    batches = list(torch.randn(4, 2, 3, 224, 224, device=device()))

    def train(network: nn.Module, count: int, *, shared: bool = False) -> None:
        network.train().zero_grad(set_to_none=False)
        if shared:
            with normswap.accumulate(network):
                train_inner(network, count)
        else:
            train_inner(network, count)

    def train_inner(network: nn.Module, count: int) -> None:
        for batch in batches[:count]:
            network(batch).square().mean().backward()

    standardizing = [m for m in converted.modules() if isinstance(m, WeightStandardized)]
    weights = [m._parameters["weight"] for m in standardizing]
    gradients = [torch.randn_like(weight) for weight in weights]  # type: ignore[arg-type]

    def alone() -> None:
        torch.autograd.grad([m.fresh_kernel() for m in standardizing], weights, gradients)  # type: ignore[arg-type]

    variants: dict[str, Variant] = {
        "BN, 1 step": lambda: train(model, 1),
        "GN, 1 step": lambda: train(plain, 1),
        "GN + WS, 1 step": lambda: train(converted, 1),
        "WS alone": alone,
        "GN, 4 micro-batches": lambda: train(plain, 4),
        "GN + WS, 4 micro-batches": lambda: train(converted, 4),
        "GN + WS, 4 micro-batches, accumulate": lambda: train(converted, 4, shared=True),
    }
    seconds = interleaved(variants, rounds=rounds)
    for name, row in summary(seconds, "BN, 1 step").items():
        yield {"variant": name, **row}


STATES = (("resnet50", "fresh"), ("resnet50", "trained"), ("regnety_640", "trained"))
"""Networks that are converted, with norms and filters as initialization leaves them, or as training does."""


def convert(rounds: int) -> Rows:
    """Yield the time of a conversion beside Opacus' fixer and a copy."""
    jobs = [(name, state, threads) for name, state in STATES for threads in (1, 2)]
    for name, state, threads in jobs:
        torch.set_num_threads(threads)
        model = timm.create_model(name)
        model = trained(model) if state == "trained" else model
        seconds = interleaved(
            {
                "copy": lambda m=model: copy.deepcopy(m),
                "Opacus fix": lambda m=model: ModuleValidator.fix(m),
                "convert": lambda m=model: normswap.convert(m),
                "convert, check=False": lambda m=model: normswap.convert(m, check=False),
                "inspect": lambda m=model: normswap.inspect(m),
            },
            rounds=rounds,
        )
        parameters = sum(p.numel() for p in model.parameters())
        for variant, row in summary(seconds, "Opacus fix").items():
            about = {"model": name, "parameters": parameters, "state": state, "threads": threads}
            yield {**about, "variant": variant, **row}
    for name in dict(STATES):
        model = trained(timm.create_model(name))
        yield {"model": name, "peak": _peak(model), "peak_fresh": _peak(timm.create_model(name))}


def _peak(model: nn.Module) -> float:
    """Return the model's size and the most that an in-place conversion allocates at a time, over the model's size."""
    size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        normswap.convert(model, inplace=True)
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    return 1 + max(accumulate(event.nbytes() for event in events)) / size


def fold(rounds: int) -> Rows:
    """Yield the latency of the folded network against one with plain convolutions and GroupNorm, and BatchNorm."""
    model = trained(timm.create_model("resnet50")).to(device()).eval()
    converted = normswap.convert(model)
    networks = {"GN, plain convolutions": normswap.convert(model, ws="none"), "folded": normswap.fold(converted)}
    networks |= {"GN + WS": converted, "GN + WS, standardized in every pass": copy.deepcopy(converted), "BN": model}
    anew = [m for m in networks["GN + WS, standardized in every pass"].modules() if isinstance(m, WeightStandardized)]
    images = torch.randn(1, 3, 224, 224, device=device())

    def run(network: nn.Module) -> None:
        with torch.inference_mode(), given({conv: conv.fresh_kernel for conv in anew}):
            network(images)

    variants: dict[str, Variant] = {name: lambda n=n: run(n) for name, n in networks.items()}
    if device().type == "cpu":
        torch.set_num_threads(1)
    clock = time.process_time if device().type == "cpu" else timer
    seconds = interleaved(variants, rounds=4 * rounds, clock=clock)
    for name, row in summary(seconds, "folded").items():
        yield {"variant": name, **row}


def step(rounds: int, *, compiled: bool = False) -> Rows:
    """Yield time and memory of a training step of the converted network against BatchNorm."""
    gpu = device().type == "cuda"
    batches = (2, 32) if gpu else (2,) if compiled else (1, 2, 8)  # on two cores a compilation takes minutes
    for name in ("resnet50", "efficientnet_b0") if gpu else ("resnet50",):
        for batch, layout, half in product(batches, (False, True), (False, True)):
            torch._dynamo.reset()
            networks = _networks(name, layout)
            if compiled:
                networks = {form: networks[form] for form in ("BN", "GN + WS")}
            images = torch.randn(batch, 3, 224, 224, device=device())
            images = images.contiguous(memory_format=torch.channels_last) if layout else images
            variants: dict[str, Variant] = {}
            saved = {}
            for form, network in networks.items():
                if not compiled:  # what a compiler keeps or computes again is its own choice
                    saved[form] = {"saved_MB": _saved(network, images, half) / 1e6}
                runner = torch.compile(network, dynamic=False) if compiled else network
                variants[form] = partial(_train, runner, images, half)
            for form, row in summary(interleaved(variants, rounds=rounds), "BN").items():
                yield {
                    "model": name,
                    "batch": batch,
                    "channels_last": layout,
                    "bf16": half,
                    "compiled": compiled,
                    "form": form,
                    **saved.get(form, {}),
                    **row,
                }


def _networks(name: str, layout: bool) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    model = trained(timm.create_model(name)).train()
    found = {
        "BN": model,
        "GN": normswap.convert(model, ws="none"),
        "GN + WS": normswap.convert(model),
        "GN + WS, 1 group": normswap.convert(model, groups=1),
    }
    form = torch.channels_last if layout else torch.contiguous_format
    return {key: network.to(device(), memory_format=form).train() for key, network in found.items()}  # type: ignore[call-overload]


def _train(network: nn.Module, images: Tensor, half: bool) -> None:
    network.zero_grad(set_to_none=False)
    with torch.autocast(device().type, torch.bfloat16, enabled=half):
        loss = network(images).float().square().mean()
    loss.backward()


def _saved(network: nn.Module, images: Tensor, half: bool) -> int:
    """Return the bytes that the forward pass keeps for the backward pass, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast(device().type, torch.bfloat16, enabled=half):
        output = network(images)
    del output
    return sum(found.values())


def onnx(rounds: int) -> Rows:
    """Yield how far exported networks are from the originals in onnxruntime."""
    del rounds
    nets: dict[str, Callable[[], nn.Module]] = {
        "resnet50": lambda: timm.create_model("resnet50"),
        "efficientnet_b0": lambda: timm.create_model("efficientnet_b0"),
        "deeplabv3_resnet50": lambda: torchvision.models.get_model("deeplabv3_resnet50", weights_backbone=None),
        "r3d_18": lambda: torchvision.models.get_model("r3d_18"),
    }
    for name, build in nets.items():
        torch.manual_seed(0)
        converted = normswap.convert(trained(build()))
        path = RESULTS / f"{name}.onnx"
        try:
            yield {"model": name, **normswap.export(converted, path).to_dict(), "path": path.name}
        finally:
            path.unlink(missing_ok=True)


SECTIONS: dict[str, Callable[[int], Rows]] = {
    "ws": ws,
    "accumulation": accumulating,
    "convert": convert,
    "fold": fold,
    "step": step,
    "compiled": partial(step, compiled=True),
    "onnx": onnx,
}


def main() -> None:
    """Measure the chosen sections."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), metavar="|".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    for name in args.sections:
        path = RESULTS / f"performance-{name}-{device().type}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row in SECTIONS[name](args.rounds):
                row = {"device": device_name(), **row}
                print(row, flush=True)
                print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    main()
