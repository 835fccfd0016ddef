"""Whether a layer's output follows its filters is shown by one layer of each kind, and no kind is taken for another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap.planning.scaling import layer_follows


class Bent(nn.Conv2d):
    """Bends its output where it is wide."""

    def forward(self, x: Tensor) -> Tensor:
        made = super().forward(x)
        return made.relu() if self.out_channels > 4 else made


def hooked() -> nn.Module:
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_hook(lambda _layer, _args, output: output.relu())
    return layer


def replaced() -> nn.Module:
    layer = nn.Conv2d(3, 4, 3)
    layer._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, weight, bias).abs()  # type: ignore[method-assign]
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "plain": (lambda: nn.Conv2d(3, 4, 3), True),
    "wider": (lambda: nn.Conv2d(8, 16, 3), True),
    "padded": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), True),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, bias=False), True),
    "linear": (lambda: nn.Linear(3, 4), True),
    "own, narrow": (lambda: Bent(3, 4, 3), True),
    "own, wide": (lambda: Bent(3, 8, 3), False),
    "hooked": (hooked, False),
    "replaced": (replaced, False),
}


@pytest.mark.parametrize("first", LAYERS)
@pytest.mark.parametrize("then", LAYERS)
def test_what_one_layer_shows_holds_for_no_other_kind(first: str, then: str) -> None:
    known: dict[Any, bool | None] = {}
    for name in (first, then):
        build, follows = LAYERS[name]
        assert layer_follows(build(), known) is follows


def test_layers_of_torch_that_differ_in_size_run_once() -> None:
    runs: list[torch.Size] = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.conv2d:
                runs.append(args[1].shape)
            return func(*args, **(kwargs or {}))

    known: dict[Any, bool | None] = {}
    with Counting():
        assert all(layer_follows(nn.Conv2d(3, width, 3), known) for width in (4, 8, 16))
    assert set(runs) == {torch.Size([4, 3, 3, 3])}
