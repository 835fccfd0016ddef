"""Write a converted network to a folder and rebuild it from there."""

from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checkpoint.card import model_card
from normswap.checkpoint.config import recall, timm_config
from normswap.checkpoint.folder import CONFIG, SCHEMA, WEIGHTS, read, read_config, write
from normswap.checkpoint.tensors import stored_tensors
from normswap.conversion.checks import Checks
from normswap.conversion.surgery import apply, plan_of
from normswap.errors import CheckpointError, NormswapError, PlanMismatch
from normswap.layers.standardization import FORMULA
from normswap.networks.validation import unwrap
from normswap.planning.plan import Plan, plan_in
from normswap.sources.fetching import HUB, fetch, first_line
from normswap.sources.registry import Source, find, meta_build, source_of
from normswap.sources.state_dicts import fill, must_fit, read_state_dict
from normswap.version import __version__


def save(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    source: str | Source | None = None,
    checks: Checks | None = None,
) -> Path:
    """Write a converted network as ``model.safetensors``, ``config.json`` and ``README.md``.

    >>> save(model, "OUT", source="torchvision/resnet18")

    The configuration is timm's schema plus a ``normswap`` block with the plan. Files are written under temporary names
    and renamed together: whatever interrupts it, the old checkpoint or the new one is there. timm's networks know their
    source; without one, `load` needs the network.

    Args:
        model: A converted network, fine-tuned or not.
        directory: Folder to write to; made if missing, files of an earlier checkpoint are replaced.
        source: Name that rebuilds the unconverted architecture, as ``normswap list`` prints it.
        checks: Result of `normswap.check` to keep with the checkpoint.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder cannot be written, or `source` builds another network.
        PlanMismatch: The network was not converted by normswap.
    """
    model, directory = unwrap(model), Path(directory)
    plan = plan_of(model)
    source = find(source) if isinstance(source, str) else source or source_of(model)
    tensors = stored_tensors(model)
    if source is not None:
        _must_rebuild(source, plan, tensors)
    config = _config(model, plan, source, checks)
    try:
        write(directory, tensors, config, model_card(config))
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot be written ({error.strerror or error}); choose another folder"
        ) from error
    return directory


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

    Args:
        directory: The folder, or ``hf-hub:user/name`` for one that `push` uploaded.
        num_classes: Outputs of a new head; tensors of the head that no longer fit keep their initialization.
        model: The unconverted network to start from, where the checkpoint names no source (your own classes).
        weights: File to take the tensors from instead: a state dict of the converted network after fine-tuning.
            Nesting and prefixes that training tools add are taken off, with a warning that says so.

    Returns:
        The network in eval mode; `normswap.plan_of` gives its plan.

    Raises:
        CheckpointError: A file is missing, damaged or belongs to another checkpoint.
        PlanMismatch: `model` is not the network the checkpoint was made from.
    """
    hub = str(directory).startswith(HUB)
    directory = fetch(str(directory), (WEIGHTS, CONFIG)) if hub else Path(directory)
    config = read_config(directory)
    plan = plan_in(config["normswap"], str(directory / CONFIG))
    if model is None and config["normswap"].get("source") is None:
        raise CheckpointError(
            f"{directory}: names no registered model; pass load(directory, model=Network()), or check --against MODEL"
        )
    state: Mapping[str, Tensor] | None = None
    if weights is None:
        config, state = read(directory)
        plan = plan_in(config["normswap"], str(directory / CONFIG))
    path = directory / WEIGHTS if weights is None else Path(weights)
    if model is None:
        source = Source.from_dict(config["normswap"].get("source"))
        state = read_state_dict(path, _outline(source, plan, num_classes)) if state is None else state
        model = _built(source, plan, num_classes, state, name=str(path))
    model = apply(model, plan)
    state = read_state_dict(path, model.state_dict()) if state is None else state
    fill(model, state, name=str(path), may_drop_head=num_classes is not None)
    recall(model, config)
    return model.eval()


def names_no_source(directory: Path) -> bool:
    """Tell whether `load` needs the network: it was converted from the user's own classes."""
    return read_config(directory)["normswap"].get("source") is None


def _built(source: Source, plan: Plan, num_classes: int | None, state: Mapping[str, Tensor], *, name: str) -> nn.Module:
    """Build a source's network once its tensors fit it: a file cannot ask for memory that it does not fill."""
    must_fit(_outline(source, plan, num_classes), state, name=name, num_classes=num_classes)
    return _attempt(source.build, source, num_classes)


def _outline(source: Source, plan: Plan, num_classes: int | None) -> Mapping[str, Tensor]:
    """Return the state of the converted network without data."""
    return apply(_attempt(partial(meta_build, source), source, num_classes), plan, inplace=True).state_dict()


def _attempt(build: Callable[..., nn.Module], source: Source, num_classes: int | None) -> nn.Module:
    try:
        return build(**({} if num_classes is None else {"num_classes": num_classes}))
    except NormswapError:
        raise
    except Exception as error:  # builders fail in as many ways as there are families
        raise CheckpointError(
            f"source {source.name!r} cannot be built ({type(error).__name__}: {first_line(error)}); convert it again"
        ) from error


def _must_rebuild(source: Source, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Prove, before anything is written, that the source and the plan give a network with these tensors."""
    try:
        built = apply(meta_build(source), plan, inplace=True).state_dict()
    except PlanMismatch as error:
        raise CheckpointError(f"source {source.name!r} builds another network ({error})") from error
    for name in sorted({*built, *tensors}):
        ours, theirs = (x[name].shape if name in x else None for x in (tensors, built))
        if ours != theirs:
            raise CheckpointError(
                f"source {source.name!r} builds another network ({name}: {_size(theirs)} there, {_size(ours)} here); "
                "pass the source it was made from"
            )


def _config(model: nn.Module, plan: Plan, source: Source | None, checks: Checks | None) -> dict[str, Any]:
    block = {
        "schema": SCHEMA,
        "versions": {"normswap": __version__, "torch": torch.__version__},
        "source": None if source is None else source.to_dict(),
        "base_model": (getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id"),
        "weight_standardization": FORMULA,
        "plan": plan.to_dict(),
        "checks": None if checks is None else checks.to_dict(),
    }
    return {**timm_config(model, plan, source), "normswap": block}


def _size(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
