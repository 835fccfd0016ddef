"""Which tensors of a forward pass are parameters, or computed from nothing else, and what reads them."""

from collections.abc import Collection, Iterable

from torch import Tensor

from normswap.networks.network import Network

COPIES = ("to_copy", "detach", "alias")
"""Operators whose result still counts as the parameter they read."""

AVERAGES = frozenset("mul add sub lerp copy".split())
"""Operators by which a parameter is averaged into another; that alone makes nothing of its values."""


def storage_of(tensor: Tensor) -> int:
    """Return a number that stands for the memory a tensor looks at; one of its own where it has none.

    Where there is data it is the address, which an array of numpy shares.
    """
    try:
        storage = tensor.untyped_storage()
        return (0 if tensor.is_meta else storage.data_ptr()) or int(storage._cdata)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)


class Parameters:
    """Tensors by ``id``, and by their memory where no operator made them, as ``.data`` does.

    Whoever asks keeps them alive, so that an ``id`` stays a name.

    Args:
        network: The copy that is about to run.

    Attributes:
        reads: Names of the operators that read each parameter, by its name.
        learned: Names of those that are parameters, and no buffers.
        unread: Names of parameters by ``id`` of an alias that no operator has read.
    """

    def __init__(self, network: Network) -> None:
        self.reads: dict[str, set[str]] = {}
        self.learned: set[str] = set()
        self.unread: dict[int, str] = {}
        self._sources: dict[int, frozenset[str]] = {}
        self._leaves: dict[int, str] = {}
        self._storages: dict[int, str] = {}
        self._owners: dict[str, list[str]] = {}
        self._statistics: dict[int, str] = {}
        for name, module in network.modules.items():
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                leaf = self._leaves.setdefault(id(tensor), f"{name}.{key}".lstrip("."))
                self._sources[id(tensor)] = frozenset({leaf})
                self._storages.setdefault(storage_of(tensor), leaf)
                if key in module._parameters:
                    self.learned.add(leaf)
                self._owners.setdefault(leaf, []).append(name)
                if name in network.norms and key in ("running_mean", "running_var"):
                    self._statistics[id(tensor)] = name
        self._own = frozenset(index for index, leaf in self._leaves.items() if leaf in self.learned)

    def is_own(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter itself, which the network holds whatever is written to it."""
        return id(tensor) in self._own

    def leaf(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter that a tensor is, or a copy of; None where it is none."""
        found = self._leaves.get(id(tensor))
        return self._storages.get(storage_of(tensor)) if found is None and not self._is_known(tensor) else found

    def owners(self, leaf: str) -> list[str]:
        """Return the modules that hold a parameter."""
        return self._owners[leaf]

    def norm_of(self, tensors: Iterable[Tensor]) -> str | None:
        """Return the norm whose running statistics are among the tensors."""
        return next((self._statistics[id(tensor)] for tensor in tensors if id(tensor) in self._statistics), None)

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is made from parameters and constants alone."""
        return self._is_known(tensor) or storage_of(tensor) in self._storages

    def _is_known(self, tensor: Tensor) -> bool:
        return id(tensor) in self._sources

    def sources(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        """Return the parameters that tensors were computed from."""
        return frozenset[str]().union(*map(self._sources_of, tensors))

    def meant(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        """Return the parameters that tensors are, and those that others were computed from.

        What was averaged into a parameter is a source of it, and not what its reader means.
        """
        named = ((tensor, self.leaf(tensor)) for tensor in tensors)
        return frozenset[str]().union(*(self._sources_of(tensor) if leaf is None else {leaf} for tensor, leaf in named))

    def _sources_of(self, tensor: Tensor) -> frozenset[str]:
        found = self._sources.get(id(tensor))
        if found is None:
            leaf = self._storages.get(storage_of(tensor))
            found = frozenset() if leaf is None else frozenset({leaf})
        return found

    def note_reads(self, operator: str, sources: Collection[str]) -> None:
        """Note that an operator on data read parameters."""
        for source in sources:
            self.reads.setdefault(source, set()).add(operator)

    def note_operands(self, operands: Iterable[Tensor]) -> None:
        """Note that an operator reads tensors, whatever it makes of them."""
        if self.unread:
            for tensor in operands:
                self.unread.pop(id(tensor), None)

    def note_constant(self, operator: str, operands: list[Tensor], made: list[Tensor], sources: frozenset[str]) -> None:
        """Note a result made from parameters alone; a cast of a parameter still counts as that parameter.

        What an average is for is known by what reads it: data, another operator, or whoever holds it after the pass.
        """
        for tensor in made:
            self._sources[id(tensor)] = sources | self._sources.get(id(tensor), frozenset())
            if operator in COPIES and (leaf := self.leaf(operands[0])) is not None:
                self._leaves[id(tensor)] = self.unread[id(tensor)] = leaf
                return
        if operator not in AVERAGES:
            self.note_reads(operator, sources)
