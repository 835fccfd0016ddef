"""Batches to learn from and to judge by."""

import copy
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.calibration.calibration import calibration
from normswap.demo.digits import digits_resnet, load_digits


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return load_digits()


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return digits_resnet()


@pytest.fixture
def converted(original: nn.Module) -> nn.Module:
    return normswap.convert(original, affine="copy", ws="adaptive", example_input=torch.zeros(2, 1, 8, 8))


def test_a_generator_is_read_once_and_no_further_than_it_takes(
    converted: nn.Module, original: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[Tensor]:
        for index in range(60):
            batch = digits[0][index * 8 : index * 8 + 8].clone()
            seen.append(weakref.ref(batch))
            yield batch
            assert sum(reference() is not None for reference in seen) < 45, "batches pile up"

    assert calibration(converted, original, stream()).kept == "matched"
    assert len(seen) < 45, "256 samples tell, and those that are held back judge"
    with pytest.raises(normswap.InvalidOption, match="no generator"):
        normswap.calibrate(converted, original, stream(), steps=5)


def test_batches_without_a_sample_are_left_out(
    converted: nn.Module, original: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    batches, empty = list(digits[0][:128].split(16)), digits[0][:0]
    again = copy.deepcopy(converted)
    normswap.calibrate(again, original, batches, steps=3)
    normswap.calibrate(converted, original, [batches[0], empty, *batches[1:], empty], steps=3)
    assert converted(digits[0][:8]).equal(again(digits[0][:8]))
    with pytest.raises(normswap.CalibrationFailed, match="pass more"):
        normswap.calibrate(converted, original, [empty, empty])


def test_one_batch_is_split(
    converted: nn.Module, original: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normswap.calibrate(converted, original, [digits[0][:128]], steps=3)
