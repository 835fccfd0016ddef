"""Open what a user names: a model of a registry, a timm checkpoint on the hub or in a folder, or a function."""

import importlib
import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import UnknownModel, UnsupportedModel, WeightsUnavailable, described, first_line
from normswap.sources.hub import HUB, WAYS_ON, must_be_reachable
from normswap.sources.provenance import source_of
from normswap.sources.registry import Source, as_built, find
from normswap.sources.state_dicts import fill, made_whole, read_state_dict

FOLDER = "local-dir:"
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def open_model(name: str, *, pretrained: bool, num_classes: int | None = None) -> tuple[nn.Module, Source | None]:
    """Build the network that `name` stands for, and tell what rebuilds its architecture.

    >>> model, source = open_model("torchvision/resnet18", pretrained=False)

    Args:
        name: ``resnet50.a1_in1k``, ``timm/NAME``, ``torchvision/NAME``, ``hf-hub:user/name``, ``local-dir:FOLDER``, or
            ``package.module:factory``, a function of your own that returns the network.
        pretrained: Load the weights that belong to the name; a factory loads its own.
        num_classes: Outputs of the head, where not the usual ones.

    Raises:
        UnknownModel: Nothing goes by that name.
        WeightsUnavailable: The pretrained weights cannot be reached.
        UnsupportedModel: The factory failed, or returned something else than a network.
    """
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    if name.startswith((HUB, FOLDER)):
        model = _timm_checkpoint(name, pretrained, arguments)
        return model, source_of(model)
    if FACTORY.fullmatch(name):
        return _from_factory(name, arguments), None
    source = find(name)
    source = replace(source, arguments={**source.arguments, **arguments})
    model = source.build(pretrained=pretrained)
    return model, as_built(source, model)


def open_with_weights(name: str, path: Path, *, num_classes: int | None = None) -> tuple[nn.Module, Source | None]:
    """Build the network that `name` stands for, with the weights that a file holds.

    They stay there, but for those of old files of torch.save: the system reads them when they are asked for, and keeps
    in memory what is written to. A registry's network is built without data first; where it holds tensors that no state
    dict does, and where a function of the user's builds it, with data.

    Args:
        name: As for `open_model`.
        path: A safetensors file, or one that torch.save wrote.
        num_classes: As for `open_model`.

    Raises:
        CheckpointError: The file cannot be read, or is another network's.
    """
    build, state = partial(open_model, name, pretrained=False, num_classes=num_classes), dict[str, Tensor]()
    if not FACTORY.fullmatch(name):
        with suppress(NotImplementedError, RuntimeError, WeightsUnavailable):  # some compute while they are built
            with torch.device("meta"):
                model, source = build()
            state = read_state_dict(path, model.state_dict(), mapped=True)
            if made_whole(model, state, name=str(path)):
                return model, source
    model, source = build()
    fill(model, state or read_state_dict(path, model.state_dict(), mapped=True), name=str(path), take=True)
    return model, source


def _timm_checkpoint(name: str, pretrained: bool, arguments: dict[str, int]) -> nn.Module:
    import timm

    if name.startswith(HUB):
        must_be_reachable(name, "", name.removeprefix(HUB).partition("@")[0])
    elif not (Path(name.removeprefix(FOLDER)) / "config.json").exists():
        raise UnknownModel(f"{name.removeprefix(FOLDER)}: holds no config.json; pass a folder in timm's format")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except (RuntimeError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise WeightsUnavailable(f"timm cannot load {name} ({first_line(error)}); {WAYS_ON}") from error
    return model


def _from_factory(name: str, arguments: dict[str, int]) -> nn.Module:
    model = result_of(name, **arguments)
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"{name} returned a {type(model).__name__}; return the network itself")
    return model


def result_of(name: str, **arguments: int) -> Any:
    """Import and call a function that the user names on the command line; files never get here.

    Raises:
        UnknownModel: There is no such function.
        UnsupportedModel: It failed, or its module did.
    """
    module_name, _, attributes = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = importlib.import_module(module_name)
        for attribute in attributes.split("."):
            factory = getattr(factory, attribute)
    except (ImportError, AttributeError) as error:
        raise UnknownModel(f"{name}: {first_line(error)}; name a function as in package.module:factory") from error
    except (Exception, SystemExit) as error:
        raise UnsupportedModel(
            f"{name}: {module_name} cannot be imported ({described(error)}); mend it first"
        ) from error
    try:
        return factory(**arguments)  # type: ignore[operator]
    except (Exception, SystemExit) as error:
        given = f"with {', '.join(arguments)} alone" if arguments else "without arguments"
        raise UnsupportedModel(f"{name} failed ({described(error)}); it is called {given}") from error
