"""Sizes that follow from values may differ once a network is converted, and no others."""

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.conversion.sizes import agree

X = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))


class Spoken(nn.Module):
    """Repeats frames as often as it predicts; another output keeps its length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.bn.running_var.fill_(0.02)  # type: ignore[union-attr]
        self.head, self.bn2, self.pool = nn.Conv1d(8, 3, 1), nn.BatchNorm1d(3), nn.AvgPool1d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(self.conv(x))
        times = (10 * y[:, 0]).abs().long().clamp(1, 30)
        spread = y.new_zeros(*y.shape[:2], int(times.sum(1).max()))
        for index, (frames, time) in enumerate(zip(y, times, strict=True)):
            repeated = frames.repeat_interleave(time, 1)
            spread[index, :, : repeated.shape[1]] = repeated
        return self.bn2(self.head(spread)), self.pool(y)


def shapes_of(checks: normswap.Checks) -> tuple[bool | None, str]:
    (row,) = (row for row in checks.rows if row.name == "shapes")
    return row.ok, row.detail


@pytest.mark.parametrize("inplace", [False, True])
def test_a_length_that_follows_from_values_may_be_another(inplace: bool) -> None:
    model = Spoken().eval()
    converted = normswap.convert(Spoken().eval(), example_input=X, inplace=inplace)
    assert model(X)[0].shape != converted(X)[0].shape, "the case shows nothing"
    for original, outputs, moving in ((model, 6, 3), (None, 2, 1)):
        checks = normswap.check(converted, original, example_input=X)
        said = f"{outputs} module outputs keep their shape, but for {moving} of which sizes follow from values"
        assert shapes_of(checks) == (True, said)
        assert checks, checks


def test_sizes_that_do_not_follow_from_values_are_looked_at_beside_those_that_do() -> None:
    model = Spoken().eval()
    converted = normswap.convert(model, example_input=X)
    converted.pool = nn.AvgPool1d(3)
    assert shapes_of(normswap.check(converted, model, example_input=X)) == (
        False, "pool: ((2, 8, 6),) became ((2, 8, 4),)",
    )  # fmt: skip
    converted = normswap.convert(model, example_input=X)
    converted.conv.stride = (2,)  # type: ignore[union-attr, assignment]
    assert shapes_of(normswap.check(converted, example_input=X)) == (False, "bn: ((2, 8, 12),) became ((2, 8, 6),)")


SPEECH, LONGER = (2, 7, 16), (2, 9, 16)
AGREE = {
    "the length moves": ([SPEECH], [(2, 5, 16)], [[SPEECH], [LONGER]], True),
    "it does not": ([SPEECH], [(2, 5, 16)], [[SPEECH], [SPEECH]], False),
    "nothing shows it": ([SPEECH], [(2, 5, 16)], [[SPEECH]], False),
    "another axis": ([SPEECH], [(2, 5, 15)], [[SPEECH], [LONGER]], False),
    "another output": ([SPEECH, (2, 4, 8)], [SPEECH, (2, 5, 8)], [[SPEECH, (2, 4, 8)], [LONGER, (2, 4, 8)]], False),
    "more calls": ([SPEECH, (2, 5, 16)], [(2, 4, 16)], [[SPEECH, (2, 5, 16)], [LONGER]], True),
    "another number of axes": ([SPEECH], [(2, 7)], [[SPEECH], [LONGER]], False),
}


@pytest.mark.parametrize(("wanted", "found", "passes", "same"), AGREE.values(), ids=AGREE)
def test_only_sizes_that_differ_between_passes_may_differ(
    wanted: list[tuple[int, ...]], found: list[tuple[int, ...]], passes: list[list[tuple[int, ...]]], same: bool
) -> None:
    assert agree(tuple(wanted), tuple(found), list(map(tuple, passes))) is same
