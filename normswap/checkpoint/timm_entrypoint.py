"""timm's way in: one registered entrypoint that rebuilds a converted network from what its config.json says.

Nothing heavy is imported here. timm is told of the entrypoint at once where it is loaded, and otherwise when it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from normswap.checkpoint.imports import when_imported

if TYPE_CHECKING:
    from torch import nn

    from normswap.planning.plan import Plan

REGISTRY = "timm.models"
HEAD = ("num_classes", "classifier", "global_pool")
FEATURES = ("features_only", "out_indices", "feature_cls", "feature_cfg", "output_fmt")


def normswap(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    *,
    source: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    pretrained_model_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a converted network for ``timm.create_model("local-dir:OUT")``; not to be called by hand.

    Args:
        pretrained: Load the weights beside the configuration.
        pretrained_cfg: timm's, from the configuration.
        pretrained_cfg_overlay: timm's.
        cache_dir: timm's.
        source: What rebuilds the unconverted architecture; see `normswap.Source`.
        plan: What `Plan.to_dict` wrote.
        pretrained_model_args: `source` and `plan` again, which timm passes for its own builders.
        **kwargs: For the unconverted architecture: ``num_classes``, ``features_only``, ``drop_rate``, …

    Raises:
        CheckpointError: Source or plan is missing, or the files of a folder were not saved together.
    """
    from timm.models import load_pretrained, resolve_pretrained_cfg

    from normswap.conversion.pipeline import apply
    from normswap.errors import CheckpointError
    from normswap.planning.plan import Plan
    from normswap.sources.registry import Source

    if source is None or plan is None:
        raise CheckpointError("timm's model 'normswap' needs a converted checkpoint; pass local-dir:OUT or hf-hub:NAME")
    origin, converted_plan = Source.from_dict(source), Plan.from_dict(plan)
    weights = {"pretrained": pretrained, "pretrained_cfg": pretrained_cfg, "cache_dir": cache_dir}
    weights["pretrained_cfg_overlay"] = pretrained_cfg_overlay
    if kwargs.get("features_only"):
        plain = {key: value for key, value in kwargs.items() if key not in FEATURES}
        whole = normswap(**weights, source=source, plan=plan, **plain)
        return _features(origin.build(**kwargs), whole, converted_plan)
    model = apply(origin.build(**origin.accepted(kwargs)), converted_plan, inplace=True)
    known = pretrained_cfg or getattr(model, "pretrained_cfg", {"architecture": normswap.__name__})
    cfg = resolve_pretrained_cfg(normswap.__name__, known, pretrained_cfg_overlay).to_dict()
    in_chans = kwargs.get("in_chans", cfg["input_size"][0])
    if pretrained:
        _must_be_whole(cfg)
        num_classes = getattr(model, "num_classes", kwargs.get("num_classes", cfg["num_classes"]))
        load_pretrained(model, cfg, num_classes=num_classes, in_chans=in_chans, cache_dir=cache_dir)
        if in_chans != cfg["input_size"][0]:
            _settle(model, cfg.get("first_conv"))
    vars(model).update(pretrained_cfg=cfg, default_cfg=cfg)
    return model


def register() -> None:
    """Make the entrypoint known to timm, now or when timm is imported."""
    when_imported(REGISTRY, _add)


def _add(timm_models: ModuleType) -> None:
    if not timm_models.is_model(normswap.__name__):
        timm_models.register_model(normswap)


def _features(wrapper: nn.Module, whole: nn.Module, plan: Plan) -> nn.Module:
    """Convert timm's feature extractor of a network and give it the tensors of the converted network.

    timm renames modules in extractors: dots become underscores, or everything moves below one attribute.
    """
    from dataclasses import replace

    from normswap.conversion.pipeline import apply
    from normswap.networks.network import Network
    from normswap.planning.entry import NormEntry

    entries = {_flat(name): entry for entry in plan.entries for name in (entry.name, *entry.aliases)}
    network, found = Network(wrapper), []
    for name, *aliases in network.names.values():
        entry = entries.get(_flat(name)) or entries.get(_flat(_below(name)))
        if entry is None:
            continue
        if isinstance(entry, NormEntry):  # some extractors keep a norm and its activation apart
            then = tuple(key for key in entry.then if key in network.slots[name]._modules)
            entry = replace(entry, then=then, scaled_by=())
        found.append(replace(entry, name=name, aliases=tuple(aliases)))
    features = apply(wrapper, replace(plan, entries=tuple(found), scales={}), inplace=True)
    tensors = {_flat(name): tensor for name, tensor in whole.state_dict().items()}
    state = {name: tensors.get(_flat(name), tensors.get(_flat(_below(name)))) for name in features.state_dict()}
    features.load_state_dict({name: tensor for name, tensor in state.items() if tensor is not None})
    cfg = {key: value for key, value in vars(whole)["pretrained_cfg"].items() if key not in HEAD}
    vars(features).update(pretrained_cfg=cfg, default_cfg=cfg)
    return features


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _below(name: str) -> str:
    return name.partition(".")[2]


def _must_be_whole(cfg: Mapping[str, Any]) -> None:
    """Finish or refuse what an interrupted save left in a folder, before timm reads the tensors."""
    from pathlib import Path

    from normswap.checkpoint.atomic import left_over
    from normswap.checkpoint.folder import WEIGHTS, read_config, whole
    from normswap.errors import CheckpointError

    if cfg.get("source") != "local-dir":
        return
    folder = Path(cfg["file"])
    if not (folder / WEIGHTS).exists() and not left_over(folder / WEIGHTS):
        return  # tensors in a file of another kind, which timm finds
    try:
        read_config(folder)
    except CheckpointError:  # timm's own exporter writes configurations without a digest
        return
    with whole(folder, dict):
        pass


def _settle(model: nn.Module, first_convs: str | Sequence[str] | None) -> None:
    """Take gain and offset anew where timm has summed a kernel over other input channels."""
    from normswap.checkpoint.tensors import settled
    from normswap.layers.convs import WeightStandardized

    for name in (first_convs,) if isinstance(first_convs, str) else first_convs or ():
        conv = model.get_submodule(name)
        if isinstance(conv, WeightStandardized) and conv.ws_gain is not None:
            conv.load_state_dict(settled(conv, conv.raw_weight.detach()), strict=False)
