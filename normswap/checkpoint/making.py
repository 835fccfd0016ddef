"""Make a checkpoint of a network in one go: convert, calibrate, check, save."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

from rich.console import Group
from torch import nn

from normswap.calibration.calibration import Calibration, calibration
from normswap.calibration.images import image_batches, must_be_folder
from normswap.checkpoint.saving import save
from normswap.conversion.carried_plan import plan_of
from normswap.conversion.check import check
from normswap.conversion.checks import Checks
from normswap.conversion.pipeline import convert, convert_beside
from normswap.errors import NeedsExampleInput
from normswap.networks.processes import rank
from normswap.planning.options import Wishes
from normswap.planning.plan import Plan
from normswap.planning.report import made_up_inputs, summary
from normswap.sources.registry import Source
from normswap.tables import stacked


@dataclass(frozen=True)
class Made:
    """What became of a network.

    Attributes:
        plan: What was converted.
        calibration: What calibration on images did, where there were some.
        checks: What was checked.
        directory: Where the checkpoint is; None where a check does not hold, and nothing was written.
    """

    plan: Plan
    calibration: Calibration | None
    checks: Checks
    directory: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "output": None if self.directory is None else str(self.directory),
            "plan": self.plan.to_dict(),
            **({} if self.calibration is None else {"calibration": self.calibration.to_dict()}),
            "checks": self.checks.to_dict(),
        }

    def __str__(self) -> str:
        """Return what was done and found, for people."""
        return "\n".join(map(str, self._parts()))

    def __rich__(self) -> Group:
        """Return the same as `rich` fits it to a terminal."""
        return stacked(*(part.__rich__() if isinstance(part, Checks) else part for part in self._parts()))

    def _parts(self) -> list[str | Checks]:
        calibrated = [] if self.calibration is None else [str(self.calibration)]
        wrote = "wrote nothing" if self.directory is None else f"wrote {self.directory}"
        totals = summary(self.plan.entries, self.plan.warnings)
        totals += made_up_inputs(self.plan.inputs, self.plan.made_up)
        return [*totals, *calibrated, "", self.checks, "", wrote]


def make(
    network: nn.Module,
    directory: Path,
    *,
    source: Source | None,
    images: Path | None = None,
    steps: int = 0,
    workers: int = 0,
    made_up: bool = False,
    weights: Literal["pretrained", "random", "file"] | None = None,
    replace: bool = True,
    example_input: Any = None,
    note: Callable[[str], None] = lambda _: None,
    **options: Unpack[Wishes],
) -> Made:
    """Convert a network, bring it closer to the original on images, check it, and save it if all checks hold.

    Args:
        network: The unconverted network; it is only read. Work is done on its device.
        directory: Folder to write to; of several processes the first one writes.
        source: What rebuilds the unconverted architecture.
        images: Folder of images to calibrate on.
        steps: Steps of distillation on them.
        workers: Processes that read them.
        made_up: Equalize on made-up images where there are no others, and distill on some beside few others; networks
            that take no images go without.
        weights: As for `normswap.save`.
        replace: Whether files of an earlier checkpoint may be replaced.
        example_input: As for `normswap.convert`.
        note: Called with a line of text as each part begins.
        **options: As for `normswap.convert`.
    """
    if images is not None:
        must_be_folder(images)
    few: Any = "synthetic" if made_up and images is None else None
    if few is not None:
        note("making up images, to see which scales and signs of filters keep the function (--no-synthetic skips it) …")
    started = convert_beside if images is None else convert  # only looked at, or trained
    try:
        converted = started(network, example_input=example_input, batches=few, **options)
    except NeedsExampleInput:
        if few != "synthetic":
            raise
        converted = started(network, example_input=example_input, **options)
    result = None
    if images is not None:
        note("calibrating …")
        read = partial(image_batches, images, network, plan_of(converted).input_size, workers=workers)
        (seen, judged), (learned, _) = read(augment=False), read(augment=True)
        result = calibration(converted, network, learned, steps=steps, held_back=judged, seen=seen, made_up=made_up)
    plan = plan_of(converted)
    note("checking …")
    checks = check(converted, network, example_input=example_input)
    if not checks:
        return Made(plan, result, checks, None)
    note("writing …")
    if rank() == 0:
        save(converted.cpu(), directory, source=source, checks=checks, weights=weights, replace=replace)
    return Made(plan, result, checks, directory)
