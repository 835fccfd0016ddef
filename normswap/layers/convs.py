"""The weight-standardized convolutions a converted network holds."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from normswap.errors import UnsupportedModel
from normswap.layers.keeping import forget, is_transformed, kept_kernel
from normswap.layers.merging import Seen, may_merge
from normswap.layers.standardization import EPS, by_filter, filters, gain_and_offset, kernel, only_scaled, standardize

GIVEN: ContextVar[Mapping[nn.Module, Callable[[], Tensor]]] = ContextVar("given kernels", default=MappingProxyType({}))
"""Kernels that convolutions take instead of standardizing, in this thread alone."""

FIXED = ("ws_gain", "ws_offset")
"""Buffers of a weight-standardized convolution."""


def layout_of(layer: nn.Module) -> dict[str, Any]:
    """Return which axes of a layer's weight are channels, as `filters` takes it; not transposed where none says so."""
    return {"transposed": getattr(layer, "transposed", False), "groups": getattr(layer, "groups", 1)}


def _whole_kernel(
    weight: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float, transposed: bool, groups: int
) -> Tensor:
    """Return the kernel; a function to torch.fx, whose graphs would hold the kernel as it was when they were made."""
    rows = standardize(by_filter(weight, transposed=transposed, groups=groups), eps, gain=gain, offset=offset)
    return kernel(rows.to(weight.dtype), weight, transposed=transposed, groups=groups)


torch.fx.wrap("_whole_kernel")


class WeightStandardized(nn.Module):
    """What every weight-standardized convolution shares.

    The raw filters stay the parameter ``weight``. In the *adaptive* form two buffers of shape (out_channels,),
    ``ws_gain`` and ``ws_offset``, bring the standardized filters back to the kernel they were taken from. In the
    *standard* form there is no offset, and the gain, one value per layer that a norm behind it cannot see, is None or
    keeps the kernel at the scale of the filters, so that a plain convolution with them computes the same. Both are
    buffers: they never change, whatever is unfrozen, decayed or asked for its gradient.

    A pruning mask, or a parametrization of ``weight`` alone, acts on the standardized kernel; what takes the weight
    apart (weight_norm) acts on the filters that are standardized. What a tool adds to the ``weight`` of a frozen layer
    through ``.data``, as merging an adapter does, is added to the kernel (`normswap.layers.merging`).
    """

    bias: Any
    _conv_forward: Any
    ws_gain: Tensor | None
    ws_offset: Tensor | None
    ws_eps: float

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the layer that `of` fills; called as torch's class is, make torch's class.

        Tools that add to a network (LoRA) build layers with ``type(conv)(…)`` and want convolutions.
        """
        if not (args or kwargs) or cls not in _CLASSES.values():  # a tool's own subclass has a constructor of its own
            return super().__new__(cls)
        return cast(Self, conv_class(cls)(*args, **kwargs))

    @property
    def weight(self) -> Any:
        """The parameter ``weight``, or what a pruning mask makes of it; who asks for it may be about to write to it."""
        own = vars(self)
        if "weight" in own:  # computed, put there by a tool
            return own["weight"]
        if "weight" not in own.get("_parameters", ()):
            raise AttributeError(f"{type(self).__name__} has no weight")
        weight, seen = own["_parameters"]["weight"], own.get("_ws_seen")
        if weight.requires_grad or torch.compiler.is_compiling():
            return weight
        if (seen is None or not seen.holds_for(weight)) and may_merge(sys._getframe(1), merged="_ws_merged" in own):
            own["_ws_seen"] = Seen.of(weight)
        return weight

    @weight.setter
    def weight(self, value: Any) -> None:
        vars(self)["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        if "weight_mask" in self._buffers:  # a mask that is made permanent: what it masks is the kernel
            vars(self)["_ws_masked"] = self.standardized_weight().detach()
        del vars(self)["weight"]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter; a weight whose mask has been made permanent holds the masked kernel.

        Raises:
            UnsupportedModel: It is the weight there was with its filters scaled, as what folds a norm into a kernel
                makes it: standardized, it would be what it was.
        """
        before = self._parameters.get(name) if name == "weight" and "_ws_loading" not in vars(self) else None
        if type(before) is nn.Parameter and type(param) is nn.Parameter and before.shape == param.shape:
            rows, new = self.ws_filters(before.detach()), self.ws_filters(param.detach())
            if only_scaled(rows, new):
                raise UnsupportedModel(
                    f"the new weight of a {type(self).__name__} is the old one with its filters scaled, which their "
                    "standardization takes back; what scales kernels, as to fold a norm, takes normswap.fold(model)"
                )
        super().register_parameter(name, param)
        masked = vars(self).pop("_ws_masked", None) if name == "weight" else None
        if masked is not None and param is not None:
            self.take_kernel(masked)

    def take_kernel(self, kernel: Tensor) -> None:
        """Make `kernel`, of the shape of ``weight``, both the filters and what they are standardized to."""
        weight = cast(Tensor, self._parameters["weight"])
        weight.data.copy_(kernel)
        for key, value in zip(FIXED, gain_and_offset(self.ws_filters(weight.detach()), self.ws_eps), strict=True):
            if (own := self._buffers[key]) is None:
                self._buffers[key] = value.to(kernel.dtype)
            else:
                own.data.copy_(value)

    def settle(self) -> None:
        """Add to the kernel what has been written into the weight since it was asked for."""
        seen: Seen | None = vars(self).get("_ws_seen")
        weight = self._parameters.get("weight")
        if seen is None or weight is not seen.weight:  # another in its place for a while: torch.func
            return
        del vars(self)["_ws_seen"]
        added = seen.added() if seen.holds_for(weight) else None
        if added is None:
            return
        vars(self)["_ws_merged"] = True
        with torch.no_grad():
            rows = standardize(self.ws_filters(seen.values.to(added)), self.ws_eps, **self.constants())
            self.take_kernel(kernel(rows.to(added.dtype), added, **layout_of(self)) + added)

    def __prepare_scriptable__(self) -> None:
        """Refuse ``torch.jit.script``, which calls this.

        Raises:
            UnsupportedModel: With the way on.
        """
        raise UnsupportedModel(
            f"torch.jit.script cannot compile a {type(self).__name__}; script normswap.fold(model) instead"
        )

    @property
    def raw_weight(self) -> nn.Parameter:
        """The filters as they are trained: the parameter ``weight``, under whatever name a tool has put it."""
        if "_ws_seen" in vars(self):
            self.settle()
        own = self._parameters.get("weight")
        if own is None and is_parametrized(self, "weight"):
            own = getattr(self.parametrizations["weight"], "original", None)  # type: ignore[index]
        if own is None and "weight_mask" in self._buffers:
            own = self._parameters.get("weight_orig")
        return cast(nn.Parameter, self.weight if own is None else own)

    @property
    def is_computed(self) -> bool:
        """Whether something computes ``weight``: a pruning mask, a parametrization."""
        return "weight" not in self._parameters

    def standardized_weight(self) -> Tensor:
        """Return the kernel the convolution uses, of the shape of ``weight``; within `given` the one given there.

        Code that is compiled, or transformed by ``torch.func``, standardizes for itself.
        """
        if torch.compiler.is_compiling() or is_transformed():
            return self.fresh_kernel()
        if (weight := self._proxy()) is not None:
            return _whole_kernel(cast(Tensor, weight), self.ws_gain, self.ws_offset, self.ws_eps, **layout_of(self))
        kernel = GIVEN.get().get(self)
        return self.fresh_kernel() if kernel is None else kernel()

    def _proxy(self) -> torch.fx.Proxy | None:
        """Return what stands for the weight while ``torch.fx`` traces: it replaces the look-up of parameters."""
        if self.is_computed:
            return None
        found = nn.Module.__getattr__(self, "weight")
        return found if isinstance(found, torch.fx.Proxy) else None

    def used_kernel(self) -> Tensor:
        """Return the kernel for a forward pass; one that is only evaluated may get that of the pass before."""
        if torch.compiler.is_compiling() or self in GIVEN.get() or self._proxy() is not None:
            return self.standardized_weight()
        kept = kept_kernel(self)
        return self.fresh_kernel() if kept is None else kept

    def train(self, mode: bool = True) -> Self:
        """Set the mode; either forgets the kernel that is kept."""
        forget(self)
        return super().train(mode)

    def fresh_kernel(self) -> Tensor:
        """Standardize the filters.

        Raises:
            UnsupportedModel: There are more or fewer of them than at conversion.
        """
        rows, constants = by_filter(self.raw_weight, **layout_of(self)), self.constants()
        known = next((len(value) for value in constants.values() if value is not None), len(rows))
        if len(rows) != known:
            raise UnsupportedModel(
                f"a {type(self).__name__} was converted with {known} filters and now holds {len(rows)}; what adds or "
                "removes filters works on normswap.fold(model), or on the network before its conversion"
            )
        return self.kernel_of(standardize(rows, self.ws_eps, **constants))

    def kernel_of(self, rows: Tensor) -> Tensor:
        """Return standardized filters, (out_channels, *), as the kernel: in its shape, pruned or parametrized."""
        weight = self.raw_weight
        kernel = self.ws_kernel(rows.to(weight.dtype))
        if self.is_computed and is_parametrized(self, "weight"):
            steps = self.parametrizations["weight"]  # type: ignore[index]
            for step in steps if hasattr(steps, "original") else ():
                kernel = step(kernel)
        elif self.is_computed and "weight_orig" in self._parameters:
            mask = self._buffers.get("weight_mask")
            kernel = kernel if mask is None else kernel * mask
        return kernel

    def constants(self) -> dict[str, Tensor | None]:
        """Return gain and offset; those from before a copy went to the meta device where its weight is real again.

        Opacus sends a copy there and calls it with real parameters.
        """
        own = {key.removeprefix("ws_"): self._buffers[key] for key in FIXED}
        if any(value is not None and value.is_meta for value in own.values()) and not self.raw_weight.is_meta:
            own |= self.__dict__.get("_ws_before_meta", {})
        return own

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        vars(self)["_ws_loading"] = True  # gain and offset come with the weight
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            del vars(self)["_ws_loading"]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> Any:
        self.settle()
        return {key: value for key, value in vars(self).items() if key != "_ws_seen"}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.settle()
        forget(self)
        before = self.__dict__.pop("_ws_before_meta", None) or self.constants()
        super()._apply(fn, recurse)
        if any(value is not None and value.is_meta for value in map(self._buffers.get, FIXED)):
            self.__dict__["_ws_before_meta"] = before
        return self

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yield the buffers that a training step could change: with `recurse`, all but gain and offset.

        Opacus asks this of each layer, and refuses one that could tell one sample of another. ``named_buffers``, and
        ``buffers`` of the network, yield all.
        """
        own = [id(self._buffers.get(key)) for key in FIXED] if recurse else []
        return (buffer for buffer in super().buffers(recurse) if id(buffer) not in own)

    @property
    def form(self) -> str:
        """``"adaptive"`` or ``"standard"``."""
        self.settle()
        return "standard" if self.ws_offset is None else "adaptive"

    def extra_repr(self) -> str:
        """Describe the convolution and its form."""
        return f"{super().extra_repr()}, ws={self.form}"

    def ws_filters(self, weight: Tensor | None = None) -> Tensor:
        """Return a weight of the layer's shape, by default its own, as rows (out_channels, fan_in), one per filter."""
        return filters(self.raw_weight if weight is None else weight, **layout_of(self))

    def ws_kernel(self, rows: Tensor) -> Tensor:
        """Return rows as `ws_filters` gives them in the shape of ``weight``."""
        return kernel(rows, self.raw_weight, **layout_of(self))

    @classmethod
    def of(cls, conv: nn.Module, *, adaptive: bool, eps: float = EPS, weight: Tensor | None = None) -> Self:
        """Build the standardized twin of `conv`: the same Parameter objects, geometry, flags and hooks.

        `conv` itself is not changed. A layer that was compiled by itself is not any more: compile the twin.

        Args:
            conv: The convolution.
            adaptive: Whether gain and offset keep the filters as they are, or as `weight` has them.
            eps: Epsilon of the standardization.
            weight: What the layer's weight will be, where that is not what it is.
        """
        twin = cls.__new__(cls)
        twin.__dict__ = _carried(conv)
        twin.__dict__["ws_eps"] = eps
        gain = offset = None
        if adaptive:
            weight = twin.raw_weight if weight is None else weight
            with torch.no_grad():
                values = gain_and_offset(twin.ws_filters(weight.detach()), eps)
            gain, offset = (value.to(weight.dtype) for value in values)
        twin.register_buffer("ws_gain", gain)
        twin.register_buffer("ws_offset", offset)
        return twin


def _carried(module: nn.Module) -> dict[str, Any]:
    """Return what a twin of a module holds; torch's own copies leave out the compiled call, too."""
    registers = ("_parameters", "_buffers", "_modules")
    own = vars(module) | {key: dict(vars(module)[key]) for key in registers}
    own["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    own.pop("_compiled_call_impl", None)
    return own


@contextmanager
def given(kernels: Mapping[nn.Module, Callable[[], Tensor]]) -> Iterator[None]:
    """Within the block and its thread, have convolutions take kernels from functions instead of standardizing."""
    token = GIVEN.set({**GIVEN.get(), **kernels})
    try:
        yield
    finally:
        GIVEN.reset(token)


class _WSConv(WeightStandardized):
    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the standardized kernel."""
        output: Tensor = self._conv_forward(input, self.used_kernel(), self.bias)
        return output


class WSConv1d(_WSConv, nn.Conv1d):
    """Weight-standardized ``nn.Conv1d``."""


class WSConv2d(_WSConv, nn.Conv2d):
    """Weight-standardized ``nn.Conv2d``."""


class WSConv3d(_WSConv, nn.Conv3d):
    """Weight-standardized ``nn.Conv3d``."""


class WeightInForward(WeightStandardized):
    """Standardize inside the forward pass that a convolution class brings along (padding, cropping, …).

    That pass runs on a stand-in, of the class itself, whose ``weight`` is the standardized kernel; the layer's own
    stays the raw parameter at any time, for other threads, too.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the class's own forward pass with the standardized kernel."""
        self.settle()
        plain, own = conv_class(type(self)), vars(self)
        parametrized = own["_modules"].get("parametrizations", ())
        others = {name: getattr(self, name) for name in parametrized if name != "weight"}
        stand_in = plain.__new__(plain)
        held = {key: value for key, value in own.items() if key != "weight"}  # a pruned weight is kept there
        held["_parameters"] = {**own["_parameters"], **others, "weight": self.standardized_weight()}
        vars(stand_in).update(held)
        output = plain.forward(stand_in, *args, **kwargs)
        for key, value in vars(stand_in).items():  # what the pass has noted
            if held.get(key) is not value:
                own[key] = value
        return output

    def __reduce__(self) -> Any:
        """Pickle by the class it standardizes: the class in between is made on demand and has no import path."""
        return _blank, (conv_class(type(self)),), self.__getstate__()


class WSConvTranspose1d(WeightInForward, nn.ConvTranspose1d):
    """Weight-standardized ``nn.ConvTranspose1d``."""


class WSConvTranspose2d(WeightInForward, nn.ConvTranspose2d):
    """Weight-standardized ``nn.ConvTranspose2d``."""


class WSConvTranspose3d(WeightInForward, nn.ConvTranspose3d):
    """Weight-standardized ``nn.ConvTranspose3d``."""


_CLASSES: dict[type[nn.Module], type[WeightStandardized]] = {
    nn.Conv1d: WSConv1d,
    nn.Conv2d: WSConv2d,
    nn.Conv3d: WSConv3d,
    nn.ConvTranspose1d: WSConvTranspose1d,
    nn.ConvTranspose2d: WSConvTranspose2d,
    nn.ConvTranspose3d: WSConvTranspose3d,
}


def ws_class(plain: type[nn.Module]) -> type[WeightStandardized]:
    """Return the weight-standardized class for a convolution class, made on demand for subclasses of torch's own."""
    if plain not in _CLASSES:
        _CLASSES[plain] = type(f"WS{plain.__name__}", (WeightInForward, plain), {"__module__": __name__})
    return _CLASSES[plain]


def conv_class(standardized: type[nn.Module]) -> type[nn.Module]:
    """Return the convolution class that a weight-standardized class was made from."""
    plain = next(c for c in standardized.__mro__ if not issubclass(c, WeightStandardized))
    return cast(type[nn.Module], plain)


def _blank(plain: type[nn.Module]) -> WeightStandardized:
    made = ws_class(plain)
    return made.__new__(made)


def plain_conv(module: WeightStandardized) -> nn.Module:
    """Return the ordinary convolution with the kernel that `module` uses, of the class it was made from.

    What computed its weight, a pruning mask or a parametrization, is folded in.
    """
    module.settle()
    plain = conv_class(type(module))
    conv = plain.__new__(plain)
    conv.__dict__ = _carried(module)
    for name in ("ws_eps", "_ws_before_meta", "_ws_seen", "_ws_masked", "weight"):
        conv.__dict__.pop(name, None)
    for name in FIXED:
        del conv._buffers[name]
    for name in conv._modules.pop("parametrizations", ()):  # type: ignore[union-attr]
        conv._parameters[name] = nn.Parameter(getattr(module, name).detach())
    if module.is_computed:
        _forget_computing(conv)
    with torch.no_grad():
        folded = module.standardized_weight()
    weight = nn.Parameter(folded, requires_grad=module.raw_weight.requires_grad)
    conv._parameters = {**conv._parameters, "weight": weight}
    return conv


def _forget_computing(conv: nn.Module) -> None:
    """Take off what torch's tools leave on a module to compute its weight with."""
    for tensors in (conv._parameters, conv._buffers):
        for name in [name for name in tensors if name.startswith("weight_")]:
            del tensors[name]
    conv._forward_pre_hooks = OrderedDict(
        (key, hook)
        for key, hook in conv._forward_pre_hooks.items()
        if "weight" not in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
    )
