"""Convert a model: look at it, plan, replace, look at the result."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from os import PathLike
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from normswap.conversion.carried_plan import carried_plan, carry_plan, must_fit
from normswap.conversion.moments import alignable, match_moments
from normswap.conversion.present_plan import joined
from normswap.conversion.replacements import rewritten_filters
from normswap.conversion.sizes import disturbed
from normswap.conversion.structure import AROUND, TEACH, structural_checks
from normswap.conversion.surgery import operate
from normswap.errors import AlreadyConverted, CheckFailed, InvalidOption, NeedsExampleInput, NothingToConvert
from normswap.networks.copying import copy_model, in_mode, meta_copy
from normswap.networks.garbage import collecting_later
from normswap.networks.inputs import reference
from normswap.networks.network import Network
from normswap.networks.recognition import refuse_strays
from normswap.networks.settings import own_settings
from normswap.networks.sharing import large_parameters, sparing
from normswap.networks.surroundings import Surroundings, undisturbed
from normswap.networks.validation import must_be_finite, refuse_unsupported, unwrap
from normswap.planning.choices import Action, Affine
from normswap.planning.decisions import make_plan, recorded
from normswap.planning.entry import NormEntry
from normswap.planning.measuring import Images, Prepared, first_batches, must_be_batches, watch
from normswap.planning.options import Options, Wishes
from normswap.planning.plan import Plan, as_plan
from normswap.planning.synthetic import synthetic
from normswap.tracing.facts import Trace
from normswap.tracing.forward import trace


def convert(
    model: nn.Module,
    *,
    example_input: Any = None,
    batches: Iterable[Any] | Literal["synthetic"] | None = None,
    inplace: bool = False,
    check: bool = True,
    **options: Unpack[Wishes],
) -> nn.Module:
    """Turn a BatchNorm network into a GroupNorm + Weight Standardization network that keeps what it learned.

    >>> model = convert(timm.create_model("resnet50", pretrained=True))

    Args:
        model: Any network; timm, torchvision and your own. ``torch.compile``, DDP and DataParallel are unwrapped.
        groups: Largest group count; each layer gets the largest divisor of its channels that fits (Wu & He 2018).
            ``"auto"`` gives each layer the count whose statistics move its output least (`normswap.NormEntry.drift`).
        group_size: Channels per group instead of `groups`.
        to: ``"group"``, ``"layer"`` (one group), ``"instance"`` (one channel per group), or ``"frozen"``: every norm
            stays the function that it is in eval mode, in train mode, too, and convolutions stay as they are.
        over: ``"sample"``: statistics of a group's channels over all positions, as GroupNorm's are; or ``"channels"``:
            each position (a frame, a point, a pixel) has its own, so that causal networks stay causal.
        ws: Weight standardization of the convolutions in front of replaced norms. ``"adaptive"`` keeps their kernels
            exactly and only training moves them; ``"standard"`` is the paper's (Qiao et al. 2019, equation 2);
            ``"auto"`` is standard where norms and filters show that the network is fresh, else adaptive; or ``"none"``.
        affine: ``"match"`` finds the affine values with which GroupNorm does what BatchNorm did; ``"copy"`` keeps γ, β.
        shrink: How far a matched norm draws a sample's variance towards the running one: its epsilon is BatchNorm's
            plus `shrink` times the running variance of its groups. 0 keeps BatchNorm's epsilon; by default 4, and
            60 with ``groups="auto"``; behind filters that are not equalized 0.5 and 1.5.
        equalize: Give the filters before matched norms scales and signs that BatchNorm does not see and with which
            GroupNorm keeps more of the function.
        example_input: A tensor, a tuple of positional arguments or a dict of keyword arguments; or a DataLoader, or its
            batch, of which labels are left out where the network does not take them. Of floats only shapes are used, of
            whole numbers and truth values the values. By default it is made up from what the model says about itself,
            and the plan says what was.
        batches: Images, without labels: batches as the network takes them, or ``[images, labels]`` of a DataLoader, of
            which the first 256 samples are looked at. They tell scales, signs and group counts with which samples' own
            statistics move the outputs least (`normswap.layers.equalization`), and every norm's affine values are set
            by least squares towards the original's outputs on them. ``"synthetic"`` makes up 64 inputs, which tell
            scales and signs alone. Without, filters and running statistics tell them, without a forward pass.
        keep: How the norms go on that `include` and `exclude` leave alone: ``"frozen"``, with the statistics they have
            in train mode, too, or ``"live"``.
        include: Glob patterns of qualified names; only these layers, and those in modules of such a name, are touched.
        exclude: Glob patterns of layers, or of modules that hold them, to leave alone.
        overrides: Other options for some layers, by glob pattern: ``{"layer4": {"groups": 8, "ws": "none"}}``; of
            `groups`, `group_size` and `to` for norms, and `ws` for convolutions.
        inplace: Change `model` instead of a copy. Parameters stay the same objects, so an optimizer made before stays
            valid.
        check: Look for weights that are not finite, trace the result and compare every module's output shape, but for
            sizes that follow from values; in place, on a twin without data before anything is changed.

    Returns:
        The converted network; `normswap.plan_of` tells what was done.

    Raises:
        InvalidOption: An option is unknown, has a value no layer could be converted with, or is for no layer that
            its pattern matches.
        NothingToConvert: The model holds no BatchNorm, or the options leave all of it alone.
        UnsupportedModel: It is scripted, quantized, sharded or uninitialized, cannot be copied, or runs BatchNorm that
            is no module.
        NeedsExampleInput: No forward pass ran with a made-up input.
        BadStatistics: Weights are not finite, or running statistics are negative or not finite.
        CheckFailed: The result does not behave; the model is as it was.
    """
    applied: Callable[[Network, Plan], nn.Module] = _applied if inplace else _applied_to_copy
    return _converted(model, example_input, batches, applied, check=check, options=Options.of(**options))


def convert_beside(
    model: nn.Module,
    *,
    example_input: Any = None,
    batches: Literal["synthetic"] | None = None,
    **options: Unpack[Wishes],
) -> nn.Module:
    """Return a converted network that has the memory of every large tensor that stays as it is in common with `model`.

    So neither may be trained; where the model is mapped from a file, both together take one network's memory at most.

    Args:
        model: As for `convert`, with the same errors.
        example_input: As for `convert`.
        batches: As for `convert`, without images.
        **options: As for `convert`.
    """
    return _converted(model, example_input, batches, _applied_beside, check=True, options=Options.of(**options))


@own_settings()
def _converted(
    model: nn.Module,
    example_input: Any,
    batches: Any,
    applied: Callable[[Network, Plan], nn.Module],
    *,
    check: bool,
    options: Options,
) -> nn.Module:
    refuse_unsupported(model)
    network, inplace = Network(unwrap(model)), applied is _applied
    images = _few(network, batches)
    around = Surroundings(network.model)
    plan, before = _inspected(network, example_input, options, images, around)
    if before.functional_norms:
        refuse_strays(network.model)
    if not plan.converts:
        _nothing_to_do(network, plan, before)
        return network.model if inplace else copy_model(network.model)
    if check:
        must_be_finite(network.model, but={f"{entry.name}.weight" for entry in plan.convs if entry.changes})
    seen = isinstance(images, list) and any(entry.action is Action.GROUP_NORM for entry in plan.norms)
    original = in_mode(copy_model(network.model), False) if seen else None
    if inplace and check:  # on a twin, so that a model that does not pass stays as it is
        twin = copy_model(network.model) if before.with_data else meta_copy(network.model)
        _checked(_applied(Network(twin), plan), network, plan, before, around)
    converted = applied(network, plan)
    if check and not inplace:
        _checked(converted, network, plan, before, around)
    if original is not None:
        _matched(converted, original, plan, images)
    return converted


@own_settings()
def inspect(
    model: nn.Module,
    *,
    example_input: Any = None,
    batches: Iterable[Any] | Literal["synthetic"] | None = None,
    **options: Unpack[Wishes],
) -> Plan:
    """Return what `convert` would do, with the same arguments; the model is only read.

    >>> print(inspect(model))

    Args:
        model: As for `convert`.
        example_input: As for `convert`.
        batches: As for `convert`.
        **options: As for `convert`.

    Raises:
        InvalidOption: An option is unknown or has a value no layer could be converted with.
        UnsupportedModel: It is scripted, quantized, sharded or uninitialized, or cannot be copied.
        NeedsExampleInput: No forward pass ran with a made-up input.
    """
    wanted = Options.of(**options)
    refuse_unsupported(model)
    network = Network(unwrap(model))
    images = _few(network, batches)
    return _inspected(network, example_input, wanted, images, Surroundings(network.model))[0]


@own_settings()
def apply(model: nn.Module, plan: Plan | str | PathLike[str], *, inplace: bool = False) -> nn.Module:
    """Replace the layers that `plan` names, and nothing else.

    >>> state = converted.state_dict()                      # after fine-tuning
    >>> fresh = apply(timm.create_model("resnet50"), "OUT/config.json")
    >>> fresh.load_state_dict(state)

    Every replacement is built before the first is put in place; an error leaves the model as it was. The Parameter
    objects are carried over, so an optimizer made before an in-place conversion stays valid. Works on the meta device.

    Args:
        model: The network the plan was made for, or one of the same architecture.
        plan: A plan, or the path of a converted checkpoint's ``config.json``.
        inplace: Change `model` itself instead of a copy.

    Returns:
        The converted network.

    Raises:
        PlanMismatch: A layer is missing, is of another kind or has another number of channels; the plan gives a layer
            what it cannot have; or the file holds no plan.
        BadStatistics: A norm's running statistics are negative or not finite, or the variance of filters is not.
        UnsupportedModel: It cannot be copied.
    """
    plan, network = as_plan(plan), Network(unwrap(model))
    must_fit(network, plan)
    return _applied(network, plan) if inplace else _applied_to_copy(network, plan)


@collecting_later()
def _applied_to_copy(network: Network, plan: Plan) -> nn.Module:
    """Replace the layers of a copy, of which filters that get new values are not copied first."""
    lent = list(rewritten_filters(network, plan))
    copy = Network(copy_model(network.model, lent))
    return _applied(copy, plan, borrowed=list(rewritten_filters(copy, plan)))


@collecting_later()
def _applied_beside(network: Network, plan: Plan) -> nn.Module:
    """Replace the layers of a copy that has large parameters in common with the network, but for those that change."""
    copy = Network(copy_model(network.model, large_parameters(network.model)))
    return _applied(copy, plan, borrowed=list(large_parameters(copy.model)), own=False)


def _applied(network: Network, plan: Plan, borrowed: Collection[nn.Parameter] = (), *, own: bool = True) -> nn.Module:
    """Replace the layers of a network, in place, and have it carry the plan."""
    earlier = carried_plan(network.model)
    model = operate(network, plan, borrowed, own=own)
    carry_plan(model, plan if earlier is None else joined(earlier, plan, Network(model)))
    return model


def _few(network: Network, batches: Any) -> Any:
    """Return the first batches as a list, prepared for the network; what is no iterable of batches as it is."""
    if batches is None or isinstance(batches, str):
        if batches not in (None, "synthetic"):
            raise InvalidOption(f"batches={batches!r} is neither batches of images nor 'synthetic'")
        return batches
    must_be_batches(batches)
    found = first_batches(Prepared(batches, reference(network.model)))
    if not found:
        raise InvalidOption("batches= holds no images; pass at least one batch, or leave it out")
    return found


def _inspected(
    network: Network, example_input: Any, options: Options, images: Any, around: Surroundings
) -> tuple[Plan, Trace]:
    if any(options.patterns()):
        aliases = {other: first for first in network.modules for other in network.aliases(first)}
        options.must_match(network.modules, (*network.norms, *network.convs), aliases)
    found = trace(network, example_input, around=around)

    def look(norms: Iterable[NormEntry]) -> Images:
        norms = list(norms)
        made_up = isinstance(images, str)
        if images is None or (made_up and not any(entry.affine is Affine.MATCH for entry in norms)):
            return {}
        must_be_finite(network.model)
        spec = recorded(found.inputs)
        return sparing(lambda: watch(network, norms, _made_up(network, spec) if made_up else images))

    with around.undisturbed():  # norms are run by themselves, too
        return make_plan(network, found, options, look), found


def _made_up(network: Network, spec: Any) -> Iterator[Tensor]:
    """Return made-up inputs of the size and range that the network states.

    Raises:
        NeedsExampleInput: The network takes something else than one tensor of numbers per sample.
    """
    while isinstance(spec, dict) and len(spec) == 1 and len(next(iter(spec.values()))) == 1:
        items = next(iter(spec.values()))
        spec = next(iter(items.values())) if isinstance(items, dict) else items[0]
    if not isinstance(spec, dict) or "float" not in str(spec.get("dtype")) or not 3 <= len(spec["tensor"]) <= 5:
        raise NeedsExampleInput(
            f"no inputs can be made up for {network.kind}: it takes something else than one image, volume or signal "
            "per sample; pass batches= of your own, or leave them out (--no-synthetic)"
        )
    shape = tuple(spec["tensor"][1:])
    config = getattr(network.model, "pretrained_cfg", None) or {}
    stated = {key: tuple(config[key]) for key in ("mean", "std") if len(config.get(key) or ()) == shape[0]}
    if shape[0] == 3:
        stated = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)} | stated
    return synthetic(shape, **stated)  # type: ignore[arg-type]


@torch.no_grad()
def _matched(converted: nn.Module, original: nn.Module, plan: Plan, images: list[Any]) -> None:
    """Set the norms' affine values to what images ask for; modes, hooks and everything else stay."""
    student = Network(in_mode(copy_model(converted), False))
    names = alignable(plan)
    with undisturbed(original):
        match_moments(student, Network(original), names, images)
    modules = Network(converted).slots
    for name in names:
        for key, value in modules[name].named_parameters(recurse=False):
            value.copy_(getattr(student.slots[name], key))


def _nothing_to_do(network: Network, plan: Plan, before: Trace) -> None:
    """Say why nothing is converted: a warning where that was done before, else an error."""
    if carried_plan(network.model) is not None and not plan.norms:
        standardized = len(list(network.standardized()))
        warnings.warn(
            f"{network.kind} was converted before ({standardized} weight-standardized convolutions); unchanged",
            AlreadyConverted,
            stacklevel=5,
        )
    else:
        raise nothing_to_convert(network.kind, plan, before.functional_norms)


def nothing_to_convert(kind: str, plan: Plan, functional_norms: Sequence[str] = ()) -> NothingToConvert:
    """Return the error that says why a plan converts nothing.

    Args:
        kind: What to call the network.
        plan: Its plan.
        functional_norms: Modules of it that call batch_norm as a function.
    """
    if not plan.norms and functional_norms:
        where = functional_norms[0] or "its own forward"
        return NothingToConvert(
            f"{kind} holds no BatchNorm module, but {where} calls batch_norm; "
            "make it an nn.BatchNorm or teach it with normswap.register_norm"
        )
    if not plan.norms:
        return NothingToConvert(f"{kind} holds no BatchNorm; nothing to convert")
    first, count = plan.norms[0], len(plan.norms)
    if all(entry.by_user for entry in plan.norms):
        left = "excluded" if all(entry.reason.startswith("excluded") for entry in plan.norms) else "left alone"
        where = first.name or "the network"
        return NothingToConvert(
            f"all {count} norms of {kind} are {left} ({where}: {first.reason}); change include= or exclude="
        )
    first = next(entry for entry in plan.norms if not entry.by_user)
    teach = "" if first.is_turned else f"; {TEACH}"
    return NothingToConvert(
        f"all {count} norms of {kind} are left alone ({first.name or 'the network'}: {first.reason}){teach}"
    )


@collecting_later()
def _checked(converted: nn.Module, original: Network, plan: Plan, before: Trace, around: Surroundings) -> nn.Module:
    network = Network(converted)
    try:
        after = trace(
            network, before.example, until=before.norms, edges=False, with_data=before.with_data, around=around
        )
    except NeedsExampleInput as error:
        what = str(error).rpartition("; pass")[0]
        raise CheckFailed(
            f"once converted, {what}; {AROUND}, or convert with check=False to look at the result"
        ) from error
    checks = structural_checks(network, plan, after, before, disturbed(original, plan, before, around))
    if not checks:
        failed = checks.failed[0]
        raise CheckFailed(f"{failed.name}: {failed.detail}; convert with check=False to look at the result")
    return converted
