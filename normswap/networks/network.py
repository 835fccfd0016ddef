"""One read-only look at a model: its modules and their names, its norms and convolutions."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn

from normswap.layers.convs import WeightStandardized
from normswap.networks.recognition import has_kernel, is_batch_norm, is_conv
from normswap.networks.references import references


def _sharing_memory(held: Iterable[tuple[Tensor, list[str]]]) -> Iterator[list[str]]:
    """Yield the holders of tensors together whose memory overlaps; tensors without data by themselves."""
    spans = []
    for tensor, owners in held:
        if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
            yield owners
        else:
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + tensor.numel() * tensor.element_size(), owners))
    last, end, together = "", 0, list[str]()
    for device, start, stop, owners in sorted(spans, key=lambda span: span[:3]):
        if together and (device != last or start >= end):
            yield together
            together, end = [], 0
        last, end, together = device, max(end, stop), [*together, *owners]
    if together:
        yield together


def _memory_of(tensor: Tensor) -> Hashable:
    """Return what tensors have in common whose values begin at one place; one that has no such place is by itself."""
    has_memory = not tensor.is_meta and tensor.layout is torch.strided and tensor.numel() > 0
    return (str(tensor.device), tensor.data_ptr()) if has_memory else id(tensor)


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
        """BatchNorm-like modules by their first name; those that another one holds are a part of it."""
        found = {name: module for name, module in self.modules.items() if is_batch_norm(module)}
        outer = tuple(f"{name}." for name, norm in found.items() if norm._modules)
        if not outer:
            return found
        if "" in found:
            return {"": found[""]}
        names = self.names
        return {key: norm for key, norm in found.items() if not all(n.startswith(outer) for n in names[id(norm)])}

    @cached_property
    def convs(self) -> Mapping[str, nn.Module]:
        """Convolutions of torch's family by their first name, weight-standardized ones included."""
        return {name: m for name, m in self.modules.items() if is_conv(m) or isinstance(m, WeightStandardized)}

    @cached_property
    def owners(self) -> Mapping[int, int]:
        """How many modules hold each parameter, or another in its memory, by ``id(parameter)``."""
        held = [p for module in self.modules.values() for p in module._parameters.values() if p is not None]
        count = Counter(map(_memory_of, held))
        return Counter({id(p): count[_memory_of(p)] for p in held})

    @cached_property
    def pinned(self) -> Mapping[int, str]:
        """Where else norms, convolutions and their weights are held so that nothing can take their place, by ``id``."""
        layers = {id(module) for module in self.modules.values() if has_kernel(module) or is_conv(module)}
        weights = {id(module._parameters["weight"]) for module in self.modules.values() if has_kernel(module)}
        norms = {id(norm) for norm in self.norms.values()}
        found = list(references(self.model, layers | weights | norms, norms))
        free = {one.holder for one in found if one.slots is not None}  # code may know the dict of a module, too
        return {one.to: one.where for one in found if one.slots is None and one.holder not in free}

    def holders_of_kernels(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Yield, for each weight of the named layers that others hold too, all that hold it, or memory of it.

        A holder is a layer that has it as ``weight``, else a tensor, by qualified name.
        """
        held: dict[int, tuple[Tensor, list[str]]] = {}
        for where, module in self.modules.items():
            for key, tensor in chain(module._parameters.items(), module._buffers.items()):
                if tensor is not None:
                    holder = where if key == "weight" else f"{where}.{key}".lstrip(".")
                    held.setdefault(id(tensor), (tensor, []))[1].append(holder)
        wanted = set(names)
        for owners in _sharing_memory(held.values()):
            if len(owners) > 1 and wanted.intersection(owners):
                yield owners

    def pinned_at(self, name: str) -> str:
        """Return why nothing can take the place of a layer, or nothing."""
        layer = self.slots[name]
        if name.rpartition(".")[2] == "_orig_mod" and self.pinned.get(id(layer)):
            return "torch.compile was called on it alone, and runs it whatever takes its place: compile it after that"
        if where := self.pinned.get(id(layer)):
            return f"{where} holds it, too, where nothing can take its place; hold it in a list, a dict or a module"
        where = self.pinned.get(id(layer._parameters.get("weight")))
        return f"{where} reads its weight, too" if where else ""

    def name(self, module: nn.Module) -> str:
        """Return a module's first name."""
        return self.names[id(module)][0]

    def aliases(self, name: str) -> tuple[str, ...]:
        """Return the other names of a module, by its first one."""
        return tuple(self.names[id(self.slots[name])][1:])

    def standardized(self) -> Iterator[tuple[str, WeightStandardized]]:
        """Yield the weight-standardized convolutions with their first names."""
        return ((name, m) for name, m in self.modules.items() if isinstance(m, WeightStandardized))
