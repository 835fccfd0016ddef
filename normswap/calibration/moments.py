"""Watch a network's norms while images pass through: their moments, and what other group counts would do."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.layers.matching import CONSTANT, closed_form, damping, scale_and_shift
from normswap.networks.inputs import call
from normswap.networks.recognition import norm_parts

Watch = Callable[[str, nn.Module, Tensor], None]


class Moments:
    """Running mean and variance per channel of everything passed to `add`; memory does not grow."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())

    def add(self, mean: Tensor, var: Tensor) -> None:
        """Count one batch by its (C,) mean and variance."""
        self.count += 1
        self.sums = self.sums.to(mean.device) + mean
        self.squares = self.squares.to(mean.device) + var + mean.square()

    @property
    def mean(self) -> Tensor:
        """Mean per channel, (C,)."""
        return self.sums / self.count

    @property
    def var(self) -> Tensor:
        """Variance per channel, (C,)."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0)


@contextmanager
def watching(model: nn.Module, names: Iterable[str], watch: Watch) -> Iterator[None]:
    """Call ``watch(name, module, input)`` before every forward pass of the named modules."""
    modules = dict(model.named_modules(remove_duplicate=False))
    handles = [
        modules[name].register_forward_pre_hook(lambda module, args, name=name: watch(name, module, args[0].detach()))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channel_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (C,) mean and biased variance of (N, C, *) values, in float64."""
    var, mean = torch.var_mean(values.double(), dim=[0, *range(2, values.ndim)], correction=0)
    return mean, var


@torch.no_grad()
def match_moments(converted: nn.Module, original: nn.Module, names: Iterable[str], batches: Iterable[Any]) -> None:
    """Give every GroupNorm the per-channel mean and standard deviation that its BatchNorm has on the same images.

    On each batch a norm is set right before it runs, so that the later ones see what corrected ones before them make;
    the moments of all batches together give the values that stay. Both networks must be in eval mode.

    Args:
        converted: The network whose norms' affine values are set.
        original: The network it was converted from.
        names: The norms, by the name they have in both.
        batches: Example inputs; each is seen once.
    """
    names = list(names)
    wanted: dict[str, list[tuple[Tensor, Tensor]]] = {}
    before, after = {name: Moments() for name in names}, {name: Moments() for name in names}

    def remember(name: str, norm: nn.Module, x: Tensor) -> None:
        wanted[name].append(_batch_norm_moments(norm, *channel_moments(x)))

    def correct(name: str, norm: nn.Module, x: Tensor) -> None:
        if not wanted[name]:
            return
        assert isinstance(norm, nn.GroupNorm)
        normalized = channel_moments(F.group_norm(x, norm.num_groups, eps=norm.eps))
        target = wanted[name].pop(0)
        before[name].add(*normalized)
        after[name].add(*target)
        _set_affine(norm, *normalized, *target)

    with watching(original, names, remember), watching(converted, names, correct):
        for batch in batches:
            wanted.update({name: [] for name in names})
            call(original, batch)
            call(converted, batch)
    modules = dict(converted.named_modules(remove_duplicate=False))
    for name in names:
        if before[name].count:
            seen, target = before[name], after[name]
            _set_affine(modules[name], seen.mean, seen.var, target.mean, target.var)


def _batch_norm_moments(norm: nn.Module, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return the moments of a norm's output, before any activation, from those of its input."""
    scale, shift = _eval_function(norm)
    return scale * mean + shift, scale.square() * var


def _eval_function(norm: nn.Module) -> tuple[Tensor, Tensor]:
    parts = norm_parts(norm)
    assert parts.mean is not None
    assert parts.var is not None
    weight = torch.ones_like(parts.mean) if parts.weight is None else parts.weight
    bias = torch.zeros_like(parts.mean) if parts.bias is None else parts.bias
    return scale_and_shift(weight.double(), bias.double(), parts.mean, parts.var, eps=parts.eps)


def _set_affine(norm: nn.Module, mean: Tensor, var: Tensor, wanted_mean: Tensor, wanted_var: Tensor) -> None:
    """Set weight and bias so that values of the given moments come out with the wanted ones; signs stay."""
    weight: Any = norm.weight
    alive = var > CONSTANT
    scale = torch.where(alive, (wanted_var / var.clamp_min(1e-300)).sqrt(), weight.double().abs())
    scale = torch.where(weight.double() < 0, -scale, scale)
    weight.copy_(scale)
    norm.bias.copy_(wanted_mean - scale * mean)  # type: ignore[operator]


@torch.no_grad()
def measure_drift(
    original: nn.Module, counts: Mapping[str, Iterable[int]], batches: Iterable[Any], *, shrink: float
) -> dict[str, dict[int, float]]:
    """Return how far GroupNorm's output would be from BatchNorm's, by norm and group count.

    Each norm is looked at by itself, on what the original feeds it: the root mean square difference over the output's
    standard deviation, as `normswap.layers.matching.drift` estimates it without images.

    Args:
        original: The unconverted network, in eval mode.
        counts: Group counts to try, by norm.
        batches: Example inputs; each is seen once.
        shrink: As for `normswap.convert`.
    """
    moved: dict[str, dict[int, float]] = {name: dict.fromkeys(tried, 0.0) for name, tried in counts.items()}
    varied = dict.fromkeys(counts, 0.0)

    def compare(name: str, norm: nn.Module, x: Tensor) -> None:
        parts = norm_parts(norm)
        assert parts.mean is not None
        assert parts.var is not None
        x, mean, var = x.float(), parts.mean.float(), parts.var.float()
        ones = torch.ones_like(mean)
        axes = (1, -1, *(1 for _ in x.shape[2:]))
        scale = (ones if parts.weight is None else parts.weight.float()) / (var + parts.eps).sqrt()
        exact = (x - mean.view(axes)) * scale.view(axes)
        varied[name] += float((scale.square() * channel_moments(x)[1]).sum())
        for groups in moved[name]:
            eps = parts.eps + float(damping(mean, var, shrink=shrink, num_groups=groups))
            weight = ones if parts.weight is None else parts.weight.float()
            affine = closed_form(weight, 0 * ones, mean, var, eps=parts.eps, norm_eps=eps, num_groups=groups)
            off = F.group_norm(x, groups, *affine, eps) - exact
            moved[name][groups] += float(off.square().sum()) / (off.numel() / len(mean))

    with watching(original, counts, compare):
        for batch in batches:
            call(original, batch)
    return {
        name: {groups: (value / varied[name]) ** 0.5 for groups, value in tried.items()}
        for name, tried in moved.items()
        if varied[name]
    }
