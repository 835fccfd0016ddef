"""Turn BatchNorm networks into GroupNorm + Weight Standardization networks that keep what they learned."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normswap.entrypoint import register
from normswap.version import __version__

if TYPE_CHECKING:
    from normswap.accumulation import accumulate
    from normswap.calibration import calibrate
    from normswap.checking import check
    from normswap.checkpoint import load, save
    from normswap.checks import Checks
    from normswap.conversion import convert, inspect
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
    from normswap.families import NormParts, register_conv, register_norm
    from normswap.folding import fold
    from normswap.hub import push
    from normswap.options import Options
    from normswap.plan import Action, Entry, Plan
    from normswap.sources import Source
    from normswap.surgery import apply, plan_of

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
    "accumulation": "accumulate",
    "calibration": "calibrate",
    "checking": "check",
    "checkpoint": "load save",
    "checks": "Checks",
    "conversion": "convert inspect",
    "exporting": "export",
    "families": "NormParts register_conv register_norm",
    "folding": "fold",
    "hub": "push",
    "options": "Options",
    "plan": "Action Entry Plan",
    "sources": "Source",
    "surgery": "apply plan_of",
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
