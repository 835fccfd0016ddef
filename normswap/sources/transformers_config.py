"""What networks of transformers say of themselves in ``config.json`` once they are converted."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

METHOD = "normswap"
"""Name of the step of ``from_pretrained`` that converts, as ``config.json`` gives it."""

Relative = Callable[[str], Mapping[str, Any] | None]


def describe_pretrained(model: nn.Module, relative: Relative) -> None:
    """Have ``save_pretrained`` write what ``from_pretrained`` needs to convert the network that it builds.

    Networks of other packages are left alone, and so are those that are quantized otherwise.

    Args:
        model: A converted network, or one that holds networks of transformers.
        relative: From a module's name to the plan of what is below it, as JSON data; None where that has none.
    """
    modeling, auto = (sys.modules.get(f"transformers.{name}") for name in ("modeling_utils", "quantizers.auto"))
    kind = getattr(modeling, "PreTrainedModel", None)
    if kind is None or auto is None or METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        return
    for name, module in _outermost(model, kind):
        known = getattr(module.config, "quantization_config", None)
        plan = relative(name)
        if plan is None or getattr(known, "quant_method", METHOD if known is None else None) != METHOD:
            continue
        config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](plan=dict(plan))
        module.config.quantization_config = config
        vars(module)["hf_quantizer"] = auto.AUTO_QUANTIZER_MAPPING[METHOD](config, pre_quantized=True)
        if not any(hook is _forget for hook in map(_function, module._load_state_dict_pre_hooks.values())):
            module.register_load_state_dict_pre_hook(_forget)


def _outermost(model: nn.Module, kind: type, name: str = "") -> Any:
    """Yield the networks of a kind that are in no other of that kind, with their names."""
    if isinstance(model, kind):
        yield name, model
        return
    for key, child in model.named_children():
        yield from _outermost(child, kind, f"{name}.{key}".lstrip("."))


def _function(hook: Any) -> Any:
    return getattr(hook, "hook", hook)


def _forget(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Take the empty tensor that marks a file off a state dict that is loaded from it."""
    own = {f"{prefix}{name}" for name, _ in module.named_buffers()}
    for name in [name for name, value in state.items() if name.endswith(".running_mean") and not value.numel()]:
        if name.startswith(prefix) and name not in own:
            del state[name]
