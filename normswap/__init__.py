"""Turn BatchNorm networks into GroupNorm + Weight Standardization networks that keep what they learned."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normswap.checkpoint.timm_entrypoint import register
from normswap.version import __version__

if TYPE_CHECKING:
    from normswap.calibration.calibration import calibrate
    from normswap.checkpoint.hub_upload import push
    from normswap.checkpoint.loading import load, save
    from normswap.conversion.checks import Checks
    from normswap.conversion.folding import fold
    from normswap.conversion.pipeline import convert, inspect
    from normswap.conversion.structure import check
    from normswap.conversion.surgery import apply, plan_of
    from normswap.errors import (
        AlreadyConverted,
        BadStatistics,
        CalibrationFailed,
        CheckFailed,
        CheckpointAdapted,
        CheckpointError,
        ExportFailed,
        HubError,
        InvalidOption,
        NeedsExampleInput,
        NormswapError,
        NothingToConvert,
        PlanMismatch,
        UnknownModel,
        UnsupportedModel,
        WeightsChanged,
        WeightsUnavailable,
    )
    from normswap.exporting import export
    from normswap.layers.accumulation import accumulate
    from normswap.networks.recognition import NormParts, register_conv, register_norm
    from normswap.planning.options import Options
    from normswap.planning.plan import Action, Entry, Plan
    from normswap.sources.registry import Source

__all__ = [
    "Action",
    "AlreadyConverted",
    "BadStatistics",
    "CalibrationFailed",
    "CheckFailed",
    "CheckpointAdapted",
    "CheckpointError",
    "Checks",
    "Entry",
    "ExportFailed",
    "HubError",
    "InvalidOption",
    "NeedsExampleInput",
    "NormParts",
    "NormswapError",
    "NothingToConvert",
    "Options",
    "Plan",
    "PlanMismatch",
    "Source",
    "UnknownModel",
    "UnsupportedModel",
    "WeightsChanged",
    "WeightsUnavailable",
    "__version__",
    "accumulate",
    "apply",
    "calibrate",
    "check",
    "convert",
    "export",
    "fold",
    "inspect",
    "load",
    "plan_of",
    "push",
    "register_conv",
    "register_norm",
    "save",
]

_HOMES = {
    "calibration.calibration": "calibrate",
    "checkpoint.hub_upload": "push",
    "checkpoint.loading": "load save",
    "conversion.checks": "Checks",
    "conversion.folding": "fold",
    "conversion.pipeline": "convert inspect",
    "conversion.structure": "check",
    "conversion.surgery": "apply plan_of",
    "exporting": "export",
    "layers.accumulation": "accumulate",
    "networks.recognition": "NormParts register_conv register_norm",
    "planning.options": "Options",
    "planning.plan": "Action Entry Plan",
    "sources.registry": "Source",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line's help needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'normswap' has no attribute {name!r}")
    value = getattr(import_module(f"normswap.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register()
