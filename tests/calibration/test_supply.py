"""Made-up inputs beside images: how many, how large, and where."""

from itertools import islice

import pytest
import torch
from torch import Tensor

import normswap
from normswap.calibration import calibration as stages
from normswap.calibration.supply import with_made_up
from normswap.demo.digits import digits_resnet, load_digits


def photos(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    axes = (1, -1, *(1 for _ in shape[2:]))
    spread, level = torch.tensor([0.5, 2.0, 4.0]).view(axes), torch.tensor([3.0, -1.0, 0.0]).view(axes)
    return torch.randn(shape, generator=generator) * spread + level


@pytest.mark.parametrize("shape", [(16, 3, 40), (16, 3, 24, 24), (16, 3, 8, 8, 8)], ids=["1-D", "2-D", "3-D"])
def test_every_second_sample_is_made_up_and_scaled_like_the_images(shape: tuple[int, ...]) -> None:
    batch = photos(*shape)
    kept = batch.clone()
    made = list(islice(with_made_up(iter([batch] * 40), seed=0), 40))
    assert torch.equal(batch, kept)
    own = torch.stack([(out == batch).flatten(1).all(1) for out in made])
    assert own.sum(1).tolist() == [8] * 40
    assert own.float().mean(0).min() > 0.2
    rest = torch.cat([out[~same] for out, same in zip(made, own, strict=True)]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(rest.mean(1), torch.tensor([3.0, -1.0, 0.0]), atol=1.5, rtol=0)
    assert (rest.std(1) / torch.tensor([0.5, 2.0, 4.0])).sub(1).abs().max() < 0.5


@pytest.mark.parametrize(
    "batch",
    [torch.arange(12).view(4, 3, 1), torch.zeros(4, 3), {"image": torch.zeros(4, 3, 8, 8)}],
    ids=["whole numbers", "features", "a dict"],
)
def test_what_holds_no_images_passes_as_it_is(batch: object) -> None:
    assert next(with_made_up([batch], seed=0)) is batch


@pytest.mark.parametrize(("made_up", "steps", "used"), [(True, 41, True), (True, 40, False), (False, 41, False)])
def test_few_images_are_helped_out_where_it_is_asked_for(
    made_up: bool, steps: int, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(stages, "with_made_up", lambda batches, seed: calls.append(seed) or batches)
    monkeypatch.setattr(stages, "distill", lambda *args, **options: None)
    images, *_ = load_digits()
    model = digits_resnet()
    converted = normswap.convert(model, example_input=images[:2])
    batches = list(images[:96].split(8))  # ten to learn from, two to judge by
    normswap.calibrate(converted, model, batches, steps=steps, made_up=made_up)
    assert bool(calls) == used
