"""Networks drawn from a grammar compute what plain float64 torch says; benchmarks/grammar.py draws thousands."""

import copy
import tempfile
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grammar import (
    PASSES,
    WORDS,
    Affine,
    Joined,
    Sentence,
    Shuffled,
    Summed,
    as_batch_norm,
    feeders,
    gradients,
    is_exact,
    is_faithful,
    is_norm,
    positive_factors,
    relative,
    run,
    sentences,
    trained,
    typical,
)
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import prune

import normswap
from normswap.layers.convs import WeightStandardized

EXAMPLES = 3
"""Networks of each word."""


def must_hold(drawn: Sentence) -> None:
    """Raise unless everything that holds for every network holds for this one."""
    model, before, passes = drawn.model, copy.deepcopy(drawn.model), PASSES.copy()
    converted = convert(drawn)
    assert passes == PASSES
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.state_dict().items())
    assert repr(model) == repr(before)
    if converted is None:
        return
    layers_are_what_they_must_be(converted, drawn)
    with torch.no_grad():
        fed_by = feeders(model, drawn.x)
        wanted = run(model, drawn.x)
        assert is_exact(relative(run(as_batch_norm(converted, model, fed_by), drawn.x), wanted))
        norms_match(model, converted, fed_by)
        filters_keep_their_kernel(converted, drawn.x.dtype)
        modes_agree(converted, drawn)
    norms_train_as_batch_norm(model, converted)
    trainings_agree(converted, drawn)
    constants_stay(converted, drawn)
    masks_agree(converted, drawn)
    files_agree(converted, drawn)
    texts_are_data_and_few(converted)
    the_check_can_fail(converted, drawn)


def convert(drawn: Sentence) -> nn.Module | None:
    """Convert a network; norms that compute something else must be named, and only those. None: there are no others."""
    norms = {name: norm for name, norm in drawn.model.named_modules() if is_norm(norm)}
    asked = [name for name in norms if name not in drawn.options.get("exclude", ())]
    left = [name for name in asked if not is_faithful(norms[name])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if len(left) == len(asked):
            with pytest.raises(normswap.NothingToConvert):
                normswap.convert(drawn.model, example_input=drawn.x, **drawn.options)
            return None
        if left:
            with pytest.raises(normswap.CheckFailed, match=f"{len(left)} left: {left[0]}"):
                normswap.convert(drawn.model, example_input=drawn.x, **drawn.options)
        return normswap.convert(drawn.model, example_input=drawn.x, check=not left, **drawn.options).eval()


def layers_are_what_they_must_be(converted: nn.Module, drawn: Sentence) -> None:
    """A layer is replaced where that is right, and stays where something else would hear of it."""
    kept = drawn.options.get("exclude", ())
    for name, module in drawn.model.named_modules():
        new: Any = converted.get_submodule(name)
        if is_norm(module) and name not in kept:
            assert isinstance(new, nn.GroupNorm) == is_faithful(module), name
        elif is_norm(module) and is_faithful(module):  # it goes on with the statistics it has
            dims = next((rank for rank in (1, 2, 3) if isinstance(module, getattr(nn, f"BatchNorm{rank}d"))), 2)
            x, wanted = typical(module, dims), Affine(module, tuple(module.children()))  # type: ignore[arg-type]
            assert is_exact(relative(copy.deepcopy(new).train()(2 * x), wanted(2 * x))), name
        for conv in getattr(module, "stay_plain", ()):
            assert not isinstance(getattr(new, conv), WeightStandardized), f"{name}.{conv}"
        if drawn.options["ws"] == "none":
            continue
        if type(module) is nn.Sequential and hasattr(module[0], "kernel_size") and is_norm(module[1]):
            replaced = is_faithful(module[1]) and f"{name}.1" not in kept
            assert isinstance(new[0], WeightStandardized) == replaced, name
        if isinstance(module, (Joined, Shuffled, Summed)):
            forms = {getattr(conv, "form", "adaptive") for conv in new.children()}
            assert forms == {"adaptive"}, name  # what the norm meets is not one layer's own output


def norms_match(model: nn.Module, converted: nn.Module, fed_by: dict[str, str]) -> None:
    """Where a sample's statistics are the running ones, every new norm does what the old one did."""
    for name, norm in model.named_modules():
        new = converted.get_submodule(name)
        if not is_norm(norm) or not isinstance(new, nn.GroupNorm):
            continue
        if name in fed_by and getattr(converted.get_submodule(fed_by[name]), "form", "") == "standard":
            continue  # it is matched to what it meets now
        dims = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
        x = typical(norm, next((rank for kind, rank in dims.items() if isinstance(norm, kind)), 2))
        ours, theirs = new(x), Affine(norm, tuple(new.children()))(x)
        for channel in range(x.shape[1]):  # each by itself: a loud one must not hide a quiet one
            assert float((ours - theirs)[:, channel].abs().max()) < 1e-6, f"{name}, channel {channel}"


def norms_train_as_batch_norm(model: nn.Module, converted: nn.Module) -> None:
    """Every norm that was replaced trains as BatchNorm does, by the batch or, where it is frozen, by what it keeps."""
    for name, norm in model.named_modules():
        new = converted.get_submodule(name)
        if not is_norm(norm) or not isinstance(new, nn.GroupNorm):
            continue
        own: Any = copy.deepcopy(norm).train()
        dims = next((rank for rank in (1, 2, 3) if isinstance(norm, getattr(nn, f"BatchNorm{rank}d"))), 2)
        x = torch.randn(5, own.running_mean.numel(), *[3] * dims, dtype=torch.float64)
        then = nn.Sequential(*own.children())
        live = then(F.batch_norm(x, None, None, own.weight, own.bias, True, eps=own.eps))
        frozen = Affine(norm, tuple(own.children()))(x)  # type: ignore[arg-type]
        y = own(x)
        assert is_exact(relative(y, live)) or is_exact(relative(y, frozen)), name


def modes_agree(converted: nn.Module, drawn: Sentence) -> None:
    """A network that holds no live norm computes the same in train mode, and for each sample by itself."""
    if any(is_norm(module) for module in converted.modules()) or "train" in drawn.words:
        return
    training = copy.deepcopy(converted).train()
    wanted = run(converted, drawn.x)
    assert is_exact(relative(run(training, drawn.x), wanted))
    if {"numpy", "list"} & set(drawn.words):  # one number for all samples
        return
    assert is_exact(relative(torch.cat([run(training, sample[None]) for sample in drawn.x]), wanted))


def filters_keep_their_kernel(converted: nn.Module, dtype: torch.dtype) -> None:
    """The size of a standardized filter, and what is added to it, changes nothing but by the formula's epsilon."""
    changed = copy.deepcopy(converted)
    for name, conv in changed.named_modules():
        if not isinstance(conv, WeightStandardized):
            continue
        before = converted.get_submodule(name).standardized_weight()  # type: ignore[operator, union-attr]
        rows = conv.ws_filters(conv.raw_weight)
        factors = positive_factors(len(rows)).to(dtype).unsqueeze(1)
        conv.raw_weight.copy_(conv.ws_kernel(rows * factors + factors))
        assert relative(conv.standardized_weight(), before) < 1e-3, name


def trainings_agree(converted: nn.Module, drawn: Sentence) -> None:
    """Two training steps are the same whether kernels are shared by the batches of a step or not."""
    batches = [drawn.x[:1], drawn.x[1:]]
    apart = gradients(converted, batches, lambda _: nullcontext())
    shared = gradients(converted, batches, normswap.accumulate)
    assert list(apart) == list(shared)
    scale = max((float(gradient.abs().max()) for gradient in apart.values()), default=1.0)
    for name, gradient in apart.items():
        assert float((gradient - shared[name]).abs().max()) <= 1e-9 * scale, name
    own = copy.deepcopy(converted)
    convs = [module for module in own.modules() if isinstance(module, WeightStandardized)]
    if convs:
        with pytest.raises(normswap.WeightsChanged), torch.no_grad(), normswap.accumulate(own):  # noqa: PT012
            convs[0].raw_weight.mul_(2)
            run(own, drawn.x)


def constants_stay(converted: nn.Module, drawn: Sentence) -> None:
    """What brings a standardized kernel back stays what it is, whatever is unfrozen and trained."""
    state = trained(converted, drawn.x).state_dict()
    before = converted.state_dict()
    assert all(state[key].equal(before[key]) for key in before if key.endswith(("ws_gain", "ws_offset")))
    assert any(not state[key].equal(before[key]) for key in before)


def masks_agree(converted: nn.Module, drawn: Sentence) -> None:
    """A network that is pruned computes the same once its masks are made permanent."""
    own = copy.deepcopy(converted)
    convs = [module for module in own.modules() if isinstance(module, WeightStandardized)]
    for conv in convs:
        prune.random_unstructured(conv, "weight", 0.3)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        pruned = run(own, drawn.x)
        for conv in convs:
            prune.remove(conv, "weight")  # type: ignore[no-untyped-call]
        assert relative(run(own, drawn.x), pruned) < 1e-6


def texts_are_data_and_few(converted: nn.Module) -> None:
    """Names reach no terminal as they are, and no layer's entry tells of more than a few others."""
    plan = normswap.plan_of(converted)
    assert all(character.isprintable() or character == "\n" for character in str(plan))
    assert all(
        len(entry.fed_by if isinstance(entry, normswap.NormEntry) else entry.feeds) < 10 for entry in plan.entries
    )


def the_check_can_fail(converted: nn.Module, drawn: Sentence) -> None:
    """A network in which a BatchNorm is live does not pass the check."""
    if drawn.changed:
        return  # one network in three
    own = copy.deepcopy(converted)
    name = next((name for name, module in own.named_modules() if isinstance(module, nn.GroupNorm)), None)
    if name is None:  # none but those of one value a sample
        return
    parent, _, key = name.rpartition(".")
    setattr(own.get_submodule(parent), key, copy.deepcopy(drawn.model.get_submodule(name)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not normswap.check(own, example_input=drawn.x)


def files_agree(converted: nn.Module, drawn: Sentence) -> None:
    """What is saved and loaded computes the same, where a norm was changed by hand, too."""
    own = copy.deepcopy(converted)
    norm: Any = next((module for module in own.modules() if isinstance(module, nn.GroupNorm)), None)
    if norm is not None and drawn.changed == "groups":
        norm.num_groups = 2 if norm.num_groups == 1 else 1
    elif norm is not None and drawn.changed == "eps":
        norm.eps *= 3
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if "escaped" in drawn.words:
            with pytest.raises(normswap.CheckpointError, match="rename the layer before converting$"):
                normswap.save(own, folder)
            return
        loaded = normswap.load(normswap.save(own, folder), model=copy.deepcopy(drawn.model))
        assert is_exact(relative(run(loaded, drawn.x), run(own, drawn.x)))
    assert drawn.changed or normswap.plan_of(loaded) == normswap.plan_of(own)


@pytest.mark.parametrize("word", WORDS)
def test_a_network_from_the_grammar_keeps_what_it_computes(word: str) -> None:
    """Of every word a few, and the same ones every time; a hundred together."""

    @settings(max_examples=EXAMPLES)
    @given(sentences(word))
    def each(drawn: Sentence) -> None:
        must_hold(drawn)

    each()
