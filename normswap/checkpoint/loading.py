"""Rebuild a converted network from the folder that `save` wrote."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.checkpoint.folder import CONFIG, WEIGHTS, Parsed, read_config, whole
from normswap.checkpoint.likeness import must_be_alike
from normswap.conversion.pipeline import apply
from normswap.errors import CheckpointError, InvalidOption, NeedsExampleInput, NormswapError, described
from normswap.networks.copying import in_mode
from normswap.networks.inputs import rebuild
from normswap.networks.network import Network
from normswap.networks.settings import own_settings
from normswap.planning.plan import Plan, plan_in
from normswap.sources.hub import HUB, fetch
from normswap.sources.provenance import recall
from normswap.sources.registry import Source, meta_build
from normswap.sources.state_dicts import fill, made_whole, must_fit, read_state_dict
from normswap.tracing.forward import trace


@own_settings()
def load(
    directory: str | PathLike[str],
    *,
    num_classes: int | None = None,
    model: nn.Module | None = None,
    weights: str | PathLike[str] | None = None,
) -> nn.Module:
    """Rebuild a converted network, with its weights, from the folder that `save` wrote.

    >>> model = load("OUT", num_classes=10)
    >>> tuned = load("OUT", num_classes=10, weights="last.ckpt")         # what a training tool left behind

    It takes the memory of one network, which is no part of the file: who writes to that changes nothing loaded.

    Args:
        directory: The folder, or ``hf-hub:user/name`` for one that `push` uploaded.
        num_classes: Outputs of a new head; tensors of the head that no longer fit keep their initialization,
            and no others. A network that `model` gives is built with as many.
        model: The unconverted network to start from, where the checkpoint names no source (your own classes). With
            the saved weights its layers must put out what the saved one's did.
        weights: File to take the tensors from instead: a state dict of the converted network after fine-tuning.
            Nesting and prefixes that training tools add are taken off, with a warning that says so.

    Returns:
        The network in eval mode; `normswap.plan_of` gives its plan.

    Raises:
        CheckpointError: A file is missing, damaged or belongs to another checkpoint, or the hub does not answer.
        PlanMismatch: `model` is not the network the checkpoint was made from, a layer of it puts out something else
            than when it was saved, or the plan is of a newer schema.
        InvalidOption: `model` fits the checkpoint as it is, and has another number of classes.
        UnknownModel: No registry here holds the network that the checkpoint was made from.
    """
    hub = str(directory).startswith(HUB)
    directory = fetch(str(directory), (WEIGHTS, CONFIG)) if hub else Path(directory)
    parse = partial(_described, where=directory, needs_source=model is None)
    with _opened(directory, weights, parse) as (description, path):
        plan, source = description.plan, description.source
        converted = _outline(source, plan, num_classes) if model is None else apply(model, plan)
        expected = converted.state_dict()
        state = read_state_dict(path, () if weights is None else expected)
    if model is None:
        head = partial(_head, source, num_classes)
        fresh = must_fit(expected, state, name=str(path), num_classes=num_classes, head=head)  # before memory is taken
        del expected
        _into_memory(state)
        if fresh or not made_whole(converted, state, name=str(path)):
            converted = apply(_attempt(source.build, source, num_classes), plan, inplace=True)
            fill(converted, state, name=str(path), head=fresh, take=True)
    else:
        head = partial(_resized, expected, state, num_classes)
        fresh = must_fit(expected, state, name=str(path), num_classes=num_classes, head=head)
        if num_classes is not None and not fresh:
            _must_put_out(converted, plan, num_classes)
        fill(converted, state, name=str(path), head=fresh)
        if weights is None and not fresh:
            block = description.config["normswap"]
            must_be_alike(converted, plan.inputs, block.get("outputs", {}), str(directory / CONFIG))
    recall(converted, description.config)
    return in_mode(converted, False)


def names_no_source(directory: Path) -> bool:
    """Tell whether `load` needs the network: it was converted from the user's own classes."""
    return read_config(directory)["normswap"].get("source") is None


@contextmanager
def _opened(
    directory: Path, weights: str | PathLike[str] | None, parse: Callable[[dict[str, Any]], Parsed]
) -> Iterator[tuple[Parsed, Path]]:
    """Yield what the configuration says, and the file of the tensors: the checkpoint's own, or the one given."""
    if weights is not None:
        yield parse(read_config(directory)), Path(weights)
        return
    with whole(directory, parse) as found:
        yield found


@dataclass(frozen=True)
class _Description:
    """What a checkpoint's configuration says: the plan, and the source where the network is not given."""

    config: Mapping[str, Any]
    plan: Plan
    source: Any


def _described(config: Mapping[str, Any], *, where: Path, needs_source: bool) -> _Description:
    block, source = config["normswap"], None
    plan = plan_in(block, str(where / CONFIG))
    if needs_source and block.get("source") is None:
        raise CheckpointError(
            f"{where}: names no registered model; pass load(directory, model=Network()), "
            "or --model package.module:factory"
        )
    if needs_source:
        source = Source.from_dict(block["source"])
    return _Description(config, plan, source)


def _outline(source: Source, plan: Plan, num_classes: int | None) -> nn.Module:
    """Return the converted network without data, where it can be built so."""
    return apply(_attempt(partial(meta_build, source), source, num_classes), plan, inplace=True)


def _into_memory(state: dict[str, Tensor]) -> None:
    """Copy tensors that may be mapped from a file, one by one: who writes over that would write into the network."""
    for key in state:
        state[key] = state[key].clone()


def _head(source: Source, num_classes: int | None) -> set[str]:
    """Return the names of the tensors whose size follows the number of classes, by building two sizes."""
    classes = num_classes or 0
    one, other = (_attempt(partial(meta_build, source), source, count).state_dict() for count in (classes, classes + 1))
    return {name for name, tensor in one.items() if name not in other or other[name].shape != tensor.shape}


def _resized(own: Mapping[str, Tensor], state: Mapping[str, Tensor], num_classes: int | None) -> set[str]:
    """Return the names of the tensors that have a row per class, and the same rows in a file but for their number."""
    return {
        name
        for name, tensor in own.items()
        if tensor.shape[:1] == (num_classes,) and tensor.shape[1:] == state[name].shape[1:] and state[name].ndim
    }


def _must_put_out(model: nn.Module, plan: Plan, num_classes: int) -> None:
    """Raise unless a network of which all tensors fit a checkpoint has as many classes as are asked for."""
    network, inputs = Network(model), rebuild(plan.inputs) if plan.inputs is not None else None
    try:
        found = {
            size for shape in trace(network, inputs, until=(), edges=False).shapes.get("", ()) for size in shape[1:]
        }
    except NeedsExampleInput:
        found = set()
    if num_classes not in found:
        raise InvalidOption(
            f"num_classes={num_classes!r} says nothing: the network that model= is fits the checkpoint, head and all, "
            f"and does not put out {num_classes} values; build it with as many classes, or leave num_classes= out"
        )


def _attempt(build: Callable[..., nn.Module], source: Source, num_classes: int | None) -> nn.Module:
    try:
        return build(**({} if num_classes is None else {"num_classes": num_classes}))
    except NormswapError:
        raise
    except Exception as error:  # builders fail in as many ways as there are families
        raise CheckpointError(
            f"source {source.name!r} cannot be built ({described(error)}); convert it again"
        ) from error
