"""One read-only look at a model: its modules and their names, its norms and convolutions."""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property

from torch import nn

from normswap.layers.convs import WeightStandardized
from normswap.networks.recognition import is_batch_norm, is_conv


class Network:
    """A model's modules by qualified name, walked once and handed along.

    A module that is held in several places has several names; the first is the one that stands for it, the others are
    its aliases. What a network holds must not change while this looks at it.

    Attributes:
        model: The model itself.
        slots: Every module by every of its names, in the order of registration.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.slots: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))

    @property
    def kind(self) -> str:
        """Class name of the model."""
        return type(self.model).__name__

    @cached_property
    def names(self) -> Mapping[int, list[str]]:
        """Every name of every module, by ``id(module)``."""
        names: dict[int, list[str]] = {}
        for name, module in self.slots.items():
            names.setdefault(id(module), []).append(name)
        return names

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Every module once, by its first name."""
        return {names[0]: self.slots[names[0]] for names in self.names.values()}

    @cached_property
    def norms(self) -> Mapping[str, nn.Module]:
        """BatchNorm-like modules by their first name."""
        return {name: module for name, module in self.modules.items() if is_batch_norm(module)}

    @cached_property
    def convs(self) -> Mapping[str, nn.Module]:
        """Convolutions of torch's family by their first name, weight-standardized ones included."""
        return {name: m for name, m in self.modules.items() if is_conv(m) or isinstance(m, WeightStandardized)}

    @cached_property
    def owners(self) -> Mapping[int, int]:
        """How many modules hold each parameter, by ``id(parameter)``."""
        return Counter(id(p) for module in self.modules.values() for p in module._parameters.values() if p is not None)

    def name(self, module: nn.Module) -> str:
        """Return a module's first name."""
        return self.names[id(module)][0]

    def aliases(self, name: str) -> tuple[str, ...]:
        """Return the other names of a module, by its first one."""
        return tuple(self.names[id(self.slots[name])][1:])

    def standardized(self) -> Iterator[tuple[str, WeightStandardized]]:
        """Yield the weight-standardized convolutions with their first names."""
        return ((name, m) for name, m in self.modules.items() if isinstance(m, WeightStandardized))
