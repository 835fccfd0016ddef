"""The weight-standardized convolutions a converted network holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from normswap.layers.standardization import EPS, filters, gain_and_offset, kernel, standardize


class WeightStandardized(nn.Module):
    """What every weight-standardized convolution shares.

    The raw filters stay the parameter ``weight``. In the *adaptive* form two frozen parameters of shape
    (out_channels,), ``ws_gain`` and ``ws_offset``, bring the standardized filters back to the kernel they were taken
    from. In the *standard* form there is no offset, and the gain, one value per layer that a norm behind it cannot see,
    is None or keeps the kernel at the scale of the filters, so that a plain convolution with them computes the same.
    They are parameters and not buffers so that Opacus accepts the layer.
    """

    weight: Any
    bias: Any
    _conv_forward: Any
    ws_gain: nn.Parameter | None
    ws_offset: nn.Parameter | None
    ws_eps: float

    @property
    def raw_weight(self) -> nn.Parameter:
        """The filters as they are trained: the parameter ``weight``."""
        return cast(nn.Parameter, self._parameters["weight"])

    def standardized_weight(self) -> Tensor:
        """Return the kernel the convolution uses, of the shape of ``weight``; within `using` the one given there."""
        given = self.__dict__.get("_ws_given")
        return self.fresh_kernel() if given is None else cast(Tensor, given())

    def fresh_kernel(self) -> Tensor:
        """Standardize the filters."""
        weight = self.raw_weight
        rows = standardize(self.ws_filters(), self.ws_eps, gain=self.ws_gain, offset=self.ws_offset)
        return self.ws_kernel(rows.to(weight.dtype))

    @contextmanager
    def using(self, given: Callable[[], Tensor]) -> Iterator[None]:
        """Within the block, take the kernel from a function instead of standardizing the filters.

        Raises:
            RuntimeError: The convolution is within such a block already.
        """
        if self.is_given_a_kernel:
            raise RuntimeError("the convolution is given a kernel already")
        self.__dict__["_ws_given"] = given
        try:
            yield
        finally:
            self.__dict__.pop("_ws_given", None)

    @property
    def is_given_a_kernel(self) -> bool:
        """Whether the convolution is within `using`."""
        return self.__dict__.get("_ws_given") is not None

    @property
    def form(self) -> str:
        """``"adaptive"`` or ``"standard"``."""
        return "standard" if self.ws_offset is None else "adaptive"

    def extra_repr(self) -> str:
        """Describe the convolution and its form."""
        return f"{super().extra_repr()}, ws={self.form}"

    def ws_filters(self, weight: Tensor | None = None) -> Tensor:
        """Return a weight of the layer's shape, by default its own, as rows (out_channels, fan_in), one per filter."""
        return filters(self.raw_weight if weight is None else weight, **self._layout())

    def ws_kernel(self, rows: Tensor) -> Tensor:
        """Return rows as `ws_filters` gives them in the shape of ``weight``."""
        return kernel(rows, self.raw_weight, **self._layout())

    def _layout(self) -> dict[str, Any]:
        """Which axes of the weight are channels; classes outside torch's family are taken as not transposed."""
        return {"transposed": getattr(self, "transposed", False), "groups": getattr(self, "groups", 1)}

    @classmethod
    def of(cls, conv: nn.Module, *, adaptive: bool, eps: float = EPS) -> Self:
        """Build the standardized twin of `conv`: the same Parameter objects, geometry, flags and hooks.

        `conv` itself is not changed.
        """
        twin = cls.__new__(cls)
        twin.__dict__ = conv.__dict__ | {
            "_parameters": dict(conv._parameters),
            "_buffers": dict(conv._buffers),
            "_modules": dict(conv._modules),
        }
        twin.__dict__["ws_eps"] = eps
        gain = offset = None
        if adaptive:
            weight = twin.raw_weight.detach()
            with torch.no_grad():
                values = gain_and_offset(twin.ws_filters(weight), eps)
            gain, offset = (nn.Parameter(value.to(weight.dtype), requires_grad=False) for value in values)
        twin.register_parameter("ws_gain", gain)
        twin.register_parameter("ws_offset", offset)
        return twin


class _WSConv(WeightStandardized):
    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the standardized kernel."""
        output: Tensor = self._conv_forward(input, self.standardized_weight(), self.bias)
        return output


class WSConv1d(_WSConv, nn.Conv1d):
    """Weight-standardized ``nn.Conv1d``."""


class WSConv2d(_WSConv, nn.Conv2d):
    """Weight-standardized ``nn.Conv2d``."""


class WSConv3d(_WSConv, nn.Conv3d):
    """Weight-standardized ``nn.Conv3d``."""


class WeightInForward(WeightStandardized):
    """Standardize inside the forward pass that a convolution class brings along (padding, cropping, …).

    During that pass reading ``weight`` gives the standardized kernel; at any other time it gives the raw parameter,
    so that state dicts, initializers and optimizers see what they expect.
    """

    @property
    def weight(self) -> Any:
        """The raw parameter; the standardized kernel while the layer's forward pass runs."""
        active = self.__dict__.get("_active_weight")
        if active is not None:
            return active
        try:
            return self._parameters["weight"]
        except KeyError:
            raise AttributeError("weight") from None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the class's own forward pass with the standardized kernel."""
        self.__dict__["_active_weight"] = self.standardized_weight()
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__["_active_weight"] = None

    def __reduce__(self) -> Any:
        """Pickle by the class it standardizes: the class in between is made on demand and has no import path."""
        return _blank, (conv_class(self),), dict(self.__dict__)


class WSConvTranspose1d(WeightInForward, nn.ConvTranspose1d):  # type: ignore[override]
    """Weight-standardized ``nn.ConvTranspose1d``."""


class WSConvTranspose2d(WeightInForward, nn.ConvTranspose2d):  # type: ignore[override]
    """Weight-standardized ``nn.ConvTranspose2d``."""


class WSConvTranspose3d(WeightInForward, nn.ConvTranspose3d):  # type: ignore[override]
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


def conv_class(module: WeightStandardized) -> type[nn.Module]:
    """Return the convolution class that `module` was made from."""
    return cast(type[nn.Module], next(c for c in type(module).__mro__ if not issubclass(c, WeightStandardized)))


def _blank(plain: type[nn.Module]) -> WeightStandardized:
    made = ws_class(plain)
    return made.__new__(made)


def plain_conv(module: WeightStandardized) -> nn.Module:
    """Return the ordinary convolution with the kernel that `module` uses, of the class it was made from."""
    plain = conv_class(module)
    conv = plain.__new__(plain)
    conv.__dict__ = module.__dict__ | {"_parameters": dict(module._parameters), "_modules": dict(module._modules)}
    for name in ("ws_eps", "_active_weight", "_ws_given"):
        conv.__dict__.pop(name, None)
    for name in ("ws_gain", "ws_offset"):
        del conv._parameters[name]
    with torch.no_grad():
        folded = module.standardized_weight()
    conv._parameters["weight"] = nn.Parameter(folded, requires_grad=module.raw_weight.requires_grad)
    return conv
