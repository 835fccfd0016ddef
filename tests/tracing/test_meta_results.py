"""Operators whose result depends on data."""

import torch
from nets import Net, conv
from torch import Tensor, nn

import normswap


class Counting(Net):
    """Asks for values, indexes by a mask, and loops over what it found."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.a(x))
        if y.max().item() > 0 and torch.equal(x, x):
            y = y + 1
        rows = y.flatten(1)[y.flatten(1).sum(1) != 0]
        found = torch.nonzero(rows > 0)
        return self.bn2(self.b(y))[:, :, : max(int(found.shape[0] > 0), 1)]


def test_data_dependent_operators_are_answered() -> None:
    model = Counting(a=conv(), b=conv(8), bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(8))
    plan = normswap.inspect(model)
    assert [entry.fed_by for entry in plan.norms] == [("a",), ("b",)]
