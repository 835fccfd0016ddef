"""transformers' way in: a step of ``from_pretrained`` that converts the network before its weights are loaded.

The step is a quantizer in transformers' words. Imported only where transformers is.
"""

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from normswap.conversion.carried_plan import carry_plan, plan_of
from normswap.conversion.pipeline import apply
from normswap.conversion.present_plan import present_plan
from normswap.networks.network import Network
from normswap.planning.entry import renamed
from normswap.planning.plan import Plan
from normswap.sources.transformers_config import METHOD

MARKER = "running_mean"
"""A tensor of the first norm that a file holds without values: where BatchNorm is built it does not fit."""


@dataclass
class NormswapConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` says of a converted network.

    Attributes:
        quant_method: Names the step.
        plan: What `Plan.to_dict` wrote.
    """

    quant_method: str = METHOD
    plan: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Tell what it is, and not the whole plan."""
        return f"NormswapConfig(plan of {len(self.plan.get('entries', ()))} layers)"


class NormswapQuantizer(HfQuantizer):  # type: ignore[misc]
    """Converts a network on the meta device, and writes what ``from_pretrained`` rebuilds.

    A file that it writes holds an empty running mean of the first norm. Without this step ``from_pretrained`` builds
    BatchNorm, finds that it does not fit, and raises.
    """

    is_trainable = True
    is_qat_trainable = True

    def is_serializable(self) -> bool:
        """Allow ``save_pretrained``."""
        return True

    def preprocess_model(self, model: nn.Module, dtype: Any = None, **_: Any) -> None:
        """Convert the network that has just been built."""
        plan = _fitted(Plan.from_dict(self.quantization_config.plan), model)
        apply(model, plan, inplace=True)
        expected: Any = model._keys_to_ignore_on_load_unexpected or ()
        vars(model)["_keys_to_ignore_on_load_unexpected"] = {*expected, rf"\.{MARKER}$"}

    def postprocess_model(self, model: nn.Module, **_: Any) -> nn.Module:
        """Have the network carry its plan."""
        carry_plan(model, plan_of(model))
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors to save, and bring the plan in the configuration up to date.

        Raises:
            CheckpointError: A layer is gone, or has become one that no plan describes.
        """
        plan = Plan.from_dict(self.quantization_config.plan)
        plan = present_plan(Network(model), plan)
        self.quantization_config.plan = plan.to_dict()
        model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        marked = next((f"{entry.name}.{MARKER}".lstrip(".") for entry in plan.norms if entry.converts), None)
        return {**model.state_dict(), **({marked: torch.empty(0)} if marked else {})}, {}


def add(auto: ModuleType) -> None:
    """Register the step with ``transformers.quantizers.auto``."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(NormswapConfig)
        auto.register_quantizer(METHOD)(NormswapQuantizer)


def _fitted(plan: Plan, model: nn.Module) -> Plan:
    """Return a plan by the names that the network has: transformers loads a body from a whole network, and back."""
    names, body = Network(model).slots, f"{model.base_model_prefix}."
    if all(entry.name in names for entry in plan.changes):
        return plan
    if any(entry.name.startswith(body) for entry in plan.changes):
        entries = [renamed(e, lambda name: name.removeprefix(body)) for e in plan.entries if e.name.startswith(body)]
    else:
        entries = [renamed(entry, lambda name: body + name) for entry in plan.entries]
    return replace(plan, entries=tuple(entries), scales={})
