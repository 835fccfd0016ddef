"""Calibration on the shipped digits: it helps, it never harms, and it says which."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.calibration.calibration import calibration
from normswap.demo.comparison import accuracy
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


def test_moments_bring_back_what_copying_lost(
    converted: nn.Module, original: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    images, _, test_images, test_labels = digits
    before = accuracy(converted, test_images, test_labels)
    kernel = converted.state_dict()["conv1.weight"].clone()
    result = calibration(converted, original, images.split(64))
    assert result.kept == "matched"
    assert accuracy(converted, test_images, test_labels) > before + 20
    assert torch.equal(converted.state_dict()["conv1.weight"], kernel)


def test_distillation_goes_further_and_is_seeded(
    converted: nn.Module, original: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    images, labels, test_images, test_labels = digits
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
    before = torch.get_rng_state()
    again = copy.deepcopy(converted)
    result = calibration(converted, original, loader, steps=120, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert result.kept == "distilled"
    assert accuracy(converted, test_images, test_labels) > 0.95 * accuracy(original, test_images, test_labels)
    normswap.calibrate(again, original, loader, steps=120, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), converted.parameters(), strict=True))
    assert normswap.check(converted, original, example_input=images[:2])


def test_a_network_as_it_was_converted_is_equalized_anew(
    original: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    images, _, test_images, test_labels = digits
    converted = normswap.convert(original, groups="auto", shrink=0.5, example_input=torch.zeros(2, 1, 8, 8))
    parameters = list(converted.parameters())
    result = calibration(converted, original, images.split(64))
    assert result.kept == "equalized"
    assert result.scores["equalized"] < 0.7 * result.scores["converted"]
    assert accuracy(converted, test_images, test_labels) > 99
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    plan = normswap.plan_of(converted)
    assert "conv1" in plan.scales
    assert plan.inputs == {"tensor": [2, 1, 8, 8], "dtype": "float32"}
    counts = {name: module.num_groups for name, module in converted.named_modules() if isinstance(module, nn.GroupNorm)}
    assert counts == {entry.name: entry.groups for entry in plan.norms}
    rebuilt = normswap.apply(original, plan)
    rebuilt.load_state_dict(converted.state_dict())
    assert torch.equal(rebuilt.eval()(test_images), converted.eval()(test_images))


def test_what_was_trained_since_is_not_started_anew(
    original: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    converted = normswap.convert(original, example_input=torch.zeros(2, 1, 8, 8))
    with torch.no_grad():
        converted.fc.weight.mul_(1.01)  # type: ignore[union-attr, operator]
    trained = converted.fc.weight.clone()  # type: ignore[union-attr, operator]
    result = calibration(converted, original, digits[0].split(64))
    assert set(result.scores) == {"converted", "matched"}
    assert torch.equal(converted.fc.weight, trained)  # type: ignore[union-attr, arg-type]


def test_an_interrupt_keeps_the_best_so_far(
    converted: nn.Module,
    original: nn.Module,
    digits: tuple[Tensor, Tensor, Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, step = [], torch.optim.Adam.step

    def interrupted(self: torch.optim.Adam, closure: None = None) -> None:
        steps.append(step(self, closure))
        if len(steps) == 60:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    images, _, test_images, test_labels = digits
    before = accuracy(converted, test_images, test_labels)
    with pytest.warns(UserWarning, match="kept: distilled; interrupted, and what was best so far stays"):
        normswap.calibrate(converted, original, images.split(32), steps=200)
    assert len(steps) == 60
    assert accuracy(converted, test_images, test_labels) > before + 20


def test_mixed_precision_calibrates_in_bfloat16(
    converted: nn.Module,
    original: nn.Module,
    digits: tuple[Tensor, Tensor, Tensor, Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, _, test_images, test_labels = digits
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _args, output: print(output.dtype) if isinstance(module, nn.Conv2d) else None
    )  # what it kept, calibration would put back
    try:
        result = calibration(converted, original, images.split(32), steps=60, mixed_precision=True)
    finally:
        hook.remove()
    assert "torch.bfloat16" in capsys.readouterr().out
    assert result.kept == "distilled"
    assert accuracy(converted, test_images, test_labels) > 85


def test_never_worse_and_says_so(original: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    converted = normswap.convert(original, example_input=torch.zeros(2, 1, 8, 8))
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    noise = [100 * torch.randn(16, 1, 8, 8) for _ in range(3)]
    with pytest.warns(UserWarning, match="calibration did not help and nothing was changed"):
        normswap.calibrate(converted, original, noise, held_back=[digits[0][:64]])
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())


def test_only_the_converted_network_changes(
    converted: nn.Module, original: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    original.train()
    state = {key: value.clone() for key, value in original.state_dict().items()}
    converted.train()
    parameters = list(converted.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    assert normswap.calibrate(converted, original, digits[0].split(64), steps=2) is converted
    assert all(torch.equal(value, state[key]) for key, value in original.state_dict().items())
    assert original.training
    assert converted.training
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert [parameter.requires_grad for parameter in converted.parameters()] == flags
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in converted.modules())
    original.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gains_too(
    dtype: torch.dtype, original: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    half = copy.deepcopy(original).to(dtype)
    converted = normswap.convert(half, affine="copy", ws="adaptive", example_input=torch.zeros(2, 1, 8, 8, dtype=dtype))
    result = calibration(converted, half, digits[0].split(64), steps=10)
    assert result.scores[result.kept] < 0.7 * result.scores["converted"]
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    test_images = digits[2].to(dtype)
    assert accuracy(converted, test_images, digits[3]) > 80


def test_frozen_norms_find_their_own_values(digits: tuple[Tensor, Tensor, Tensor, Tensor], original: nn.Module) -> None:
    frozen = copy.deepcopy(original).requires_grad_(False)
    converted = normswap.convert(frozen, affine="copy", ws="adaptive", example_input=torch.zeros(2, 1, 8, 8))
    assert calibration(converted, frozen, digits[0].split(64), steps=10).kept == "distilled"
    assert not any(parameter.requires_grad for parameter in converted.parameters())


def test_bad_input_is_named(converted: nn.Module, original: nn.Module) -> None:
    one = torch.zeros(1, 1, 8, 8)
    with pytest.raises(normswap.CalibrationFailed, match="at least two images"):
        normswap.calibrate(converted, original, [one])
    with pytest.raises(normswap.CalibrationFailed, match="at least two images"):
        normswap.calibrate(converted, original, [])
    with pytest.raises(normswap.PlanMismatch, match="carries no plan"):
        normswap.calibrate(original, original, [one, one])
    with pytest.raises(normswap.PlanMismatch, match="no such layer|was made for"):
        normswap.calibrate(converted, nn.Sequential(nn.BatchNorm2d(1)), [one, one])
    for steps in (-1, 1.5, True):
        with pytest.raises(normswap.InvalidOption, match=f"steps={steps} must be a whole number and not negative"):
            normswap.calibrate(converted, original, [one, one], steps=steps)  # type: ignore[arg-type]
    with pytest.raises(normswap.InvalidOption, match="batches=None must be several batches"):
        normswap.calibrate(converted, original, None)  # type: ignore[arg-type]
    for wrong in (one.repeat(1, 2, 1, 1), one.long()):
        with pytest.raises(normswap.CalibrationFailed, match=r"no forward pass ran on the images .*; pass batches as"):
            normswap.calibrate(converted, original, [wrong, wrong])


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
            self.head = nn.Linear(32, 5)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            features = self.bn(self.conv(x + y)).relu()
            return {"features": features, "logits": self.head(features.mean((2, 3)))}

    torch.manual_seed(0)
    model = Two()
    for _ in range(30):
        model(torch.randn(8, 3, 9, 9) * 3, torch.randn(8, 3, 9, 9))
    model.eval()
    pairs = [(torch.randn(4, 3, 9, 9) * 3, torch.randn(4, 3, 9, 9)) for _ in range(8)]
    converted = normswap.convert(model, affine="copy", ws="adaptive", example_input=pairs[0])
    result = calibration(converted, model, pairs, steps=5)
    assert result.scores[result.kept] < result.scores["converted"]


def test_calibrate_brings_the_answers_back(
    converted: nn.Module, original: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    images, _, test_images, test_labels = digits
    before = accuracy(converted, test_images, test_labels)
    assert normswap.calibrate(converted, original, images.split(64)) is converted
    assert accuracy(converted, test_images, test_labels) > before + 20


def test_a_norm_that_keeps_no_running_statistics_is_matched_to_what_it_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 4, 3)).eval()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    converted = normswap.convert(model, groups=2, example_input=torch.zeros(2, 3, 12, 12))
    batches = [torch.randn(16, 3, 12, 12) * torch.tensor([1.0, 3.0, 9.0]).view(1, 3, 1, 1) for _ in range(6)]
    result = calibration(converted, model, batches)
    assert result.kept == "matched"
    seen = model[1](model[0](torch.cat(batches)))
    ours = converted[1](converted[0](torch.cat(batches)))  # type: ignore[index]
    torch.testing.assert_close(ours.mean((0, 2, 3)), seen.mean((0, 2, 3)), rtol=0.05, atol=0.05)
    torch.testing.assert_close(ours.std((0, 2, 3)), seen.std((0, 2, 3)), rtol=0.05, atol=0.05)
