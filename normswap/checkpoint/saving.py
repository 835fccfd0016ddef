"""Write a converted network to a folder."""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normswap.checkpoint.card import model_card
from normswap.checkpoint.config import timm_config
from normswap.checkpoint.folder import CONFIG, unwritable, write
from normswap.checkpoint.likeness import traits_of
from normswap.checkpoint.tensors import stored_tensors
from normswap.conversion.carried_plan import plan_of
from normswap.conversion.checks import Checks
from normswap.conversion.pipeline import apply
from normswap.conversion.present_plan import present_plan
from normswap.errors import CheckpointError, PlanMismatch, first_line
from normswap.layers.standardization import FORMULA
from normswap.networks.network import Network
from normswap.networks.settings import own_settings
from normswap.networks.validation import unwrap
from normswap.planning.plan import Plan, plan_in
from normswap.planning.schema import SCHEMA, must_be_inputs, text
from normswap.sources.provenance import source_of
from normswap.sources.registry import Source, find, meta_build
from normswap.sources.untrusted_json import MAX_BYTES, parse_json
from normswap.version import __version__


@own_settings()
def save(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    source: str | Source | None = None,
    checks: Checks | None = None,
    weights: Literal["pretrained", "random", "file"] | None = None,
    replace: bool = True,
) -> Path:
    """Write a converted network as ``model.safetensors``, ``config.json`` and ``README.md``.

    >>> save(model, "OUT", source="torchvision/resnet18")

    The configuration is timm's schema plus a ``normswap`` block with the plan. Files are written under temporary names
    and renamed together: whatever interrupts it, the old checkpoint or the new one is there. timm's networks know their
    source, unless they were changed (another head), of which a warning tells; without one, `load` needs the network.

    Args:
        model: A converted network, fine-tuned or not.
        directory: Folder to write to; made if missing, files of an earlier checkpoint are replaced.
        source: Name that rebuilds the unconverted architecture, as ``normswap list`` prints it.
        checks: Result of `normswap.check` to keep with the checkpoint.
        weights: Whose the unconverted network's were: those that its source names as pretrained, with their license and
            repository, random ones, or a file's. The model card says so; without, that they are yours.
        replace: Whether files of an earlier checkpoint may be replaced.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder cannot be written or holds a checkpoint that is not to be replaced, a tensor has no
            data, or `source` builds another network.
        PlanMismatch: The network was not converted by normswap.
        UnknownModel: No registry holds `source`.
    """
    model, directory = unwrap(model), Path(directory)
    network = Network(model)
    plan = _storable(present_plan(network, plan_of(model)))
    known, tensors = find(source) if isinstance(source, str) else source or source_of(model), stored_tensors(model)
    if known is not None and (other := _other_network(known, plan, tensors, network)):
        other = f"source {known.name!r} builds another network ({other})"
        if source is not None:
            raise CheckpointError(f"{other}; pass the source it was made from, or leave the source out")
        warnings.warn(f"{other} and is left out; load(directory, model=…) takes the unconverted network", stacklevel=3)
        known = None
    config = _config(model, plan, known, checks, weights)
    if known is None:
        config["normswap"]["outputs"] = traits_of(model, plan.inputs)
    _must_be_readable(config, plan, str(directory / CONFIG))
    try:
        write(directory, tensors, config, model_card(config), replace=replace)
    except OSError as error:
        raise unwritable(directory, error) from error
    return directory


def _storable(plan: Plan) -> Plan:
    """Return the plan as a file may hold it: without example inputs that nobody could read back.

    Raises:
        CheckpointError: A layer has a name that no file may hold.
    """
    for entry in plan.entries:
        if strange := [name for name in (entry.name, *entry.aliases) if not text(name)]:
            raise CheckpointError(
                f"{strange[0]!a:.200}: a layer's name must be one line without control characters, so that it can be "
                "stored; rename the layer before converting"
            )
    try:
        must_be_inputs(plan.inputs)
    except ValueError:
        return dataclasses.replace(plan, inputs=None)
    return plan


def _must_be_readable(config: dict[str, Any], plan: Plan, where: str) -> None:
    """Prove, before anything is written, that what will be read is what is written."""
    try:
        content = json.dumps(config, indent=1, allow_nan=False)
        if len(content) > MAX_BYTES:
            raise ValueError(f"would be larger than {MAX_BYTES >> 20} MiB")
        if plan_in(parse_json(content)["normswap"], where) != plan:
            raise ValueError("would read back as another plan")
    except (ValueError, TypeError, PlanMismatch) as error:
        raise CheckpointError(f"{where}: cannot be written ({first_line(error)})") from error


def _other_network(source: Source, plan: Plan, tensors: Mapping[str, Tensor], network: Network) -> str:
    """Return where the source and the plan give another network than this; empty where they give this."""
    try:
        model = apply(meta_build(source), plan, inplace=True)
    except PlanMismatch as error:
        return str(error)
    built = model.state_dict()
    for name in sorted({*built, *tensors}):
        ours, theirs = (x[name].shape if name in x else None for x in (tensors, built))
        if ours != theirs:
            return f"{name}: {_size(theirs)} there, {_size(ours)} here"
    theirs_by_name = Network(model).slots
    for name, module in network.slots.items():
        here, there = _outline(module), _outline(theirs_by_name.get(name))
        if here != there:
            return f"{name}: {there} there, {here} here"
    return ""


def _outline(module: nn.Module | None) -> str:
    """Return the class of a module, and of a layer that convolves or normalizes by groups its settings."""
    settings = isinstance(module, (_ConvNd, nn.GroupNorm))
    return "nothing" if module is None else type(module).__name__ + (f"({module.extra_repr()})" if settings else "")


def _config(
    model: nn.Module, plan: Plan, source: Source | None, checks: Checks | None, weights: str | None
) -> dict[str, Any]:
    block = {
        "schema": SCHEMA,
        "versions": {"normswap": __version__, "torch": torch.__version__},
        "source": None if source is None else source.to_dict(),
        "base_model": (getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id"),
        "weights": weights,
        "weight_standardization": FORMULA,
        "plan": plan.to_dict(),
        "checks": None if checks is None else checks.to_dict(),
    }
    return {**timm_config(model, plan, source), "normswap": block}


def _size(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
