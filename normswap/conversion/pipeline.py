"""Convert a model: inspect, apply, look at the result. The orchestrator of the other files."""

import math
import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from normswap.calibration.moments import measure_drift
from normswap.conversion.structure import structural_checks
from normswap.conversion.surgery import PLAN, apply
from normswap.errors import AlreadyConverted, CheckFailed, InvalidOption, NothingToConvert
from normswap.layers.convs import WeightStandardized
from normswap.networks.copying import copy_model, meta_copy
from normswap.networks.strays import refuse_strays
from normswap.networks.validation import must_be_finite, refuse_unsupported, unwrap
from normswap.planning.decisions import make_plan
from normswap.planning.groups import group_counts
from normswap.planning.options import Options, flat_overrides
from normswap.planning.plan import Plan
from normswap.tracing.forward import Trace, trace


def convert(
    model: nn.Module,
    *,
    groups: int | str = 32,
    group_size: int | None = None,
    to: str = "group",
    ws: str = "auto",
    affine: str = "match",
    shrink: float | None = None,
    example_input: Any = None,
    batches: Iterable[Any] | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, Mapping[str, int | str]] = MappingProxyType({}),
    inplace: bool = False,
    check: bool = True,
) -> nn.Module:
    """Turn a BatchNorm network into a GroupNorm + Weight Standardization network that keeps what it learned.

    >>> model = convert(timm.create_model("resnet50", pretrained=True))

    Args:
        model: Any network; timm, torchvision and your own. ``torch.compile``, DDP and DataParallel are unwrapped.
        groups: Largest group count; each layer gets the largest divisor of its channels that fits (Wu & He 2018).
            ``"auto"`` gives each layer the count whose statistics move its output least (`normswap.Entry.drift`).
        group_size: Channels a group instead of `groups`.
        to: ``"group"``, ``"layer"`` (one group) or ``"instance"`` (one channel a group).
        ws: Weight standardization of the convolutions in front of replaced norms. ``"adaptive"`` keeps their kernels
            exactly and only training moves them; ``"standard"`` is the paper's (Qiao et al. 2019, equation 2);
            ``"auto"`` is adaptive where the norms are trained and standard where they are fresh; or ``"none"``.
        affine: ``"match"`` finds the affine values with which GroupNorm does what BatchNorm did; ``"copy"`` keeps γ, β.
        shrink: How far a matched norm draws a sample's variance towards the running one: its epsilon is BatchNorm's
            plus `shrink` times the running variance of its groups. 0 keeps BatchNorm's epsilon; by default 0.5, and
            1.5 with ``groups="auto"``.
        example_input: A tensor, a tuple of positional arguments or a dict of keyword arguments, of which only shapes
            are used; by default it is made up from what the model says about itself.
        batches: Images, without labels, on which ``groups="auto"`` measures instead of estimating; a few do.
        include: Glob patterns of qualified names; only these layers are touched.
        exclude: Glob patterns of layers to leave alone.
        overrides: Other options for some layers, by glob pattern: ``{"layer4.*": {"groups": 8, "ws": "none"}}``; of
            `groups`, `group_size`, `to` and `ws`.
        inplace: Change `model` instead of a copy. Parameters stay the same objects either way of counting, so an
            optimizer made before stays valid.
        check: Look for weights that are not finite, trace the result and compare every module's output shape; in
            place, on a twin without data before anything is changed.

    Returns:
        The converted network; `normswap.plan_of` tells what was done.

    Raises:
        NothingToConvert: The model holds no BatchNorm, or the options leave all of it alone.
        UnsupportedModel: It is scripted, quantized, sharded or uninitialized, or runs BatchNorm that is no module.
        NeedsExampleInput: No forward pass ran with a made-up input.
        BadStatistics: Weights are not finite, or running statistics are negative or not finite.
        CheckFailed: The result does not behave; the model is as it was.
    """
    options = Options(groups, group_size, to, ws, affine, shrink, include, exclude, flat_overrides(overrides))  # type: ignore[arg-type]
    refuse_unsupported(model)
    network = unwrap(model)
    plan, before = _inspected(network, example_input, options, batches)
    if before.functional_norms:
        refuse_strays(network)
    if not plan.changes:
        _nothing_to_do(network, plan, before)
        return network if inplace else copy_model(network)
    if check:
        must_be_finite(network, but={f"{entry.name}.weight" for entry in plan.convs if entry.changes})
    if inplace and check:
        _checked(apply(_twin(network, before), plan, inplace=True), plan, before)
    converted = apply(network, plan, inplace=inplace)
    return _checked(converted, plan, before) if check and not inplace else converted


def inspect(
    model: nn.Module,
    *,
    groups: int | str = 32,
    group_size: int | None = None,
    to: str = "group",
    ws: str = "auto",
    affine: str = "match",
    shrink: float | None = None,
    example_input: Any = None,
    batches: Iterable[Any] | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, Mapping[str, int | str]] = MappingProxyType({}),
) -> Plan:
    """Return what `convert` would do, with the same arguments; the model is only read.

    >>> print(inspect(model))

    Raises:
        UnsupportedModel: It is scripted, quantized, sharded or uninitialized.
        NeedsExampleInput: No forward pass ran with a made-up input.
    """
    options = Options(groups, group_size, to, ws, affine, shrink, include, exclude, flat_overrides(overrides))  # type: ignore[arg-type]
    refuse_unsupported(model)
    return _inspected(unwrap(model), example_input, options, batches)[0]


def _inspected(
    model: nn.Module, example_input: Any, options: Options, batches: Iterable[Any] | None
) -> tuple[Plan, Trace]:
    found = trace(model, example_input)
    plan = make_plan(model, found, options)
    if batches is None:
        return plan, found
    chosen = {
        entry.name: group_counts(entry.channels, positions=math.prod((entry.shape or ())[2:]))
        for entry in plan.norms
        if entry.groups_asked == "auto" and entry.affine == "match" and entry.shape is not None
    }
    if not chosen:
        raise InvalidOption("batches= are for groups='auto' and trained norms; there are none here, leave it out")
    measured = measure_drift(copy_model(model).eval(), chosen, batches, shrink=options.shrink_for("auto"))
    return make_plan(model, found, options, measured), found


def _nothing_to_do(model: nn.Module, plan: Plan, before: Trace) -> None:
    standardized = sum(isinstance(module, WeightStandardized) for module in model.modules())
    if PLAN in vars(model) and not plan.norms:
        warnings.warn(
            f"{type(model).__name__} was converted before ({standardized} weight-standardized convolutions); unchanged",
            AlreadyConverted,
            stacklevel=3,
        )
    elif not plan.norms and before.functional_norms:
        where = before.functional_norms[0] or "its own forward"
        raise NothingToConvert(
            f"{type(model).__name__} holds no BatchNorm module, but {where} calls batch_norm; "
            "make it an nn.BatchNorm or teach it with normswap.register_norm"
        )
    elif not plan.norms:
        raise NothingToConvert(f"{type(model).__name__} holds no BatchNorm; nothing to convert")
    else:
        first = plan.norms[0]
        advice = "change include= or exclude=" if first.by_user else "or teach it with normswap.register_norm"
        raise NothingToConvert(
            f"all {len(plan.norms)} norms of {type(model).__name__} are left alone ({first.name}: {first.reason}); "
            f"{advice}"
        )


def _twin(model: nn.Module, before: Trace) -> nn.Module:
    """Return a copy to rehearse on: one that holds no data, where that runs."""
    return copy_model(model) if before.with_data else meta_copy(model)


def _checked(converted: nn.Module, plan: Plan, before: Trace) -> nn.Module:
    after = trace(converted, before.inputs, until=before.norms, edges=False)
    checks = structural_checks(converted, plan, after, before)
    if not checks:
        failed = checks.failed[0]
        raise CheckFailed(f"{failed.name}: {failed.detail}; convert with check=False to look at the result")
    return converted
