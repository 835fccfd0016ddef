"""Measure forms of weight standardization that were tried, forward and backward, against the one that is used.

python benchmarks/standardizing.py   # two minutes

Processor time of one thread, every filter of a network by itself, as its layers do. Needs timm.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timing import interleaved, spread, summary
from torch import Tensor, nn

from normswap.layers.standardization import EPS, gain_and_offset, standardize

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
aten = torch.ops.aten


def used(rows: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return standardize(rows, gain=gain, offset=offset)


def layer_norm(rows: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return torch.addcmul(offset[:, None], F.layer_norm(rows, rows.shape[1:], eps=EPS), gain[:, None])


def batch_norm(rows: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return F.batch_norm(rows[None], None, None, gain, offset, training=True, momentum=0.0, eps=EPS)[0]


class _Function(torch.autograd.Function):
    """One fused forward pass; `backward` is a form's own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
        count, length = rows.shape
        made, mean, rstd = torch.native_group_norm(rows[None], gain, offset, 1, count, length, count, EPS)
        ctx.save_for_backward(rows, gain, mean[0], rstd[0])
        return made[0]


class LayerNormBackward(_Function):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return layer_norm_backward(grad, *ctx.saved_tensors), None, None


class ClosedForm(_Function):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, gain, mean, rstd = ctx.saved_tensors
        shift, turn = grad.mean(1), (grad * rows).mean(1)
        scale = rstd * gain
        slope = (shift * mean - turn) * rstd.square() * scale
        still = slope * mean + shift * scale
        return (grad * scale[:, None]).addcmul_(rows, slope[:, None]).sub_(still[:, None]), None, None


def layer_norm_backward(grad: Tensor, rows: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    shape, statistics, mask = rows.shape[1:], (mean[:, None], rstd[:, None]), [True, False, False]
    return aten.native_layer_norm_backward(grad, rows, shape, *statistics, None, None, mask)[0].mul_(gain[:, None])


@torch.library.custom_op("normswap_bench::standardize", mutates_args=())
def _operator(rows: Tensor, gain: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count, length = rows.shape
    made, mean, rstd = torch.native_group_norm(rows[None], gain, offset, 1, count, length, count, EPS)
    return made[0], mean[0], rstd[0]


@torch.library.custom_op("normswap_bench::standardize_backward", mutates_args=())
def _operator_backward(grad: Tensor, rows: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return layer_norm_backward(grad, rows, gain, mean, rstd)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
    return _operator_backward(grad, *ctx.saved_tensors), None, None


_operator.register_autograd(_differentiate, setup_context=_keep)

FORMS: dict[str, Form] = {
    "used: group_norm": used,
    "layer_norm, then gain and offset": layer_norm,
    "batch_norm, as timm's": batch_norm,
    "group_norm, backward by layer_norm's": LayerNormBackward.apply,  # type: ignore[dict-item]
    "group_norm, backward in closed form": ClosedForm.apply,  # type: ignore[dict-item]
    "an operator of torch.library, the same": lambda *given: _operator(*given)[0],
}

FILTERS: dict[str, tuple[str, Callable[[nn.Conv2d], bool]]] = {
    "resnet50, all": ("resnet50", lambda conv: True),
    "resnet50, 3×3 and 7×7": ("resnet50", lambda conv: conv.kernel_size != (1, 1)),
    "resnet50, 1×1": ("resnet50", lambda conv: conv.kernel_size == (1, 1)),
    "mobilenetv2_100, depthwise": ("mobilenetv2_100", lambda conv: conv.groups > 1),
}


def measure(name: str, chosen: Callable[[nn.Conv2d], bool], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield every form's time for the chosen filters of a network, and that of reading and writing them once."""
    torch.manual_seed(0)
    convs = [m for m in timm.create_model(name).modules() if isinstance(m, nn.Conv2d) and chosen(m)]
    rows = [conv.weight.detach().flatten(1).requires_grad_() for conv in convs]
    cases = [(row, *gain_and_offset(row.detach())) for row in rows]
    gradients = [torch.randn_like(row) for row in rows]
    first, grad = cases[0], gradients[0]
    (expected,) = torch.autograd.grad(used(*(value.double() for value in first)), first[0], grad.double())

    def run(form: Form) -> None:
        for case, gradient in zip(cases, gradients, strict=True):
            torch.autograd.grad(form(*case), case[0], gradient)

    def once() -> None:
        for row, gradient in zip(rows, gradients, strict=True):
            _ = row.detach().clone(), row.detach() + gradient

    for key, form in FORMS.items():
        (found,) = torch.autograd.grad(form(*first), first[0], grad)
        if not torch.allclose(found, expected.float(), rtol=1e-4, atol=1e-5):
            raise ValueError(f"{key} gives another gradient")
    variants = {form: lambda f=f: run(f) for form, f in FORMS.items()} | {"a copy, then a sum of two": once}
    seconds = interleaved(variants, rounds=rounds, clock=time.process_time)
    for form, row in summary(seconds, "used: group_norm").items():
        yield {"form": form, **row}


def main() -> None:
    """Print a table of all forms for every kind of filter."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {key: list(measure(name, chosen, args.rounds)) for key, (name, chosen) in FILTERS.items()}
    print("| form |", " | ".join(found), "|\n|", " | ".join("---" for _ in range(len(found) + 1)), "|")
    for cells in zip(*found.values(), strict=True):
        print("|", cells[0]["form"], "|", " | ".join(f"{cell['ms']:.1f} ms, {spread(cell)}" for cell in cells), "|")


if __name__ == "__main__":
    main()
