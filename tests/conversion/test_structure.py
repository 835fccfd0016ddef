"""What a trace shows of a converted network where the original is not at hand, and what was left on purpose."""

import re

import broken
import pytest
from torch.nn.utils import prune

import normswap


def test_a_planned_norm_that_met_another_shape_is_found_without_the_original() -> None:
    converted = normswap.convert(broken.Net(), example_input=broken.X)
    converted.conv2.stride = (2, 2)  # type: ignore[union-attr, assignment]
    row = normswap.check(converted).rows[0]
    assert (row.name, row.ok) == ("shapes", False)
    assert row.detail == "bn2: ((2, 8, 12, 12),) became ((2, 8, 6, 6),)"


def test_norms_left_as_asked_are_counted_and_not_reported() -> None:
    converted = normswap.convert(broken.Net(), exclude="bn2", example_input=broken.X)
    row = normswap.check(converted).rows[1]
    assert (row.name, row.ok, row.detail) == ("no BatchNorm left", True, "1 of 2 replaced, 1 kept frozen")
    converted = normswap.convert(broken.Net(), exclude="bn2", keep="live", example_input=broken.X)
    row = normswap.check(converted).rows[1]
    assert (row.ok, row.detail) == (True, "1 of 2 replaced, 1 left as asked: live in train mode")


def test_a_norm_left_for_another_reason_is_reported_with_it() -> None:
    model = broken.Net()
    prune.random_unstructured(model.bn2, "weight", amount=0.5)
    (entry,) = (entry for entry in normswap.inspect(model, example_input=broken.X).norms if not entry.changes)
    assert (entry.name, "weight" in entry.reason) == ("bn2", True)
    message = (
        f"no BatchNorm left: 1 left: bn2; bn2: {entry.reason}; or teach it with normswap.register_norm, or leave it "
        "alone with exclude=; convert with check=False to look at the result"
    )
    with pytest.raises(normswap.CheckFailed, match=f"^{re.escape(message)}$"):
        normswap.convert(model, example_input=broken.X)
