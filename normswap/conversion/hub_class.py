"""Networks of classes that the hub's client builds anew: what they write must make them come back converted."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from torch import nn

from normswap.errors import CheckpointError
from normswap.networks.unfoldable import OnModule


def describe_hub_class(model: nn.Module) -> None:
    """Have ``save_pretrained`` of a class of the hub raise where ``from_pretrained`` would bring BatchNorm back.

    Args:
        model: A converted network.
    """
    kind: Any = getattr(sys.modules.get("huggingface_hub.hub_mixin"), "PyTorchModelHubMixin", None)
    for module in () if kind is None else model.modules():
        loads: Any = getattr(type(module), "_from_pretrained", None)
        if isinstance(module, kind) and loads.__func__ is kind._from_pretrained.__func__:
            vars(module)["save_pretrained"] = SavedWithPlan(module)


class SavedWithPlan(OnModule):
    """Save a converted network of a class of the hub where what is written holds a plan.

    The hub's own ``from_pretrained`` builds the class from the arguments that were written, and loads what fits.
    """

    def __call__(self, save_directory: Any, *, config: Any = None, **options: Any) -> Any:
        """Save as the class does.

        Raises:
            CheckpointError: No argument holds a plan.
        """
        module: Any = self.module
        known = module._hub_mixin_config if config is None else config
        known = asdict(known) if is_dataclass(known) and not isinstance(known, type) else known
        values = known.values() if isinstance(known, Mapping) else ()
        if not any(isinstance(value, Mapping) and {"schema", "entries"} <= value.keys() for value in values):
            raise CheckpointError(
                f"{type(module).__name__}.from_pretrained would build BatchNorm again: have the class apply a plan "
                "that is one of its arguments (docs/clients.md, Classes of the hub), or use normswap.save"
            )
        return type(module).save_pretrained(module, save_directory, config=config, **options)
