"""The norms a converted network holds: GroupNormAct, ChannelScale where a sample has one value, FrozenBatchNorm."""

import copy
import functools
import weakref
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

OWN = frozenset("weight bias running_mean running_var num_batches_tracked".split())
"""Tensors of a BatchNorm that its replacement has in another form, or does without."""

FORGOTTEN = frozenset({*vars(nn.SyncBatchNorm(1)), "num_channels", "num_groups", "then"} - {"num_features"})
"""Attributes of a BatchNorm that mean nothing to its replacement, and those that are the replacement's own."""


class GroupNormAct(nn.GroupNorm):
    """Group normalization followed by the modules that a norm subclass held, under the names they had.

    >>> norm = GroupNormAct(2, 4, then={"act": nn.ReLU()})
    >>> bool((norm(torch.randn(1, 4, 3, 3)) >= 0).all())
    True

    timm's ``BatchNormAct2d`` carries its activation and drop layer this way. Shapes as ``nn.GroupNorm``: (N, C, *).

    Args:
        num_groups: Groups of neighbouring channels.
        num_channels: Channels C.
        then: Modules by name, in the order they run after the normalization.
        stepped: Whether shapes are (T, N, C, *), as spiking networks run all steps at once: each step of each sample
            has statistics of its own.
    """

    stepped = False

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        then: dict[str, nn.Module] | None = None,
        stepped: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_groups, num_channels, **options)
        self.then, self.stepped = tuple(then or ()), stepped
        for name, module in (then or {}).items():
            self.add_module(name, module)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, then run the carried modules."""
        output = self.normalize(input.flatten(0, 1) if self.stepped else input)
        output = output.unflatten(0, input.shape[:2]) if self.stepped else output
        for name in self.then:
            output = getattr(self, name)(output)
        return output

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize (N, C, *) values."""
        return super().forward(x)

    def extra_repr(self) -> str:
        """Tell groups, channels and epsilon, and whether steps come before samples."""
        return super().extra_repr() + (", stepped" if self.stepped else "")


def takes_steps(norm: nn.Module) -> bool:
    """Tell whether the shapes of a norm are (T, N, C, *)."""
    return isinstance(norm, GroupNormAct) and norm.stepped


class PositionNorm(GroupNormAct):
    """Group normalization at each position by itself: a frame, a point or a pixel has statistics of its channels alone.

    >>> norm, x = PositionNorm(1, 4), torch.randn(1, 4, 6)
    >>> bool(torch.allclose(norm(x)[..., :3], norm(x[..., :3]), atol=1e-6))
    True

    No position sees another, so that causal layers stay causal. Shapes and arguments as `GroupNormAct`.
    """

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize each position of (N, C, *) values."""
        return at_each_position(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Tell groups, channels and epsilon, and over what statistics are taken."""
        return f"{super().extra_repr()}, over=channels"


def at_each_position(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalize (N, C, *) values by the statistics of each position's groups of channels."""
    rows = x.movedim(1, -1)
    flat = F.group_norm(rows.reshape(-1, x.shape[1]), num_groups, weight, bias, eps)
    return flat.reshape(rows.shape).movedim(-1, 1)


def normalized(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Return what a norm makes of values before its affine part."""
    if isinstance(norm, PositionNorm):
        return at_each_position(x, norm.num_groups, eps=norm.eps)
    return F.group_norm(x, norm.num_groups, eps=norm.eps)


class ChannelScale(nn.Module):
    """Scale and shift every channel: what is left of a norm that sees one value per sample.

    >>> ChannelScale(1)(torch.ones(2, 1, 1, 1)).shape
    torch.Size([2, 1, 1, 1])

    A group of one value would normalize it to zero and erase the signal; BatchNorm in eval mode is this layer. Shapes:
    (N, C, *) to the same.

    Args:
        num_channels: Channels C.
        then: Modules by name, in the order they run afterwards.
    """

    def __init__(self, num_channels: int, *, then: dict[str, nn.Module] | None = None, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels, **options))
        self.bias = nn.Parameter(torch.zeros(num_channels, **options))
        self.then = tuple(then or ())
        for name, module in (then or {}).items():
            self.add_module(name, module)

    def forward(self, input: Tensor) -> Tensor:
        """Scale, shift, then run the carried modules."""
        shape = (-1, *(1 for _ in input.shape[2:]))
        output = input * self.weight.view(shape) + self.bias.view(shape)
        for name in self.then:
            output = getattr(self, name)(output)
        return output

    def extra_repr(self) -> str:
        """Tell the number of channels."""
        return str(self.weight.numel())


class FrozenBatchNorm(nn.Module):
    """Batch normalization by running statistics in eval mode and in train mode, where they stay as they are.

    >>> FrozenBatchNorm(nn.BatchNorm2d(4))(torch.ones(2, 4, 3, 3)).shape
    torch.Size([2, 4, 3, 3])

    What becomes of a norm that stays in a network that is converted in part. Its parameters, which go on training, and
    its buffers are the norm's own.

    Args:
        norm: A norm of torch's family with running statistics.
        eps: Epsilon, where not the norm's own.
        then: Modules by name, in the order they run afterwards.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: nn.Module, *, eps: float | None = None, then: dict[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.num_features = int(norm.num_features)  # type: ignore[arg-type]
        self.eps = float(norm.eps if eps is None else eps)  # type: ignore[arg-type]
        self._parameters, self._buffers = dict(norm._parameters), dict(norm._buffers)
        self.then = tuple(then or ())
        for name, module in (then or {}).items():
            self.add_module(name, module)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, then run the carried modules."""
        output = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        for name in self.then:
            output = getattr(self, name)(output)
        return output

    def extra_repr(self) -> str:
        """Tell the number of channels and the epsilon."""
        return f"{self.num_features}, eps={self.eps}"


def carry_state(source: nn.Module, target: nn.Module, used: Collection[int] = ()) -> None:
    """Give `target` what `source` has besides what it computes with.

    That is the training flag, the hooks (the same dicts: a removal handle keeps working), parameters and buffers that a
    BatchNorm does not have, and attributes of the module's own.

    Args:
        source: A norm.
        target: What replaces it.
        used: Tensors, by ``id``, that `target` stands for.
    """
    target.training = source.training
    for name in HOOKS:
        if name in vars(source):
            vars(target)[name] = _pointing_to(target, vars(source)[name]) if "load" in name else vars(source)[name]
    for kind in ("_parameters", "_buffers"):
        for name, tensor in vars(source)[kind].items():
            if name not in OWN and id(tensor) not in used and not hasattr(target, name):
                vars(target)[kind][name] = tensor
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set & target._buffers.keys()
    for name, value in vars(source).items():
        if name not in FORGOTTEN and not hasattr(target, name) and not _is_bound(value, source):
            vars(target)[name] = value


def _pointing_to(module: nn.Module, hooks: Any) -> Any:
    """Return hooks on loading, which torch calls with the module that they point to, so that this is another one."""
    if all(getattr(hook, "module", None) is None for hook in hooks.values()):
        return hooks
    ours = type(hooks)((key, copy.copy(hook)) for key, hook in hooks.items())
    for hook in ours.values():
        if getattr(hook, "module", None) is not None:
            hook.module = weakref.ref(module)
    return ours


def _is_bound(value: Any, module: nn.Module) -> bool:
    """Tell whether a value is the module's own code, as tools put it on a module that they patch."""
    bound = value.args if isinstance(value, functools.partial) else (getattr(value, "__self__", None),)
    return any(owner is module for owner in bound)
