"""Write a converted network to a folder."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checkpoint.card import model_card
from normswap.checkpoint.config import timm_config
from normswap.checkpoint.folder import write
from normswap.checkpoint.tensors import stored_tensors
from normswap.conversion.carried_plan import plan_of
from normswap.conversion.checks import Checks
from normswap.conversion.pipeline import apply
from normswap.errors import CheckpointError, PlanMismatch
from normswap.layers.standardization import FORMULA
from normswap.networks.validation import unwrap
from normswap.planning.plan import Plan
from normswap.planning.schema import SCHEMA
from normswap.sources.provenance import source_of
from normswap.sources.registry import Source, find, meta_build
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
        CheckpointError: The folder cannot be written, a tensor has no data, or `source` builds another network.
        PlanMismatch: The network was not converted by normswap.
        UnknownModel: No registry holds `source`.
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
