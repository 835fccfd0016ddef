"""What a network says about its inputs: attributes of its own, or of a configuration that it carries."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from normswap.limits import MAX_SIDE

CONFIGURATIONS = ("config", "hparams", "cfg", "args")
"""Attributes under which networks carry what they were built from."""

CHANNELS = (
    *("n_chans", "in_channels", "in_chans", "num_channels", "input_channels", "num_input_channels", "n_channels"),
    *("c_in", "in_ch", "num_inputs", "in_features", "num_features", "n_features", "input_dim", "feat_in"),
    *("num_mel_bins", "n_mels", "mel_bins", "feature_size", "input_size", "embed_dim"),
)
TIMES = ("n_times", "seq_len", "context_length", "sequence_length", "seq_length", "input_length", "window_size")
SIDES = ("in_size", "img_size", "image_size", "input_size", "spec_size")
SHAPES = ("input_shape", "in_shape", "input_size", "example_shape")


def stated_size(model: nn.Module, rank: int) -> tuple[int, ...] | None:
    """Return the spatial size that a model keeps under one of the usual names."""
    for value in _stated(model, SIDES):
        sides = (value,) * rank if _is_size(value) else value
        if isinstance(sides, (tuple, list)) and len(sides) == rank and all(map(_is_size, sides)):
            return tuple(sides)
    return None


def stated_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of a sample that a model keeps: whole ones, with or without a batch axis; channels by length."""
    for value in _stated(model, SHAPES):
        if isinstance(value, (tuple, list)) and 1 < len(value) < 6:
            for shape in (tuple(value), tuple(value[1:])):
                if all(map(_is_size, shape)):
                    yield shape
    channels, times = ([value for value in _stated(model, names) if _is_size(value)] for names in (CHANNELS, TIMES))
    for length in dict.fromkeys(times):
        for number in dict.fromkeys(channels):
            yield number, length
            yield length, number


def stated_channels(model: nn.Module) -> tuple[int, ...]:
    """Return the numbers of channels, or features of a frame, that a model keeps."""
    return tuple(dict.fromkeys(value for value in _stated(model, CHANNELS) if _is_size(value)))


def stated_main_input(model: nn.Module) -> str:
    """Return the name of the argument that a model says is its main input, else nothing."""
    name = getattr(model, "main_input_name", "")
    return name if isinstance(name, str) else ""


def _stated(model: nn.Module, names: tuple[str, ...]) -> Iterator[Any]:
    holders = [model, *(_attribute(model, name) for name in CONFIGURATIONS)]
    for holder in holders:
        for name in names if holder is not None else ():
            value = holder.get(name) if isinstance(holder, Mapping) else _attribute(holder, name)
            if value is not None:
                yield value


def _attribute(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except Exception:  # a property may ask for what is not there yet
        return None


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < MAX_SIDE
