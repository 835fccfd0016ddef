"""What a network says of where it came from, and what a converted one must say instead."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from normswap.sources.registry import ENTRYPOINT, Source, plain_argument, with_rows


def source_of(model: nn.Module) -> Source | None:
    """Return what timm remembers of a model it built; other models do not know their names."""
    config, remembered = getattr(model, "pretrained_cfg", None), getattr(model, "_model_args", {})
    if not isinstance(config, Mapping) or not config.get("architecture"):
        return None
    if config["architecture"] == ENTRYPOINT:
        source = Source.from_dict(remembered.get("source"))
        changed = {key: getattr(model, key) for key in ("num_classes",) if isinstance(getattr(model, key, None), int)}
        return replace(source, arguments=source.arguments | _plain(remembered) | changed)
    registered = config.get("source") not in ("hf-hub", "local-dir")  # a checkpoint's own tag is in no registry
    name = config["architecture"] + (f".{config['tag']}" if config.get("tag") and registered else "")
    arguments = _plain(remembered)
    num_classes = getattr(model, "num_classes", None)
    if isinstance(num_classes, int):
        arguments.setdefault("num_classes", num_classes)
    return Source("timm", name, arguments)


def remember(model: nn.Module, plan: Mapping[str, Any]) -> None:
    """Correct what a network that timm built says about itself, so that timm's ``save_for_hf`` describes it rightly.

    Networks that timm did not build are left alone.

    Args:
        model: A converted network.
        plan: Its plan as JSON data.
    """
    source, config = source_of(model), getattr(model, "pretrained_cfg", None)
    if source is None or not isinstance(config, Mapping):
        return
    config = {**config, "architecture": ENTRYPOINT}
    arguments = {"source": source.to_dict(), "plan": plan}
    vars(model).update(pretrained_cfg=config, default_cfg=config, _model_args=arguments)


def recall(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Give a network of timm the preprocessing that its checkpoint states, rather than its architecture's usual one."""
    usual, stated = getattr(model, "pretrained_cfg", None), config.get("pretrained_cfg")
    if isinstance(usual, Mapping) and isinstance(stated, Mapping):
        known = {**usual, **stated}
        vars(model).update(pretrained_cfg=known, default_cfg=known)


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are data, as ``out_indices=(1, 3)`` is; classes and functions are left out."""
    rows = with_rows(arguments).items()
    return {key: value for key, value in rows if isinstance(value, (str, int, float)) or _is_row(value)}


def _is_row(value: Any) -> bool:
    return isinstance(value, tuple) and plain_argument(value)
