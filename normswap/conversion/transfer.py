"""Fill a network that a framework built with GroupNorm with what a converted one computes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.conversion.carried_plan import carried_plan
from normswap.conversion.execution import Layer, executed, kernel_in_use, operands_of, own_tensors
from normswap.conversion.kernels import filled
from normswap.conversion.surgery import fill
from normswap.errors import TransferFailed
from normswap.layers.convs import WeightStandardized
from normswap.networks.copying import copy_model
from normswap.networks.inputs import materialize, rebuild, reference, tensors_in
from normswap.networks.network import Network
from normswap.networks.randomness import normal
from normswap.networks.settings import own_settings
from normswap.networks.validation import unwrap
from normswap.tracing.forward import trace

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest, that is rounding."""

ALIKE = "build the target like the original, but for its norms"
"""The way on with a network that runs other layers."""


@dataclass(frozen=True)
class Transferred:
    """What `transfer` did.

    Attributes:
        difference: Largest difference of the two networks' outputs on the example, relative to the largest output.
        reloaded: The same for a target that is built anew and loads the state dict, which holds neither epsilons nor
            group counts.
        kernels: How each convolution got its kernel, by name.
        attributes: What was set on modules and no state dict holds: epsilons and group counts, by the module's name.
        not_set: Norms that keep an epsilon or a group count of their own, and what they have.
        unfilled: Layers of the target that no pass reached and that keep the tensors they had.
    """

    difference: float
    reloaded: float
    kernels: dict[str, str] = field(repr=False)
    attributes: dict[str, dict[str, float]] = field(repr=False)
    not_set: dict[str, str]
    unfilled: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{len(self.kernels)} convolutions, {len(self.attributes)} norms; outputs differ by {self.difference:.1e}",
            f"built anew from its state dict alone: {self.reloaded:.1e} (epsilons and group counts are not in it)",
            *(f"not set: {name}: {what}" for name, what in self.not_set.items()),
            *(f"not reached, left as it was: {name}" for name in self.unfilled),
        ]
        return "\n".join(lines)


@dataclass
class _Changes:
    """What is to be written, and what is said of it; `scales` are those that a norm is to undo by its epsilon."""

    values: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    not_set: dict[str, str] = field(default_factory=dict)


@own_settings()
def transfer(converted: nn.Module, target: nn.Module, *, example_input: Any = None) -> Transferred:
    """Fill a network that its framework built with GroupNorm, so that it computes what a converted one does.

    >>> target = torchvision.models.resnet50(norm_layer=partial(nn.GroupNorm, 32))
    >>> print(transfer(converted, target))

    Layers are matched by the order in which a forward pass reaches them and by their sizes, not by name. A convolution
    that standardizes its filters gets them as they are, with what it has for scale and mean; a plain one gets the
    kernel in use. Groups and epsilons are set on the norms. All of it is tried on a copy first; an error leaves the
    target as it was.

    Args:
        converted: A converted network; it is only read.
        target: The network to fill, in place.
        example_input: As for `normswap.convert`; by default the shapes recorded in the plan.

    Raises:
        TransferFailed: The networks run different layers, a layer of the target cannot take what is to go there, or the
            outputs differ although everything was set.
        NeedsExampleInput: The converted network did not run on made-up inputs.
        UnsupportedModel: A network cannot be copied.
    """
    source, target = unwrap(converted), unwrap(target)
    example = _example(source, example_input)
    ours, expected = executed(source, example)
    theirs, _ = executed(target, example)
    changes = _Changes()
    for layer, other, behind in _pairs(ours, theirs):
        _plan_pair(layer, other, behind, changes)
    filled_copy, rebuilt = copy_model(target), copy_model(target)
    fill(Network(filled_copy), changes.values, changes.attributes)
    difference = _difference(executed(filled_copy, example)[1], expected)
    if difference > TOLERANCE and not changes.not_set:
        raise TransferFailed(
            f"{type(target).__name__} gets every tensor and its outputs still differ by {difference:.0%}: "
            "it computes something else between its layers; build it with the same options but for the norms"
        )
    rebuilt.load_state_dict(filled_copy.state_dict())
    reloaded = _difference(executed(rebuilt, example)[1], expected)
    fill(Network(target), changes.values, changes.attributes)
    reached = {layer.name for layer in theirs}
    unfilled = (name for name, module in Network(target).modules.items() if own_tensors(module) and name not in reached)
    return Transferred(difference, reloaded, changes.kernels, changes.norms, changes.not_set, tuple(unfilled))


def _example(source: nn.Module, example_input: Any) -> Any:
    plan = carried_plan(source)
    if example_input is None and plan is not None and plan.inputs is not None:
        example_input = rebuild(plan.inputs)
    found = trace(Network(source), example_input, until=(), edges=False)
    like = reference(source)
    return materialize(found.example, like.device, like.dtype, seed=0)


def _pairs(ours: list[Layer], theirs: list[Layer]) -> Iterator[tuple[Layer, Layer, Layer | None]]:
    """Yield layers of one place, and the layer of the target that comes next."""
    for index, (layer, other) in enumerate(zip_longest(ours, theirs)):
        if layer is None or other is None:
            extra, where = (other, "the target runs") if layer is None else (layer, "the converted network runs")
            raise TransferFailed(f"{where} {extra}, for which the other has no layer; {ALIKE}")
        if layer.role != other.role:
            raise TransferFailed(f"{layer} runs where the target runs {other}; {ALIKE}")
        yield layer, other, theirs[index + 1] if index + 1 < len(theirs) else None


def _plan_pair(layer: Layer, other: Layer, behind: Layer | None, changes: _Changes) -> None:
    kind = layer.role[0]
    if kind == "a convolution":
        _plan_conv(layer, other, behind, changes)
    elif kind == "a norm" and isinstance(layer.module, nn.GroupNorm):
        _plan_norm(layer, layer.module, other, changes)
    else:
        _plan_other(layer, other, changes)


def _plan_conv(layer: Layer, other: Layer, behind: Layer | None, changes: _Changes) -> None:
    found = kernel_in_use(layer.module, layer.input)
    if found is None:
        raise TransferFailed(f"{layer} does not show one kernel when it runs by itself; fill it by hand")
    wanted, bias = found
    raw = layer.module.raw_weight.detach() if isinstance(layer.module, WeightStandardized) else wanted
    made = filled(copy_model(other.module), other.input, wanted, raw)
    if made is None:
        raise TransferFailed(
            f"{other.name}: whatever its filters, they make no kernel like that of {layer.name}, where scale and mean "
            "differ from filter to filter; build the target with plain convolutions, or with a gain and an offset each"
        )
    if made.scale != 1.0 and abs(made.scale - 1) > 1e-6:
        if behind is None or behind.role[0] != "a norm":
            raise TransferFailed(
                f"{other.name}: it standardizes without a scale, and no norm behind it undoes that of {layer.name}; "
                "build the target with plain convolutions"
            )
        changes.scales[behind.name] = made.scale
    changes.kernels[other.name] = made.how
    changes.values |= {(other.name, key): value for key, value in made.values.items()}
    theirs = other.module._parameters.get("bias")
    if theirs is not None:
        changes.values[other.name, "bias"] = torch.zeros_like(theirs) if bias is None else bias / made.scale
    elif bias is not None and bool(bias.any()):
        raise TransferFailed(
            f"{other.name}: it has no bias for that of {layer.name}; build the target's convolutions with one"
        )


def _plan_norm(layer: Layer, norm: nn.GroupNorm, other: Layer, changes: _Changes) -> None:
    wanted = {"num_groups": norm.num_groups, "eps": norm.eps / changes.scales.get(other.name, 1.0) ** 2}
    copy, own = copy_model(other.module), own_tensors(other.module)
    values = {"weight": torch.ones(norm.num_channels), "bias": torch.zeros(norm.num_channels)} | own_tensors(norm)
    if own.keys() < {"weight", "bias"} and bool((values["weight"] != 1).any() or values["bias"].any()):
        raise TransferFailed(f"{other.name}: it has no gain and offset for those of {layer.name}; build it affine")
    values = {key: values[key].detach() for key in ("weight", "bias") if key in own}
    there = {key: value for key, value in wanted.items() if type(getattr(copy, key, None)) in (int, float)}
    fill(Network(copy), {("", key): value for key, value in values.items()}, {("", k): v for k, v in there.items()})
    changes.values |= {(other.name, key): value for key, value in values.items()}
    before = {key: getattr(other.module, key) for key in there}
    changes.attributes |= {(other.name, key): value for key, value in there.items() if value != before[key]}
    changes.norms[other.name] = {key: value for key, value in there.items() if value != before[key]}
    if has := _other_than(copy, other.input, norm, wanted):
        changes.not_set[other.name] = f"{has} instead of {norm.num_groups} groups and epsilon {wanted['eps']:.3g}"


@torch.no_grad()
def _other_than(copy: nn.Module, shape: tuple[int, ...], norm: nn.GroupNorm, wanted: dict[str, Any]) -> str:
    """Return what a norm computes with instead of what is wanted; nothing where it computes that."""
    like = next(iter(own_tensors(norm).values()), torch.empty(0))
    x = normal(shape, torch.Generator().manual_seed(0)).to(like)
    expected = F.group_norm(x, wanted["num_groups"], norm.weight, norm.bias, wanted["eps"])
    with operands_of("native_group_norm") as found:
        made = copy(x.clone())
    if found:
        groups, eps = int(found[0][6]), float(found[0][7])
        same = groups == wanted["num_groups"] and abs(eps - wanted["eps"]) <= 1e-6 * wanted["eps"]
        return "" if same else f"{groups} groups and epsilon {eps:.3g}"
    close = isinstance(made, Tensor) and made.shape == expected.shape and _difference(made, expected) <= TOLERANCE
    return "" if close else "statistics of its own"


def _plan_other(layer: Layer, other: Layer, changes: _Changes) -> None:
    ours, theirs = own_tensors(layer.module), own_tensors(other.module)
    if ours.keys() == theirs.keys():
        matched = [(key, ours[key]) for key in theirs]
    else:
        matched = list(zip(theirs, ours.values(), strict=True))
    for key, value in matched:
        if value.shape != theirs[key].shape:
            raise TransferFailed(
                f"{other.name}.{key} is {tuple(theirs[key].shape)}, for {tuple(value.shape)} of {layer.name}; {ALIKE}"
            )
        changes.values[other.name, key] = value.detach()


def _difference(found: Any, expected: Any) -> float:
    """Largest difference of two outputs relative to the largest value; infinite where they are not alike."""
    ours = [tensor.double() for tensor in tensors_in(found) if tensor.is_floating_point()]
    theirs = [tensor.double() for tensor in tensors_in(expected) if tensor.is_floating_point()]
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b.numel()]
    scaled = ((a - b).abs().max() / b.abs().max().clamp_min(1e-12) for a, b in pairs)
    return max((float(torch.nan_to_num(value, nan=float("inf"))) for value in scaled), default=0.0)
