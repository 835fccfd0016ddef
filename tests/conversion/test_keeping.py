"""Norms that the user keeps: frozen at the statistics they have, or live."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from badnets import small, trained
from refusals import SHAPE, run
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import normswap

X = torch.randn(4, 3, 16, 16)


def partial(model: nn.Module | None = None, **options: object) -> nn.Module:
    return normswap.convert(model or small(), exclude="4", example_input=X, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, eps=0.1, momentum=None),
        nn.BatchNorm2d(8, affine=False),
        nn.SyncBatchNorm(8),
        BatchNormAct2d(8),
    ],
    ids=["plain", "epsilon", "without affine", "synchronized", "with an activation"],
)
def test_a_frozen_norm_is_the_norm_in_eval_mode_whatever_the_mode(norm: nn.Module) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), norm))
    seen: list[Tensor] = []
    converted = normswap.convert(model, exclude="3", example_input=X)
    converted[3].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))  # type: ignore[union-attr, operator]
    before = copy.deepcopy(converted.state_dict())
    for training in (False, True):
        output = converted.train(training)(X)
        torch.testing.assert_close(output, copy.deepcopy(norm).eval()(seen[-1]))
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())
    assert list(converted[3].state_dict()) == list(norm.state_dict())  # type: ignore[union-attr, operator]


def test_its_affine_part_trains_and_its_statistics_do_not() -> None:
    model = small()
    converted = partial(model).train()
    norm = converted[4]  # type: ignore[index]
    converted(X).square().sum().backward()
    assert norm.weight.grad.abs().sum() > 0
    assert torch.equal(norm.running_mean, model[4].running_mean)  # type: ignore[index]
    assert {name for name, _ in norm.named_parameters()} == {"weight", "bias"}


def test_a_plan_says_so_and_apply_rebuilds_it() -> None:
    model = small()
    converted = partial(model)
    plan = normswap.plan_of(converted)
    assert "1 norms that were kept are frozen: their statistics stay as they are" in str(plan)
    assert not plan.warnings
    again = normswap.apply(copy.deepcopy(model), normswap.Plan.from_dict(plan.to_dict()))
    assert repr(again) == repr(converted)
    assert torch.equal(again.train()(X), converted.train()(X))


def test_checkpoints_hold_it(tmp_path: Path) -> None:
    converted = partial().train()
    loaded = normswap.load(normswap.save(converted, tmp_path / "OUT"), model=small()).train()
    assert torch.equal(loaded(X), converted(X))
    card = (tmp_path / "OUT" / "README.md").read_text()
    assert "It trains at batch size 1; 1 BatchNorms were kept, with the statistics they have." in card


@pytest.mark.parametrize("how", [{"inplace": True}, {"inplace": False}], ids=["in place", "copy"])
def test_a_frozen_norm_can_be_converted_later(how: dict[str, bool]) -> None:
    converted = normswap.convert(partial(), example_input=X, **how)  # type: ignore[arg-type]
    assert isinstance(converted[4], nn.GroupNorm)  # type: ignore[index]


def test_a_live_norm_looks_at_the_batch_and_the_plan_warns() -> None:
    converted = partial(keep="live").train()
    assert isinstance(converted[4], nn.BatchNorm2d)  # type: ignore[index]
    assert normswap.plan_of(converted).warnings == (
        "1 norms that were kept still look at the batch in train mode and update their statistics (4, …); "
        "keep='frozen' (--keep frozen) holds those that it can at the statistics they have",
    )
    checks = normswap.check(converted)
    assert checks, checks
    details = {row.name: row.detail for row in checks.rows}
    assert details["no BatchNorm left"] == "1 of 2 replaced, 1 left as asked: live in train mode"
    assert details["train() equals eval()"].endswith("(whole network, without the 1 norms that were kept)")


def test_what_else_differs_by_mode_is_found_beside_live_norms() -> None:
    class Moody(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.training else x

    model = nn.Sequential(*small(), Moody())
    (failed,) = normswap.check(partial(model, keep="live")).failed
    assert failed.name == "train() equals eval()"


def test_fresh_norms_that_are_frozen_are_warned_of() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))
    assert normswap.plan_of(partial(model)).warnings == (
        "1 norms are frozen before they were trained (4, …): they normalize nothing; "
        "pass keep='live' (--keep live) to train them",
    )


@pytest.mark.parametrize("keep", ["frozen", "live", None])
def test_a_partial_conversion_passes_from_the_command_line(keep: str | None, tmp_path: Path) -> None:
    option = () if keep is None else ("--keep", keep)
    target = tmp_path / "OUT"
    code, _, stderr = run(
        "convert", "badnets:small", "--input", SHAPE, "--exclude", "4", *option, "-o", target, "--no-synthetic"
    )
    assert code == 0, stderr
    model = normswap.load(target, model=small())
    assert isinstance(model[4], nn.BatchNorm2d) is (keep == "live")  # type: ignore[index]


def test_the_feature_extractor_of_timm_freezes_them_too(tmp_path: Path) -> None:
    converted = normswap.convert(timm.create_model("test_resnet"), exclude="layer1.*")
    folder = normswap.save(converted, tmp_path / "OUT")
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    assert sum(type(m).__name__ == "FrozenBatchNorm" for m in features.modules()) == sum(
        type(m).__name__ == "FrozenBatchNorm" for m in converted.modules()
    )
