"""Run a model once on the meta device and report what feeds each norm and what reads each convolution."""

import math
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normswap.errors import NeedsExampleInput
from normswap.layers.convs import WeightStandardized
from normswap.networks.copying import copy_model, meta_copy, module_names
from normswap.networks.inputs import as_call, batch_size, candidates
from normswap.networks.recognition import is_batch_norm
from normswap.networks.tensors import tensors_in
from normswap.tracing.graph import Kind, Node
from normswap.tracing.recorder import Recorder, Shapes

MORE_TRIES = 4
"""Example inputs that are tried for a pass without an error once one has reached every norm before its error."""

TRIES_WITH_DATA = 3
"""Example inputs that are tried on real tensors once no pass on the meta device has run; these passes cost time."""


@dataclass(frozen=True)
class NormFacts:
    """What one BatchNorm-like module sees, over all its calls.

    The shape (N, C, *) is that of its smallest input; `steps` are the operators and modules its forward runs.
    """

    shape: tuple[int, ...]
    fed_by: tuple[Node, ...]
    via: frozenset[Kind]
    steps: tuple[str, ...]


@dataclass(frozen=True)
class ConvFacts:
    """What happens to the output of one convolution weight, over all its calls.

    `plain` tells that the operator read the parameter itself and not something computed from it.
    """

    plain: bool
    read_by: tuple[Node, ...]
    via: frozenset[Kind]
    leaves: bool
    weight_reads: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Trace:
    """One forward pass (two where the first left norms out): facts by qualified name, as first registered.

    `with_data` tells that it needed real tensors.
    """

    norms: dict[str, NormFacts]
    convs: dict[str, ConvFacts]
    shapes: dict[str, Shapes]
    batch: int
    inputs: Any
    with_data: bool = False
    functional_norms: tuple[str, ...] = ()
    stopped_by: str | None = None

    def left_out(self, names: Collection[str]) -> set[str]:
        """Return those of the named modules that did not run."""
        return {name for name in names if name not in self.norms and name not in self.shapes}


def trace(
    model: nn.Module, example_input: Any = None, *, until: Collection[str] | None = None, edges: bool = True
) -> Trace:
    """Trace `model` without changing it or copying its data.

    Args:
        model: Any module; it is copied to the meta device.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments; only shapes and types are used.
            None makes one up.
        until: Names of the modules that count. A pass that stops with an error after the last of them is good enough,
            and where a pass in eval mode leaves some out one in train mode follows (auxiliary heads). By default the
            BatchNorm-like modules.
        edges: Tell what feeds what. Without, a trace holds shapes and calls of batch_norm, and takes less time.

    Raises:
        NeedsExampleInput: No forward pass ran to its end, or to the last module that counts.
    """
    wanted = batch_norms(model) if until is None else set(until)
    values = list(candidates(model)) if example_input is None else [example_input]
    failures: list[str] = []
    stopped: tuple[Any, Trace] | None = None
    for value, data in [*((value, False) for value in values), *((value, True) for value in values[:TRIES_WITH_DATA])]:
        if stopped and (data or len(failures) >= MORE_TRIES):
            break
        found = _run(model, value, training=False, data=data, edges=edges)
        if found.stopped_by is None:
            return _with_training_pass(model, value, found, wanted, edges)
        if not stopped and wanted and not found.left_out(wanted):
            stopped = value, found
        failures.append(f"{_describe(value)}: {found.stopped_by}")
    if stopped:
        return _with_training_pass(model, *stopped, wanted, edges)
    tried = failures[0] if failures else "no layer tells the input's size"
    another = "" if example_input is None else "another "
    raise NeedsExampleInput(
        f"no forward pass of {type(model).__name__} ran ({tried}); pass {another}example_input=, or --input"
    )


def batch_norms(model: nn.Module) -> set[str]:
    """Return the names of the BatchNorm-like modules, as first registered."""
    return {name for name, module in model.named_modules() if is_batch_norm(module)}


def _with_training_pass(
    model: nn.Module, example_input: Any, first: Trace, wanted: Collection[str], edges: bool
) -> Trace:
    """Add what a pass in train mode reaches, where the one in eval mode left wanted modules out."""
    missing = first.left_out(wanted)
    if not missing:
        return first
    second = _run(model, example_input, training=True, data=first.with_data, edges=edges)
    if second.left_out(missing) == missing:
        return first
    convs = dict(second.convs)
    for name, facts in first.convs.items():
        convs[name] = _merged(facts, convs[name]) if name in convs else facts
    return replace(
        first,
        norms=second.norms | first.norms,
        convs=convs,
        shapes=second.shapes | first.shapes,
        functional_norms=tuple({*first.functional_norms, *second.functional_norms}),
    )


def _run(model: nn.Module, example_input: Any, *, training: bool, data: bool, edges: bool) -> Trace:
    copy = copy_model(model) if data else meta_copy(model)
    copy.train(training)
    names = {key: found[0] for key, found in module_names(copy).items()}
    norms = {id(m): names[id(m)] for m in copy.modules() if is_batch_norm(m)}
    if not edges:
        _standardize_nothing(copy)
    recorder = Recorder(copy, norms, names, edges=edges)
    device = next((t.device for t in copy.parameters()), torch.device("cpu")) if data else torch.device("meta")
    placed = tree_map_only(Tensor, lambda t: _placed(t, device), example_input)
    args, kwargs = as_call(placed)
    inputs = list(tensors_in((args, kwargs)))
    recorder.begin(inputs)
    stopped_by = None
    with torch.no_grad(), warnings.catch_warnings(), recorder:
        warnings.simplefilter("ignore")
        try:
            recorder.finish(tensors_in(copy(*args, **kwargs)))
        except Exception as error:
            stopped_by = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    batch = batch_size(args[0] if args else kwargs)
    return Trace(
        dict(_norm_facts(recorder)), dict(_conv_facts(recorder)), recorder.shapes, batch,
        tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), placed),
        data,
        tuple(sorted(recorder.functional_norms)), stopped_by,
    )  # fmt: skip


def _standardize_nothing(model: nn.Module) -> None:
    """Have convolutions without data use their weights as they are: of a kernel, only the shape is looked at."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, WeightStandardized) and weight is not None and weight.is_meta:
            vars(module)["_shared"] = partial(Tensor.detach, weight)


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "meta" or not tensor.is_meta:
        return torch.empty_like(tensor, device=device) if device.type == "meta" else tensor.to(device)
    return torch.randn(tensor.shape, device=device).to(tensor.dtype)


def _norm_facts(recorder: Recorder) -> Iterator[tuple[str, NormFacts]]:
    graph = recorder.graph
    for name, indices in recorder.norm_nodes.items():
        fed_by, via = graph.feeders(parent for index in indices for parent in graph.nodes[index].parents)
        steps = tuple(recorder.norm_steps.get(name, ()))
        smallest = min(recorder.norm_inputs[name], key=lambda shape: math.prod(shape[2:]))
        yield name, NormFacts(smallest, _distinct(fed_by), frozenset(via), steps)


def _conv_facts(recorder: Recorder) -> Iterator[tuple[str, ConvFacts]]:
    graph, children = recorder.graph, recorder.graph.children()
    found: dict[str, ConvFacts] = {}
    for index, node in enumerate(graph.nodes):
        if node.kind is not Kind.CONV:
            continue
        read_by, via, leaves = graph.readers(index, children)
        leaf = recorder.plain_convs.get(index)
        reads = (
            frozenset(recorder.parameter_reads.get(leaf, set()) - {"convolution", "deform_conv2d"})
            if leaf
            else frozenset()
        )
        facts = ConvFacts(leaf is not None, _distinct(read_by), frozenset(via), leaves, reads)
        found[node.name] = _merged(found[node.name], facts) if node.name in found else facts
    yield from found.items()


def _merged(a: ConvFacts, b: ConvFacts) -> ConvFacts:
    return ConvFacts(
        a.plain and b.plain, _distinct([*a.read_by, *b.read_by]), a.via | b.via, a.leaves or b.leaves,
        a.weight_reads | b.weight_reads,
    )  # fmt: skip


def _distinct(nodes: list[Node]) -> tuple[Node, ...]:
    return tuple({(node.kind, node.name): node for node in nodes}.values())


def _describe(value: Any) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(value)) or type(value).__name__
