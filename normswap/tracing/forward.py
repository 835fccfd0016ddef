"""Run a model once on the meta device and report what feeds each norm and what reads each convolution."""

import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normswap.errors import NeedsExampleInput, described
from normswap.layers.convs import given
from normswap.networks.copying import copy_model, in_mode, meta_copy
from normswap.networks.garbage import collecting_later
from normswap.networks.inputs import as_call, readings, tensors_in
from normswap.networks.network import Network
from normswap.networks.probing import is_stepped
from normswap.networks.recognition import norm_parts
from normswap.networks.settings import users_settings
from normswap.networks.surroundings import Surroundings
from normswap.tracing.candidates import candidates
from normswap.tracing.dispatch import Dispatch, Endless, Numbers
from normswap.tracing.facts import LayerFacts, NormFacts, Trace, layer_facts, norm_facts
from normswap.tracing.fitted_size import fitted
from normswap.tracing.modes import Running, branches_on_classes, branches_on_gradients, branches_on_mode, running
from normswap.tracing.recorder import Recorder

Facts = TypeVar("Facts", NormFacts, LayerFacts)
"""What a pass shows of one layer."""

MORE_TRIES = 4
"""Example inputs that are tried for a pass without an error once one has reached every norm before its error."""

MOST_TRIES = 60
"""Example inputs that are made up at most."""

FITTED = 2
"""Example inputs of which the size is fitted to the network's head."""

ENDLESS = "it loops on, waiting for values of data"
"""What stopped a pass that did not end."""

TRIES_WITH_DATA = 3
"""Example inputs that are tried on real tensors once no pass on the meta device has run; these passes cost time."""


@collecting_later()
def trace(
    network: Network,
    example_input: Any = None,
    *,
    until: Collection[str] | None = None,
    edges: bool = True,
    with_data: bool = False,
    around: Surroundings | None = None,
) -> Trace:
    """Trace a network without changing it or copying its data.

    Args:
        network: Any network; it is copied to the meta device.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments, a loader, or its batch; of
            numbers only shapes and types are used where a pass without data runs, of whole numbers and truth values
            (tokens, lengths, masks) the values. None makes one up.
        until: Names of the modules that count. A pass that stops with an error after the last of them is good enough,
            and where a pass in eval mode leaves some out one in train mode follows (auxiliary heads). By default the
            BatchNorm-like modules.
        edges: Tell what feeds what. Without, a trace holds shapes and calls of batch_norm, and takes less time.
        with_data: Do not try without data first.
        around: What the network's code reaches outside of it, where that is known already.

    Raises:
        NeedsExampleInput: No forward pass ran to its end, or to the last module that counts.
    """
    wanted, model = set(network.norms if until is None else until), network.model
    made_up = example_input is None
    values = list(islice(candidates(model), MOST_TRIES)) if made_up else list(readings(example_input, model))
    around = Surroundings(model) if around is None else around
    code = running(model.modules()) if edges else Running({}, ())
    by_class = branches_on_classes(code)
    failures: list[str] = []
    stopped: tuple[Any, Trace] | None = None
    misfit: tuple[Any, Trace] | None = None
    for value, data, enough in _tries(model, values, made_up=made_up, with_data=with_data):
        if stopped and enough:
            break
        found = _run(model, value, around, training=False, data=data, edges=edges)
        missed = found.left_out(network.norms) if edges and (found.stopped_by is None or not made_up) else set()
        if missed or by_class:
            found = _by_classes(model, value, around, found, missed, asked=by_class)
        found = replace(found, made_up=made_up)
        if made_up and _misfits(network, found):
            misfit = misfit or (value, found)
            failures.append(f"{_describe(value)}: {found.stopped_by or 'a norm met another number of channels'}")
            continue
        if found.stopped_by is None:
            return _with_other_passes(model, value, found, wanted, edges, around, code)
        if not stopped and wanted and not found.left_out(wanted) and found.stopped_by != ENDLESS:
            stopped = value, found
        failures.append(f"{_describe(value)}: {found.stopped_by}")
        if data and found.stopped_by == ENDLESS:
            break
    if misfit and not stopped and not misfit[1].left_out(wanted) and misfit[1].stopped_by != ENDLESS:
        stopped = misfit
    if stopped:
        return _with_other_passes(model, *stopped, wanted, edges, around, code)
    tried = failures[0] if failures else "no layer tells the input's size"
    another = "" if example_input is None else "another "
    raise NeedsExampleInput(
        f"no forward pass of {network.kind} ran ({tried}); pass {another}example_input=, or --input"
    )


def _by_classes(
    model: nn.Module, example_input: Any, around: Surroundings, first: Trace, missed: Collection[str], *, asked: bool
) -> Trace:
    """Return a pass on norms of their very classes, with what those of the first were asked for.

    The first stands where such a pass runs no more norms, and the code does not ask for classes.
    """
    second = _run(model, example_input, around, training=False, data=first.with_data, edges=True, watched=False)
    if second.left_out(missed) == missed and not asked:
        return first
    return replace(_told(second, first.asked), asked=first.asked)


def _told(trace: Trace, asked: Mapping[str, Collection[str]]) -> Trace:
    """Return a trace with what another pass tells of attributes that norms were asked for."""
    return replace(trace, norms={name: facts.asked_for(asked.get(name, ())) for name, facts in trace.norms.items()})


def _misfits(network: Network, found: Trace) -> bool:
    """Tell whether a norm met something else than its channels, which a pass without data may let through."""
    met = [(network.slots[name], facts.shape) for name, facts in found.norms.items()]
    return any(s[1:2] != (norm_parts(norm).num_channels,) and not is_stepped(norm, s) for norm, s in met)


def _tries(model: nn.Module, values: list[Any], *, made_up: bool, with_data: bool) -> Iterator[tuple[Any, bool, bool]]:
    """Yield examples, whether they run with data, and whether a pass that stopped late is good enough by then."""
    if not with_data:
        yield from ((value, False, False) for value in values[:MORE_TRIES])
        if made_up:
            yield from ((value, False, False) for one in values[:FITTED] for value in fitted(model, one))
        yield from ((value, False, True) for value in values[MORE_TRIES:])
    yield from ((value, True, True) for value in values[:TRIES_WITH_DATA])


def _with_other_passes(
    model: nn.Module,
    example_input: Any,
    first: Trace,
    wanted: Collection[str],
    edges: bool,
    around: Surroundings,
    code: Running,
) -> Trace:
    """Add what passes show that go other ways, where the first left wanted modules out or the code asks.

    One is told the opposite where the first decided by values without data, one runs with gradients, one in train mode;
    where code asks on what device a tensor is, they are run where the network is.
    """
    data, watched = first.with_data or first.asked_where, not branches_on_classes(code)
    run = partial(_run, model, example_input, around, data=data, edges=edges, watched=watched)
    found = first
    branches, follows = branches_on_mode(code), branches_on_gradients(code)
    if first.asked_where:
        found = _joined(found, run(training=False), wanted, asked=True)
    if first.decided and (edges or first.left_out(wanted)):
        found = _joined(found, run(training=False, yes=False), wanted, asked=edges)
    if follows:
        found = _joined(found, run(training=False, gradients=True), wanted, asked=True)
    if found.left_out(wanted) or branches:
        found = _joined(found, run(training=True, gradients=follows), wanted, asked=branches)
    return found


def _joined(first: Trace, second: Trace, wanted: Collection[str], *, asked: bool) -> Trace:
    """Return a pass with what another shows that reached more wanted modules, or that was asked for and has ended."""
    missing = first.left_out(wanted)
    if second.left_out(missing) == missing and (not asked or second.stopped_by is not None):
        return first
    joined = replace(first, norms=_merged(first.norms, second.norms))
    return replace(
        _told(joined, second.asked),
        convs=_merged(first.convs, second.convs),
        linears=_merged(first.linears, second.linears),
        shapes=second.shapes | first.shapes if second.left_out(missing) != missing else first.shapes,
        functional_norms=tuple({*first.functional_norms, *second.functional_norms}),
        past=tuple(sorted({*first.past, *second.past})),
        graphs=(*first.graphs, *second.graphs),
    )


def _merged(first: dict[str, Facts], second: dict[str, Facts]) -> dict[str, Facts]:
    shared = {name: facts.merged(second[name]) for name, facts in first.items() if name in second}
    return second | first | shared


def _run(
    model: nn.Module,
    example_input: Any,
    around: Surroundings,
    *,
    training: bool,
    data: bool,
    edges: bool,
    watched: bool = True,
    yes: bool = True,
    gradients: bool = False,
) -> Trace:
    copy = Network(copy_model(model) if data else meta_copy(model))
    in_mode(copy.model, training)
    device = next((t.device for t in copy.model.parameters()), torch.device("cpu")) if data else torch.device("meta")
    had_data = not any(p.is_meta for p in model.parameters())
    original = {id(parameter): name for name, parameter in model.named_parameters()}
    without_data = had_data and not data
    recorder = Recorder(copy, edges=edges, watched=watched, without_data=without_data, original=original)
    stopped_by = None
    with ExitStack() as stack:
        stack.enter_context(around.undisturbed())
        stack.enter_context(_deeper_calls())
        placed = tree_map_only(Tensor, lambda t: _placed(t, device), example_input)
        args, kwargs = as_call(placed)
        recorder.begin(tensors_in((args, kwargs)))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if not edges:
            _standardize_nothing(copy, stack)
        dispatch = stack.enter_context(Dispatch(recorder, yes=yes))
        home = next((t.device.type for t in model.parameters()), "cpu") if device.type == "meta" else None
        numbers = Numbers(recorder, home)
        if edges:
            stack.enter_context(numbers)
        if data:
            stack.enter_context(users_settings())
        try:
            output = copy.model(*args, **kwargs)
            recorder.finish(list(tensors_in(output)))
        except (Exception, SystemExit) as error:
            recorder.finish([], stopped=True)
            stopped_by = described(error)
        except Endless:
            stopped_by = ENDLESS
    convs, linears = layer_facts(recorder)
    return Trace(
        norms=dict(norm_facts(recorder)),
        convs=convs,
        linears=linears,
        shapes=recorder.shapes,
        inputs=tree_map_only(Tensor, _without_data, placed),
        operators=frozenset(recorder.operators),
        example=example_input,
        with_data=data,
        functional_norms=tuple(sorted(recorder.functional_norms)),
        past=tuple(sorted(recorder.past)),
        graphs=(recorder.graph,) if edges else (),
        stopped_by=stopped_by,
        decided=dispatch.decided,
        asked_where=had_data and numbers.asked_where,
        asked=recorder.norm_asked,
    )


@contextmanager
def _deeper_calls() -> Iterator[None]:
    """Let calls nest deeper: the hooks of a trace stand between those of the network, which runs without them."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(4 * limit)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _standardize_nothing(network: Network, stack: ExitStack) -> None:
    """Have convolutions without data use their weights as they are: of a kernel, only the shape is looked at."""
    convs = [conv for _, conv in network.standardized() if conv.raw_weight.is_meta]
    stack.enter_context(given({conv: partial(Tensor.detach, conv.raw_weight) for conv in convs}))


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of an input for a pass: on the meta device, where its values say nothing about shapes."""
    if tensor.is_meta and device.type != "meta":
        zeros = torch.zeros(tensor.shape, device=device, dtype=tensor.dtype)
        return zeros.normal_() if tensor.is_floating_point() else zeros
    if device.type == "meta" and not tensor.is_meta and not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.clone()
    return torch.empty_like(tensor, device=device) if device.type == "meta" else tensor.detach().clone().to(device)


def _without_data(tensor: Tensor) -> Tensor:
    """Return a tensor's shape and type; whole numbers and truth values as they are."""
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return tensor if whole else torch.empty_like(tensor, device="meta")


def _describe(value: Any) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(value)) or type(value).__name__
