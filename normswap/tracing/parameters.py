"""Which tensors of a forward pass are parameters, or computed from nothing else, and what reads them."""

from collections.abc import Collection, Iterable

from torch import Tensor

from normswap.networks.network import Network

COPIES = ("to_copy", "detach", "alias")
"""Operators whose result still counts as the parameter they read."""


class Parameters:
    """Tensors by ``id``; whoever asks keeps them alive, so that an ``id`` stays a name.

    Args:
        network: The copy that is about to run.

    Attributes:
        reads: Names of the operators that read each parameter, by its name.
    """

    def __init__(self, network: Network) -> None:
        self.reads: dict[str, set[str]] = {}
        self._sources: dict[int, frozenset[str]] = {}
        self._leaves: dict[int, str] = {}
        self._owners: dict[str, list[str]] = {}
        self._statistics: dict[int, str] = {}
        for name, module in network.modules.items():
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                leaf = self._leaves.setdefault(id(tensor), f"{name}.{key}".lstrip("."))
                self._sources[id(tensor)] = frozenset({leaf})
                self._owners.setdefault(leaf, []).append(name)
                if name in network.norms and key in ("running_mean", "running_var"):
                    self._statistics[id(tensor)] = name

    def leaf(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter that a tensor is, or a copy of; None where it is none."""
        return self._leaves.get(id(tensor))

    def owners(self, leaf: str) -> list[str]:
        """Return the modules that hold a parameter."""
        return self._owners[leaf]

    def norm_of(self, tensors: Iterable[Tensor]) -> str | None:
        """Return the norm whose running statistics are among the tensors."""
        return next((self._statistics[id(tensor)] for tensor in tensors if id(tensor) in self._statistics), None)

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is made from parameters and constants alone."""
        return id(tensor) in self._sources

    def sources(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        """Return the parameters that tensors were computed from."""
        return frozenset[str]().union(*(self._sources.get(id(tensor), frozenset()) for tensor in tensors))

    def note_reads(self, operator: str, sources: Collection[str]) -> None:
        """Note that an operator on data read parameters."""
        for source in sources:
            self.reads.setdefault(source, set()).add(operator)

    def note_constant(self, operator: str, operands: list[Tensor], made: list[Tensor], sources: frozenset[str]) -> None:
        """Note a result made from parameters alone; a cast of a parameter still counts as that parameter."""
        for tensor in made:
            self._sources[id(tensor)] = sources | self._sources.get(id(tensor), frozenset())
            if operator in COPIES and id(operands[0]) in self._leaves:
                self._leaves[id(tensor)] = self._leaves[id(operands[0])]
                return
        self.note_reads(operator, [self._leaves[id(tensor)] for tensor in operands if id(tensor) in self._leaves])
