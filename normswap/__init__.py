"""Turn BatchNorm networks into GroupNorm + Weight Standardization networks that keep what they learned."""

import random
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from normswap.checkpoint.imports import when_imported
from normswap.checkpoint.timm_entrypoint import register
from normswap.version import __version__

if TYPE_CHECKING:
    from normswap.calibration.calibration import calibrate
    from normswap.checkpoint.hub_upload import Upload, push
    from normswap.checkpoint.loading import load
    from normswap.checkpoint.saving import save
    from normswap.conversion.carried_plan import plan_of
    from normswap.conversion.check import check
    from normswap.conversion.checks import Check, Checks
    from normswap.conversion.folding import fold
    from normswap.conversion.out_of_place import out_of_place
    from normswap.conversion.pipeline import apply, convert, inspect
    from normswap.conversion.transfer import Transferred, transfer
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
        TransferFailed,
        UnknownModel,
        UnsupportedModel,
        WeightsChanged,
        WeightsUnavailable,
        WrittenInPlace,
    )
    from normswap.exporting import Exported, export
    from normswap.layers.accumulation import accumulate
    from normswap.networks.recognition import NormParts, register_conv, register_norm
    from normswap.planning.choices import Action
    from normswap.planning.entry import ConvEntry, Entry, NormEntry
    from normswap.planning.options import Options
    from normswap.planning.plan import Plan
    from normswap.sources.registry import Source

__all__ = [
    "Action",
    "AlreadyConverted",
    "BadStatistics",
    "CalibrationFailed",
    "Check",
    "CheckFailed",
    "CheckpointAdapted",
    "CheckpointError",
    "Checks",
    "ConvEntry",
    "Entry",
    "ExportFailed",
    "Exported",
    "HubError",
    "InvalidOption",
    "NeedsExampleInput",
    "NormEntry",
    "NormParts",
    "NormswapError",
    "NothingToConvert",
    "Options",
    "Plan",
    "PlanMismatch",
    "Source",
    "TransferFailed",
    "Transferred",
    "UnknownModel",
    "UnsupportedModel",
    "Upload",
    "WeightsChanged",
    "WeightsUnavailable",
    "WrittenInPlace",
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
    "out_of_place",
    "plan_of",
    "push",
    "register_conv",
    "register_norm",
    "save",
    "transfer",
]

_HOMES = {
    "calibration.calibration": "calibrate",
    "checkpoint.hub_upload": "Upload push",
    "checkpoint.loading": "load",
    "checkpoint.saving": "save",
    "conversion.carried_plan": "plan_of",
    "conversion.check": "check",
    "conversion.checks": "Check Checks",
    "conversion.folding": "fold",
    "conversion.out_of_place": "out_of_place",
    "conversion.pipeline": "apply convert inspect",
    "conversion.transfer": "Transferred transfer",
    "exporting": "Exported export",
    "layers.accumulation": "accumulate",
    "networks.recognition": "NormParts register_conv register_norm",
    "planning.choices": "Action",
    "planning.entry": "ConvEntry Entry NormEntry",
    "planning.options": "Options",
    "planning.plan": "Plan",
    "sources.registry": "Source",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


if not TYPE_CHECKING:  # to whom every name would exist

    def __getattr__(name: str) -> Any:
        """Import a public name on first use, so that the command line's help needs no torch."""
        if name not in __all__:
            raise AttributeError(f"module 'normswap' has no attribute {name!r}")
        drawn = random.getstate()  # rich draws from Python's generator as it is imported
        try:
            value = getattr(import_module(f"normswap.{_HOME.get(name, 'errors')}"), name)
        finally:
            random.setstate(drawn)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _tell_transformers(auto: ModuleType) -> None:
    from normswap.checkpoint.transformers_entry import add

    add(auto)


register()
when_imported("transformers.quantizers.auto", _tell_transformers)
