"""Note one forward pass as a graph: every operator as it is run, every module as its hooks tell."""

import gc
import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from normswap.networks.inputs import tensors_in
from normswap.networks.network import Network
from normswap.tracing.asking import watch
from normswap.tracing.graph import LAYERS, Graph, Kind, Node, Slices
from normswap.tracing.operators import ADDS, SHAPE_READERS, VIEWS, kind_of, steers, varies
from normswap.tracing.parameters import Parameters, storage_of

PAST = "code that finds it past the network's modules"
"""What reads a parameter of the original while a copy runs."""

Shapes = tuple[tuple[int, ...], ...]


class Recorder:
    """Build a `Graph` from what it is told of.

    Every tensor seen is kept alive until the recorder is dropped, so that ``id(tensor)`` stays a name for it.

    Args:
        network: The copy that is about to run; its modules receive hooks.
        edges: Follow tensors from operator to operator; without, only shapes and calls of batch_norm are noted.
        watched: Note what norms are asked for, too; they are of a class of their own meanwhile.
        without_data: Whether the network had data and this copy has none, so that no tensor without data is a constant.
        original: Names of the parameters of the network that this is a copy of, by ``id``.

    Attributes:
        graph: The operators that ran, and what each reads.
        parameters: What became of the parameters.
        shapes: Shapes of every module's outputs.
        norm_nodes: Nodes of the graph that a norm's calls are.
        norm_inputs: Shapes that a norm was called with.
        norm_steps: Operators and modules that a norm's last forward pass ran.
        norm_asked: Attributes that code outside of a norm asked it for, of which its replacement has others or none.
        plain: Nodes of convolutions and linear layers that read a parameter as it is, with its name.
        functional_norms: Modules that call batch_norm themselves, with statistics of no norm.
        past: Parameters of the original that the copy reads, past its own modules.
    """

    def __init__(
        self,
        network: Network,
        *,
        edges: bool = True,
        watched: bool = True,
        without_data: bool = False,
        original: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.graph = Graph()
        self.parameters = Parameters(network)
        self.shapes: dict[str, Shapes] = {}
        self.norm_nodes: dict[str, list[int]] = {}
        self.norm_inputs: dict[str, list[tuple[int, ...]]] = {}
        self.norm_steps: dict[str, list[str]] = {}
        self.norm_asked: dict[str, set[str]] = {}
        self.plain: dict[int, str] = {}
        self.functional_norms: set[str] = set()
        self.past: set[str] = set()
        self.operators: set[tuple[str, str]] = set()
        self._original = original
        self._edges = edges
        (self._kept,) = _references({0: object()})
        seen = {0: torch.empty(1, device="meta")}
        view = seen[0].view(1)
        (self._kept_by_views,) = _references(seen)
        del view
        self._inputs: list[Tensor] = []
        self._alive: dict[int, Tensor] = {}
        self._node: dict[int, int] = {}
        self._makers: dict[int, int] = {}
        self._writers: dict[int, list[int]] = {}
        self._without_data = without_data
        self._on_meta = any(p.is_meta for p in network.model.parameters())
        self._buffers = [b for m in network.modules.values() for b in m._buffers.values() if b is not None]
        self._modules: list[str] = []
        self._inside: list[str] = []
        for name, module in network.modules.items():
            if not isinstance(module, torch.jit.ScriptModule):
                self._hook(name, module, is_norm=name in network.norms)
        if edges and watched:
            plain = {n: norm for n, norm in network.norms.items() if not isinstance(norm, torch.jit.ScriptModule)}
            watch(plain, self._asked)

    def _asked(self, norm: str, key: str) -> None:
        if norm not in self._inside:
            self.norm_asked.setdefault(norm, set()).add(key)

    def _hook(self, name: str, module: nn.Module, *, is_norm: bool) -> None:
        gives_gradients = bool(module._backward_hooks or module._backward_pre_hooks)

        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._inside and self._modules[-1] == self._inside[-1]:
                self.norm_steps[self._inside[-1]].append(f"module:{name}")
            self._modules.append(name)
            if is_norm and not self._inside:
                self._inside.append(name)
                self.norm_steps[name] = []
                self._norm_reached(name, next(iter(tensors_in((args, kwargs)))))

        def leaving(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._modules.pop()
            made = list(tensors_in(output))
            called = self.shapes.get(name, ())  # a shared module may meet several sizes
            self.shapes[name] = tuple(dict.fromkeys((*called, *(tuple(tensor.shape) for tensor in made))))
            if is_norm and self._inside == [name]:
                self._inside.pop()
                for tensor in made:
                    self._name(tensor, self.norm_nodes[name][-1])
            for tensor in (*tensors_in((args, kwargs)), *made) if gives_gradients else ():
                self.graph.fixed.update(self._reads(tensor))

        module.register_forward_pre_hook(entering, with_kwargs=True)
        # what the user's own hooks compute is no part of the module: they stay on what replaces it
        module.register_forward_hook(leaving, with_kwargs=True, prepend=True)

    def begin(self, inputs: Iterable[Tensor]) -> None:
        """Note the network's inputs."""
        self._inputs = list(inputs)
        for tensor in self._inputs:
            self._name(tensor, self.graph.add(Node(Kind.INPUT, "input", (), tuple(tensor.shape))))

    def finish(self, outputs: Iterable[Tensor], *, stopped: bool = False) -> None:
        """Note what leaves the network: what it returned, wrote to its buffers, and what outlives the pass elsewhere.

        The caller holds the outputs meanwhile, so that those of any kind count. Where an error has stopped the pass
        it holds the error, and with it what code that was running would have read.
        """
        outputs = list(outputs)
        outlive = self._held_elsewhere()
        if {id(t) for t in outlive} - {id(t) for t in (*self._inputs, *outputs, *self._buffers)}:
            # perhaps in a cycle of what nobody holds any more
            del outlive
            gc.collect()
            outlive = self._held_elsewhere()
        hooked = [tensor for tensor in self._alive.values() if tensor._backward_hooks]  # they get its gradient
        for tensor in (*outputs, *outlive, *hooked, *self._buffers):
            self.graph.outputs.update(self._reads(tensor))
        if stopped or not self._on_meta:  # numpy has no operators
            self.parameters.note_reads("code outside of torch", self.parameters.unread.values())
        for tensor in (*outputs, *(t for t in outlive if not self.parameters.is_own(t))):
            self.parameters.note_reads("what leaves the network", self.parameters.sources([tensor]))

    def _held_elsewhere(self) -> list[Tensor]:
        """Return the tensors that something beside this recorder and autograd's views refers to."""
        counts = zip(self._alive.values(), _references(self._alive), strict=True)
        own = (self._kept, self._kept_by_views)
        return [t for t, count in counts if count > own[t._use_count() > 1]]  # type: ignore[attr-defined]

    def note(self, func: Any, name: str, operands: list[Tensor], result: Any) -> None:
        """Note an operator that has run.

        Args:
            func: The operator's overload.
            name: Its base name.
            operands: The tensors it was given.
            result: What it returned.
        """
        self._note_past(operands)
        if operands and not self._inside and name not in VIEWS and name not in SHAPE_READERS:
            self.operators.add((self._here, name))
        if self._inside:
            if self._modules[-1:] == self._inside and not all(map(self.parameters.holds, operands)):
                self.norm_steps[self._inside[-1]].append(name)
            norm = self.norm_nodes[self._inside[-1]][-1]
            self._beside_the_input(name, operands, self.graph.nodes[norm].parents)
            made = list(tensors_in(result))
            self._keep(*made)
            if name in VIEWS and (source := self._node.get(id(operands[0]))) is not None:
                self._node.update(dict.fromkeys(map(id, made), source))
        elif self._edges:
            self._note_edges(func, name, operands, result)
        elif name == "batch_norm":
            self._batch_norm(operands)

    def _note_edges(self, func: Any, name: str, operands: list[Tensor], result: Any) -> None:
        made = list(tensors_in(result))
        self.parameters.note_operands(operands)
        if self._without_data and any(tensor.is_meta and not self._knows(tensor) for tensor in operands):
            self._leave_all()
        self._keep(*made)
        if name in SHAPE_READERS:
            self.parameters.note_constant(name, [], made, frozenset())
            return
        written = _written(func, operands)
        reading = operands[1:] if name == "copy" and written and len(operands) > 1 else operands
        reads = [found for tensor in reading if (found := self._reads(tensor))]
        data = sorted({index for found in reads for index in found})
        others = [tensor for tensor in operands if not self._reads(tensor)]
        sources = self.parameters.sources(others)
        if not data:
            self.parameters.note_constant(name, operands, made, sources)
            return
        if name == "batch_norm":
            index = self._batch_norm(operands)
        else:
            kind = kind_of(name, len(reads), len(sources))
            if kind is Kind.SCALE and name in (*ADDS, "addcmul") and self._adds_unevenly(operands, made, data):
                kind = Kind.ADD if sources and sources <= self.parameters.learned else Kind.OTHER
            steered = {index for tensor in steers(name, func, operands) for index in self._reads(tensor)}
            if steered and kind is Kind.OTHER_NORM:
                self.graph.add(Node(Kind.OTHER, name, tuple(steered)))
            shape = tuple(made[0].shape) if made else ()
            slices = self._slices(operands, made) if name == "cat" and not written else ()
            index = self.graph.add(Node(kind, name, tuple(data), shape, frozenset(steered), slices))
            meant = self.parameters.meant(others) if kind in LAYERS else ()
            elsewhere = {leaf for leaf in meant if self._here not in self.parameters.owners(leaf)}
            self.parameters.note_reads(name, sources - elsewhere)
            self.parameters.note_reads(f"{name} outside of its layer", elsewhere)
            if kind is Kind.CONV:
                self.parameters.note_reads(f"{name} as its input", self.parameters.sources(operands[:1]))
            self._name_node(index, kind, operands, sources)
        before = {self._node[id(tensor)] for tensor in written if id(tensor) in self._node}
        for tensor in [*made, *written]:
            self._name(tensor, index)
        self.graph.fixed.update(before)
        for tensor in written:
            self._writers.setdefault(storage_of(tensor), []).append(index)

    def _note_past(self, operands: list[Tensor]) -> None:
        """Note a parameter of the original, to which what no copy is made of leads: a global, a weak reference."""
        for tensor in operands:
            if (leaf := self._original.get(id(tensor))) is not None:
                self.past.add(leaf)
                self.parameters.note_reads(PAST, [leaf])

    def note_handed_on(self, tensor: Tensor) -> None:
        """Note a tensor whose values code outside of torch gets."""
        self.graph.outputs.update(self._reads(tensor))
        self.parameters.note_reads("code outside of torch", self.parameters.sources([tensor]))

    def note_number(self, tensor: Tensor) -> None:
        """Note a tensor that is made of numbers of Python's."""
        self._keep(tensor)

    def _knows(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter, or was made by operators that were seen."""
        return id(tensor) in self._alive or self.parameters.holds(tensor) or bool(self._reads(tensor))

    def _leave_all(self) -> None:
        """Note that anything made so far may be read where no operator is seen, as in another thread."""
        self.graph.outputs.update(index for index, node in enumerate(self.graph.nodes) if node.kind in LAYERS)

    def _adds_unevenly(self, operands: list[Tensor], made: list[Tensor], data: list[int]) -> bool:
        """Tell whether an operator adds a constant to data that differs within a channel: a position, noise."""
        first = all(self.graph.nodes[index].kind is Kind.CONV for index in data)
        constants = [tensor for tensor in operands if not self._reads(tensor)]
        return any(varies(constant, tuple(made[0].shape), channels_first=first) for constant in constants)

    def _slices(self, operands: list[Tensor], made: list[Tensor]) -> Slices:
        """Return node and channels of every operand of a concatenation along axis 1; nothing of another one.

        The shapes tell the axis: channels add up, and all else agrees.
        """
        shapes = [tuple(tensor.shape) for tensor in operands]
        (whole,) = (tuple(tensor.shape) for tensor in made)
        alike = all(len(shape) > 1 and (shape[0], *shape[2:]) == (whole[0], *whole[2:]) for shape in shapes)
        nodes = [self._reads(tensor) for tensor in operands]
        if not alike or sum(shape[1] for shape in shapes) != whole[1] or any(len(found) > 1 for found in nodes):
            return ()
        return tuple((found[0] if found else -1, shape[1]) for found, shape in zip(nodes, shapes, strict=True))

    def _name_node(self, index: int, kind: Kind, operands: list[Tensor], sources: frozenset[str]) -> None:
        """Name convolutions and linear layers after their module."""
        node, here = self.graph.nodes[index], self._here
        if kind is Kind.CONV:
            leaf = self.parameters.leaf(operands[1])
            owners = self.parameters.owners(leaf) if leaf else [here]
            node.name = here if here in owners else owners[0]
            if leaf and here in owners:
                self.plain[index] = leaf
        elif kind is Kind.LINEAR:
            owners = sorted(source.rpartition(".")[0] for source in sources)
            node.name = here if here in owners else owners[0]
            if set(owners) == {here} and (weight := f"{here}.weight".lstrip(".")) in sources:
                self.plain[index] = weight

    def _batch_norm(self, operands: list[Tensor]) -> int:
        """Note a batch_norm operator called past its module's hooks, or one that is no BatchNorm module's."""
        self._beside_the_input("batch_norm", operands[1:], ())
        norm = self.parameters.norm_of(operands[1:])
        if norm is not None:
            return self._norm_reached(norm, operands[0])
        shape = tuple(operands[0].shape)
        if shape[0] != 1:  # instance norm folds the batch into the channels
            self.functional_norms.add(self._here)
        return self.graph.add(Node(Kind.OTHER_NORM, "batch_norm", tuple(self._reads(operands[0])), shape))

    def _norm_reached(self, norm: str, tensor: Tensor) -> int:
        index = self.graph.add(Node(Kind.NORM, norm, tuple(self._reads(tensor)), tuple(tensor.shape)))
        self.norm_nodes.setdefault(norm, []).append(index)
        self.norm_inputs.setdefault(norm, []).append(tuple(tensor.shape))
        return index

    def _beside_the_input(self, name: str, operands: list[Tensor], known: Iterable[int]) -> None:
        """Note that a norm reads more of the network than its input: a condition, an affine part that is computed."""
        if more := {index for tensor in operands for index in self._reads(tensor)}.difference(known):
            self.graph.add(Node(Kind.OTHER, name, tuple(more)))

    @property
    def _here(self) -> str:
        """Name of the module that runs."""
        return self._modules[-1] if self._modules else ""

    def _name(self, tensor: Tensor, index: int) -> None:
        self._keep(tensor)
        self._node[id(tensor)] = index
        self._makers.setdefault(storage_of(tensor), index)

    def _keep(self, *tensors: Tensor) -> None:
        self._alive.update({id(tensor): tensor for tensor in tensors})

    def _reads(self, tensor: Tensor) -> list[int]:
        """Nodes that `tensor` holds values of: its own, and later writers to the storage it shares.

        Of a tensor that came by without an operator, as ``.data`` does, its storage tells the node that made it.
        """
        own = self._node.get(id(tensor))
        if own is None:
            own = self._makers.get(storage_of(tensor))
        found = [] if own is None else [own]
        if self._writers:
            writers = self._writers.get(storage_of(tensor), [])  # in the order they ran
            found += writers[0 if own is None else bisect_right(writers, own) :]
        return found


def _references(objects: dict[int, Any]) -> list[int]:
    """Count what refers to each object, this table included."""
    return [sys.getrefcount(one) for one in objects.values()]


def _written(func: Any, operands: list[Tensor]) -> list[Tensor]:
    """Operands that the operator writes to; by schema position, which in-place and ``out=`` forms keep."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    if schema.arguments and schema.arguments[0].alias_info and schema.arguments[0].alias_info.is_write:
        return operands[:1]
    return operands[-len(schema.returns) :] if schema.returns else operands[:1]
