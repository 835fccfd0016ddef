"""How config.json describes a converted network to timm."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from normswap.layers.norms import PositionNorm, takes_steps
from normswap.planning.plan import Plan
from normswap.sources.registry import ENTRYPOINT, Source, meta_build

ELSEWHERE = ("architecture", "state_dict", "url", "file", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
"""Where timm had the unconverted weights from: no part of the converted checkpoint's configuration."""


def timm_config(model: nn.Module, plan: Plan, source: Source | None) -> dict[str, Any]:
    """Return config.json as far as timm reads it; a network without a source has nothing that timm could build.

    Where timm builds the same network by itself the configuration names timm's architecture, so that it loads without
    normswap, too.
    """
    config: dict[str, Any] = {"architecture": ENTRYPOINT}
    pretrained = getattr(model, "pretrained_cfg", None)
    if isinstance(pretrained, Mapping):
        kept = {k: v for k, v in pretrained.items() if v is not None and k not in ELSEWHERE}
        config["pretrained_cfg"] = {k: v for k, v in kept.items() if _is_json(v)}
        channels = {} if source is None else source.arguments
        if "in_chans" in channels and "input_size" in kept:
            config["pretrained_cfg"]["input_size"] = [channels["in_chans"], *kept["input_size"][1:]]
    elif source is not None:
        config["pretrained_cfg"] = _head(source, model)
    for key in ("num_classes", "num_features", "global_pool"):
        if isinstance(getattr(model, key, None), (int, str)):
            config[key] = getattr(model, key)
    if source is None:
        return config
    if native := native_arguments(model, plan, source):
        # the number of classes is stated above; transformers would pass it twice
        arguments = {k: v for k, v in native.items() if k != "num_classes"}
        return config | {"architecture": source.name.split(".")[0], "model_args": arguments}
    return config | {"model_args": {"source": source.to_dict(), "plan": plan.to_dict()}}


def native_arguments(model: nn.Module, plan: Plan, source: Source) -> dict[str, Any] | None:
    """Return arguments with which timm itself builds this very network; None where it cannot.

    Proven on the meta device: the same modules by name, tensors, group counts and epsilons.
    """
    norms = [entry for entry in plan.norms if entry.changes]
    if source.registry != "timm" or any(entry.groups != 32 for entry in norms) or any(e.changes for e in plan.convs):
        return None
    arguments = {**source.arguments, "norm_layer": "groupnorm"}
    try:
        theirs = meta_build(Source("timm", source.name, arguments))
    except Exception:  # the families that take no such argument fail in as many ways as there are families
        return None
    return arguments if _outline(theirs) == _outline(model) else None


def _outline(model: nn.Module) -> dict[str, Any]:
    """Return what decides a network's function besides its values, by module name."""
    return {name: _layer(module) for name, module in model.named_modules()}


def _layer(module: nn.Module) -> tuple[Any, ...]:
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    if isinstance(module, nn.GroupNorm):
        kind = PositionNorm if isinstance(module, PositionNorm) else nn.GroupNorm
        return kind.__name__, takes_steps(module), module.num_groups, module.eps, shapes
    return type(module), module.extra_repr(), shapes


def _head(source: Source, model: nn.Module) -> dict[str, Any]:
    """Return the layers of a network whose size follows the number of classes, found by building two sizes."""
    try:
        two, three = (meta_build(source, num_classes=n).state_dict() for n in (2, 3))
    except TypeError:
        return {}
    grown = [name for name, tensor in two.items() if tensor.shape != three[name].shape]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in grown))
    state = model.state_dict()
    sizes = [state[name].shape[0] for name in grown if two[name].shape[:1] == torch.Size([2])]
    return {"classifier": layers, **({"num_classes": sizes[0]} if sizes else {})}


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == _listed(value))
    except (TypeError, ValueError):
        return False


def _listed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_listed(item) for item in value]
    return {key: _listed(item) for key, item in value.items()} if isinstance(value, dict) else value
