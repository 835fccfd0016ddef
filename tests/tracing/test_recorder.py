"""What a pass notes of norms and kernels that are used in unusual ways."""

from nets import Net, conv
from torch import Tensor, nn

import normswap
from normswap.networks.network import Network
from normswap.tracing.forward import trace


def test_norm_called_past_its_hooks() -> None:
    class Direct(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn.forward(self.a(x))

    model = Direct(a=conv(), bn=nn.BatchNorm2d(8))
    assert [node.name for node in trace(Network(model)).norms["bn"].fed_by] == ["a"]
    assert isinstance(normswap.convert(model).bn, nn.GroupNorm)


def test_kernel_used_outside_its_layer_is_left() -> None:
    class Borrowed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(nn.functional.conv2d(x, self.a.weight, padding=1))

    plan = normswap.inspect(Borrowed(a=conv(), bn=nn.BatchNorm2d(8)))
    assert "read outside its own" in plan.convs[0].reason
