"""Record one forward pass as a graph: a dispatch mode sees every operator, hooks see every module."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normswap.networks.tensors import all_meta, tensors_in
from normswap.tracing.graph import Graph, Kind, Node
from normswap.tracing.operators import answer, base_name, kind_of, shape_alone

Shapes = tuple[tuple[int, ...], ...]


class Recorder(TorchDispatchMode):
    """Build a `Graph` from the operators that run under it.

    Every tensor seen is kept alive until the recorder is dropped, so that ``id(tensor)`` stays a name for it.

    Args:
        model: The copy that is about to run; it receives hooks.
        norms: Qualified names of the BatchNorm-like modules, by ``id(module)``.
        names: First qualified name of every module, by ``id(module)``.
        edges: Follow tensors from operator to operator; without, only shapes and calls of batch_norm are noted.
    """

    def __init__(
        self, model: nn.Module, norms: Mapping[int, str], names: Mapping[int, str], *, edges: bool = True
    ) -> None:
        super().__init__()
        self._edges = edges
        self.graph = Graph()
        self.norm_inputs: dict[str, list[tuple[int, ...]]] = {}
        self.norm_steps: dict[str, list[str]] = {}
        self.norm_nodes: dict[str, list[int]] = {}
        self.plain_convs: dict[int, str] = {}
        self.parameter_reads: dict[str, set[str]] = {}
        self.functional_norms: set[str] = set()
        self.shapes: dict[str, Shapes] = {}
        self._alive: list[Any] = []
        self._node: dict[int, int] = {}
        self._source: dict[int, frozenset[str]] = {}
        self._leaf: dict[int, str] = {}
        self._statistics: dict[int, str] = {}
        self._writers: dict[int, list[int]] = {}
        self._modules: list[str] = []
        self._inside: list[str] = []
        self._owners: dict[str, list[str]] = {}
        self._watch(model, norms, names)

    def _watch(self, model: nn.Module, norms: Mapping[int, str], names: Mapping[int, str]) -> None:
        for module in list(model.modules()):
            name = names[id(module)]
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                leaf = self._leaf.setdefault(id(tensor), f"{name}.{key}".lstrip("."))
                self._source[id(tensor)] = frozenset({leaf})
                self._owners.setdefault(leaf, []).append(name)
                if id(module) in norms and key in ("running_mean", "running_var"):
                    self._statistics[id(tensor)] = name
            if isinstance(module, torch.jit.ScriptModule):
                continue
            norm = norms.get(id(module))
            module.register_forward_pre_hook(self._entering(name, norm), with_kwargs=True)
            # what the user's own hooks compute is no part of the module: they stay on what replaces it
            module.register_forward_hook(self._leaving(name, norm), with_kwargs=True, prepend=True)

    def begin(self, inputs: Iterable[Tensor]) -> None:
        """Note the network's inputs."""
        for tensor in inputs:
            self._name(tensor, self.graph.add(Node(Kind.INPUT, "input", (), tuple(tensor.shape))))

    def finish(self, outputs: Iterable[Tensor]) -> None:
        """Note what leaves the network."""
        for tensor in outputs:
            self.graph.outputs.update(self._reads(tensor))

    def _entering(self, name: str, norm: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._inside and self._modules[-1] == self._inside[-1]:
                self.norm_steps[self._inside[-1]].append(f"module:{name}")
            self._modules.append(name)
            if norm is not None and not self._inside:
                self._inside.append(norm)
                self.norm_steps[norm] = []
                tensor = next(t for t in tensors_in((args, kwargs)))
                self._norm_reached(norm, tensor)

        return hook

    def _leaving(self, name: str, norm: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._modules.pop()
            leaving = list(tensors_in(output))
            called = self.shapes.get(name, ())  # a shared module may meet several sizes
            self.shapes[name] = tuple(dict.fromkeys((*called, *(tuple(tensor.shape) for tensor in leaving))))
            if norm is not None and self._inside == [norm]:
                self._inside.pop()
                for tensor in leaving:
                    self._name(tensor, self.norm_nodes[norm][-1])

        return hook

    def _norm_reached(self, norm: str, tensor: Tensor) -> int:
        index = self.graph.add(Node(Kind.NORM, norm, tuple(self._reads(tensor)), tuple(tensor.shape)))
        self.norm_nodes.setdefault(norm, []).append(index)
        self.norm_inputs.setdefault(norm, []).append(tuple(tensor.shape))
        return index

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operator, on meta tensors where any operand is one, and note what it read and wrote."""
        kwargs = kwargs or {}
        name = base_name(func)
        operands = list(tensors_in((args, kwargs)))
        on_meta = any(tensor.is_meta for tensor in operands)
        if on_meta:
            args, kwargs = all_meta(args, operands), all_meta(kwargs, operands)
            if "device" in kwargs and kwargs["device"] is not None:
                kwargs = {**kwargs, "device": torch.device("meta")}
        name = "batch_norm" if "batch_norm" in name else name
        result = NotImplemented
        if on_meta:
            result = shape_alone(func, name, args, operands)
            result = answer(func, name, args, kwargs) if result is NotImplemented else result
        if result is NotImplemented:
            result = func(*args, **kwargs)
        if self._inside:
            if self._modules[-1:] == self._inside and any(id(tensor) not in self._source for tensor in operands):
                self.norm_steps[self._inside[-1]].append(name)
            self._alive.append(result)
        elif self._edges:
            self._note(func, name, operands, result)
        elif name == "batch_norm":
            self._batch_norm(operands)
        return result

    def _note(self, func: Any, name: str, operands: list[Tensor], result: Any) -> None:
        made = list(tensors_in(result))
        self._alive.append(made)
        written = _written(func, operands)
        reading = operands[1:] if name == "copy" and written and len(operands) > 1 else operands
        data = sorted({index for tensor in reading for index in self._reads(tensor)})
        sources = frozenset[str]().union(
            *(self._source.get(id(t), frozenset()) for t in operands if not self._reads(t))
        )
        if not data:
            self._note_constant(name, operands, made, sources)
            return
        if name == "batch_norm":
            index = self._batch_norm(operands)
        else:
            kind = kind_of(name, len(data), len(sources))
            index = self.graph.add(Node(kind, name, tuple(data), tuple(made[0].shape) if made else ()))
            self._name_node(index, kind, operands, sources)
        for tensor in [*made, *written]:
            self._name(tensor, index)
        for tensor in written:
            self._writers.setdefault(_storage(tensor), []).append(index)

    def _note_constant(self, name: str, operands: list[Tensor], made: list[Tensor], sources: frozenset[str]) -> None:
        """Note a result made from parameters alone; a cast of a parameter still counts as that parameter."""
        for tensor in made:
            self._source[id(tensor)] = sources | self._source.get(id(tensor), frozenset())
            if name in ("to_copy", "detach", "alias") and id(operands[0]) in self._leaf:
                self._leaf[id(tensor)] = self._leaf[id(operands[0])]
                return
        for tensor in operands:
            if id(tensor) in self._leaf:
                self.parameter_reads.setdefault(self._leaf[id(tensor)], set()).add(name)

    def _name_node(self, index: int, kind: Kind, operands: list[Tensor], sources: frozenset[str]) -> None:
        """Name convolutions and linear layers after their module; note which operator reads which parameter."""
        node = self.graph.nodes[index]
        here = self._modules[-1] if self._modules else ""
        for source in sources:
            self.parameter_reads.setdefault(source, set()).add(node.name)
        if kind is Kind.CONV:
            leaf = self._leaf.get(id(operands[1]))
            owners = self._owners[leaf] if leaf else [here]
            node.name = here if here in owners else owners[0]
            if leaf and here in owners:
                self.plain_convs[index] = leaf
        elif kind is Kind.LINEAR:
            owners = sorted(source.rpartition(".")[0] for source in sources)
            node.name = here if here in owners else owners[0]

    def _batch_norm(self, operands: list[Tensor]) -> int:
        """Note a batch_norm operator called past its module's hooks, or one that is no BatchNorm module's."""
        for tensor in operands[1:]:
            if id(tensor) in self._statistics:
                return self._norm_reached(self._statistics[id(tensor)], operands[0])
        shape = tuple(operands[0].shape)
        if shape[0] != 1:  # instance norm folds the batch into the channels
            self.functional_norms.add(self._modules[-1] if self._modules else "")
        return self.graph.add(Node(Kind.OTHER_NORM, "batch_norm", tuple(self._reads(operands[0])), shape))

    def _name(self, tensor: Tensor, index: int) -> None:
        self._alive.append(tensor)
        self._node[id(tensor)] = index

    def _reads(self, tensor: Tensor) -> list[int]:
        """Nodes that `tensor` holds values of: its own, and later writers to the storage it shares."""
        own = self._node.get(id(tensor))
        found = [] if own is None else [own]
        if self._writers:
            found += [i for i in self._writers.get(_storage(tensor), ()) if own is None or i > own]
        return found


def _written(func: Any, operands: list[Tensor]) -> list[Tensor]:
    """Operands that the operator writes to; by schema position, which in-place and ``out=`` forms keep."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    if schema.arguments and schema.arguments[0].alias_info and schema.arguments[0].alias_info.is_write:
        return operands[:1]
    return operands[-len(schema.returns) :] if schema.returns else operands[:1]


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -1
