"""Build a model from its name, with or without pretrained weights; only names of known registries are built."""

import inspect as signatures
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn

from normswap.errors import CheckpointError, UnknownModel, WeightsUnavailable
from normswap.sources.hub import WAYS_ON, must_be_reachable
from normswap.texts import did_you_mean

REGISTRIES = ("timm", "torchvision")
ENTRYPOINT = "normswap"
"""What timm calls a converted network's architecture; `normswap.checkpoint.timm_entrypoint` registers it."""
WEIGHTS_FROM = re.compile(r"(pretrained|weights|checkpoint|cache).*")
"""Arguments of the builders with which a checkpoint's configuration could have other files read or fetched."""
NAME = re.compile(r"\w[\w.-]{0,199}", re.ASCII)
LARGEST = 2**20
"""Largest number among the arguments; the shapes of the stored tensors bound what is built from them."""
MOST = 64
"""Values of one argument, as stages of a network or sides of a window."""
IMPLIED = ("transform_input", "aux_logits")


@dataclass(frozen=True)
class Source:
    """Where a network came from, and what rebuilds its architecture: a registry, a name and plain arguments."""

    registry: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse anything but a name in a known registry: checkpoints carry sources, and must not name code."""
        if self.registry not in REGISTRIES or not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            where = f"source {self.registry!r:.60}/{self.name!r:.60}"
            raise CheckpointError(f"{where} is not a model of {' or '.join(REGISTRIES)}; convert the model again")
        for key, value in self.arguments.items():
            if not _is_argument(key, value):
                argument = f"{key!s:.60}={value!r:.60}"
                raise CheckpointError(
                    f"source {self.name}: {argument!a}: arguments must be plain values up to {LARGEST}"
                )

    def build(self, *, pretrained: bool = False, **arguments: Any) -> nn.Module:
        """Build the network; without pretrained weights it is initialized anew.

        Raises:
            UnknownModel: The registry does not hold it.
            WeightsUnavailable: The pretrained weights do not exist or cannot be reached.
            CheckpointError: The arguments name files to read.
        """
        arguments = {**self.arguments, **arguments}
        if elsewhere := [key for key in arguments if WEIGHTS_FROM.fullmatch(key)]:
            raise CheckpointError(f"source {self.name}: {min(elsewhere)} names weights; an architecture has none")
        if self.registry == "timm":
            return _build_timm(self.name, pretrained, arguments)
        return _build_torchvision(self.name, pretrained, arguments)

    def accepted(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of timm's arguments that the registry's builders know: of torchvision's, the head's size."""
        return {k: v for k, v in arguments.items() if self.registry == "timm" or k == "num_classes"}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the source that `to_dict` wrote.

        Raises:
            CheckpointError: The data is no source.
        """
        fields = {"registry": str, "name": str, "arguments": dict}
        if not isinstance(data, Mapping) or {key: type(value) for key, value in data.items()} != fields:
            raise CheckpointError("the checkpoint's source is damaged; convert the model again")
        return cls(data["registry"], data["name"], with_rows(data["arguments"]))


def find(name: str) -> Source:
    """Return the source of a name: ``resnet50``, ``timm/resnet50.a1_in1k``, ``torchvision/vgg16_bn``.

    A bare name is looked up in timm first, then in torchvision.

    Raises:
        UnknownModel: With the nearest names.
    """
    registry, _, rest = name.partition("/")
    wanted = (registry,) if registry in REGISTRIES and rest else REGISTRIES
    bare = rest if registry in REGISTRIES and rest else name
    for candidate in wanted:
        if bare.split(".")[0] in names(candidate):
            return Source(candidate, bare)
    known = [n for candidate in wanted for n in names(candidate)]
    hint = did_you_mean(bare, known, otherwise="see `normswap list`")
    raise UnknownModel(f"no model named {bare!r} in {' or '.join(wanted)}; {hint}")


def names(registry: str) -> list[str]:
    """Return the architectures of a registry."""
    if registry == "timm":
        import timm

        return [name for name in timm.list_models() if name != ENTRYPOINT]
    import torchvision

    return [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]


def as_built(source: Source, model: nn.Module) -> Source:
    """Return the source with the arguments that pretrained weights imply: torchvision's change inputs and heads."""
    if source.registry != "torchvision":
        return source
    implied = {key: value for key in IMPLIED if isinstance(value := getattr(model, key, None), bool)}
    if hasattr(model, "aux_classifier"):
        implied["aux_loss"] = model.aux_classifier is not None
    plain = meta_build(source)
    implied = {k: v for k, v in implied.items() if k == "aux_loss" or getattr(plain, k, v) != v}
    return replace(source, arguments=source.arguments | implied)


def with_rows(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with tuples in the place of lists, which are all that JSON has."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def plain_argument(value: Any) -> bool:
    """Tell whether a builder's argument is data that a file may hold: one value, or a few in a row."""
    if isinstance(value, (int, float)):
        return abs(value) <= LARGEST
    if isinstance(value, tuple):
        return len(value) <= MOST and all(not isinstance(item, tuple) and plain_argument(item) for item in value)
    return value is None or (isinstance(value, str) and len(value) <= 200 and value.isprintable())


def _is_argument(key: Any, value: Any) -> bool:
    return isinstance(key, str) and key.isidentifier() and plain_argument(value)


def meta_build(source: Source, **arguments: Any) -> nn.Module:
    """Build a network without data where that works; some compute with their weights while they are built."""
    try:
        with torch.device("meta"):
            return source.build(**arguments)
    except (NotImplementedError, RuntimeError):
        return source.build(**arguments)


def _build_timm(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise UnknownModel(f"timm has no model named {name!r}; it may need a newer timm")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        known = timm.list_pretrained(f"{architecture}.*")
        hint = did_you_mean(name, known, otherwise=f"pass {architecture}", cutoff=0.0)
        raise UnknownModel(f"timm knows no weights {tag!r} of {architecture}; {hint}") from error
    if pretrained:
        if config is None or not config.has_weights:
            raise WeightsUnavailable(f"timm has no pretrained weights for {name}; {WAYS_ON}")
        must_be_reachable(name, config.url or "", config.hf_hub_id)
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    return model


def _build_torchvision(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    from torchvision import models

    try:
        builder = models.get_model_builder(name)
    except ValueError as error:
        raise UnknownModel(f"torchvision has no model named {name!r}; it may need a newer torchvision") from error
    accepted = signatures.signature(builder).parameters
    if "weights_backbone" in accepted:
        arguments = {"weights_backbone": None, **arguments}
    if not pretrained:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # some announce another initialization
            model: nn.Module = models.get_model(name, weights=None, **arguments)
        return model
    choices = models.get_model_weights(name)
    if not len(choices):
        raise WeightsUnavailable(f"torchvision has no pretrained weights for {name}; {WAYS_ON}")
    must_be_reachable(name, choices.DEFAULT.url, None)
    trained: nn.Module = models.get_model(name, weights="DEFAULT", **arguments)
    return trained
