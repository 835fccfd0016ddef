"""Write a converted network to a folder and rebuild it from there."""

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from normswap.atomic import replacing
from normswap.card import model_card
from normswap.checks import Checks
from normswap.description import recall, timm_config
from normswap.errors import CheckpointError, PlanMismatch
from normswap.fetching import HUB, fetch
from normswap.plan import Plan
from normswap.sources import Source, find, meta_build, source_of
from normswap.standardization import FORMULA
from normswap.storage import stored_tensors
from normswap.surgery import apply, plan_of
from normswap.version import __version__
from normswap.weights import fill, read_state_dict
from normswap.wrapping import unwrap

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


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
    and renamed, the configuration last. timm's networks know their source; without one, `load` needs the network.

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
    metadata = {"format": "pt", "normswap": json.dumps(config["normswap"])}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS) as path:
            safetensors.torch.save_file(tensors, path, metadata=metadata)
            config["normswap"]["sha256"] = _digest(path)
        with replacing(directory / CARD) as path:
            path.write_text(model_card(config), encoding="utf-8")
        with replacing(directory / CONFIG) as path:
            path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
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
    block = config["normswap"]
    plan = Plan.from_dict(block.get("plan"))
    if weights is None:
        verify(directory, config)
    if model is None:
        if block.get("source") is None:
            raise CheckpointError(f"{directory}: names no registered model; pass load(directory, model=YourNetwork())")
        changed: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        model = Source.from_dict(block["source"]).build(**changed)
    model = apply(model, plan)
    path = directory / WEIGHTS if weights is None else Path(weights)
    state = read_state_dict(path, model.state_dict())
    fill(model, state, name=str(path), may_drop_head=num_classes is not None)
    recall(model, config)
    return model.eval()


def read_config(directory: Path) -> dict[str, Any]:
    """Return a checkpoint's configuration.

    Raises:
        CheckpointError: There is none, or it is not normswap's.
    """
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: holds no {CONFIG}; pass a folder that normswap wrote") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG}: cannot be read ({error}); save the checkpoint again") from error
    if not isinstance(config, dict) or not isinstance(config.get("normswap"), dict):
        raise CheckpointError(f"{directory / CONFIG}: is not normswap's; pass a folder that normswap wrote")
    return config


def verify(directory: Path, config: Mapping[str, Any]) -> None:
    """Compare the tensors with the digest in the configuration beside them.

    Raises:
        CheckpointError: They were not saved together.
    """
    if _digest(directory / WEIGHTS) != config["normswap"].get("sha256"):
        raise CheckpointError(
            f"{directory / WEIGHTS}: does not belong to {CONFIG} beside it; save the checkpoint again"
        )


def names_no_source(directory: Path) -> bool:
    """Tell whether `load` needs the network: it was converted from the user's own classes."""
    return read_config(directory)["normswap"].get("source") is None


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
        "schema": 1,
        "versions": {"normswap": __version__, "torch": torch.__version__},
        "source": None if source is None else source.to_dict(),
        "base_model": (getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id"),
        "weight_standardization": FORMULA,
        "plan": plan.to_dict(),
        "checks": None if checks is None else checks.to_dict(),
    }
    return {**timm_config(model, plan, source), "normswap": block}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); pass a folder that normswap wrote"
        ) from error


def _size(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
