"""Networks drawn from a grammar compute what plain float64 torch says; benchmarks/grammar.py draws thousands."""

import copy
import tempfile
import warnings
from contextlib import nullcontext

import torch
from grammar import (
    Affine,
    ReadTwice,
    Sentence,
    as_batch_norm,
    gradients,
    is_exact,
    positive_factors,
    relative,
    sentences,
    typical,
)
from hypothesis import given, settings
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from normswap.layers.convs import WeightStandardized


def must_hold(drawn: Sentence) -> None:
    """Raise unless everything that holds for every network holds for this one."""
    model, before = drawn.model, copy.deepcopy(drawn.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            converted = normswap.convert(model, example_input=drawn.x, check=False, **drawn.options).eval()
        except normswap.NothingToConvert:
            return
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.state_dict().items())
    assert repr(model) == repr(before)
    for name, module in model.named_modules():  # scaling its filters would change what else reads it
        if isinstance(module, ReadTwice):
            assert not isinstance(converted.get_submodule(f"{name}.conv"), WeightStandardized)
    with torch.no_grad():
        wanted = model(drawn.x)
        assert is_exact(relative(as_batch_norm(converted, model)(drawn.x), wanted))
        norms_match(model, converted)
        filters_keep_their_kernel(converted, drawn.x.dtype)
    trainings_agree(converted, drawn)
    files_agree(converted, drawn)


def norms_match(model: nn.Module, converted: nn.Module) -> None:
    """Where a sample's statistics are the running ones, every new norm does what the old one did."""
    for name, norm in model.named_modules():
        new = converted.get_submodule(name)
        if isinstance(norm, _BatchNorm) and isinstance(new, nn.GroupNorm):
            dims = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
            x = typical(norm, next(rank for kind, rank in dims.items() if isinstance(norm, kind)))
            assert is_exact(relative(new(x), Affine(norm, tuple(new.children()))(x))), name


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
    """Gradients are the same whether kernels are shared by the batches of a step or not."""
    if not any(parameter.requires_grad for parameter in converted.parameters()):
        return
    batches = [drawn.x[:1], drawn.x[1:]]
    apart = gradients(converted, batches, lambda _: nullcontext())
    shared = gradients(converted, batches, normswap.accumulate)
    assert list(apart) == list(shared)
    scale = max((float(gradient.abs().max()) for gradient in apart.values()), default=1.0)
    for name, gradient in apart.items():
        assert float((gradient - shared[name]).abs().max()) <= 1e-9 * scale, name


def files_agree(converted: nn.Module, drawn: Sentence) -> None:
    """What is saved and loaded computes the same."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        loaded = normswap.load(normswap.save(converted, folder), model=copy.deepcopy(drawn.model))
        assert is_exact(relative(loaded(drawn.x), converted(drawn.x)))
    assert normswap.plan_of(loaded) == normswap.plan_of(converted)


@settings(max_examples=100)
@given(sentences())
def test_a_network_from_the_grammar_keeps_what_it_computes(drawn: Sentence) -> None:
    must_hold(drawn)
