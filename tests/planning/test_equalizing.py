"""Where filters are scaled, where not and why; and that BatchNorm does not see it, in float64."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equality import assert_same_state
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from normswap.demo.digits import digits_resnet, load_digits


class Wired(nn.Module):
    """A forward pass given as a function, over modules by name."""

    def __init__(self, wiring: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def chain(layer: nn.Module, norm: nn.Module) -> Wired:
    return Wired(lambda m, x: m.bn(m.layer(x)).relu(), layer=layer, bn=norm)


def tied() -> Wired:
    model = Wired(lambda m, x: m.bn(m.a(x)) + m.b(x), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))
    model.b.weight = model.a.weight  # type: ignore[union-attr]
    return model


SQUARE = (8, 4, 9, 9)
FREE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), SQUARE),
    "depthwise": (lambda: chain(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), SQUARE),
    "depthwise of one weight": (lambda: chain(nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)), SQUARE),
    "transposed": (lambda: chain(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), SQUARE),
    "transposed, grouped": (lambda: chain(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), SQUARE),
    "1d": (lambda: chain(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (8, 4, 20)),
    "3d": (lambda: chain(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), (8, 4, 6, 6, 6)),
    "linear": (lambda: chain(nn.Linear(4, 16), nn.BatchNorm1d(16)), (32, 4)),
    "times a number": (
        lambda: Wired(lambda m, x: m.bn(m.a(x) * 0.5), a=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)),
        SQUARE,
    ),
    "dropout that train mode shows": (
        lambda: Wired(
            lambda m, x: (lambda y: y * 2 if m.training else y)(m.bn(m.drop(m.a(x)))),
            a=nn.Conv2d(4, 6, 3),
            drop=nn.Dropout(0.3),
            bn=nn.BatchNorm2d(6),
        ),
        SQUARE,
    ),
    "called twice": (
        lambda: Wired(lambda m, x: m.bn(m.a(x)) + m.bn(m.a(-x)), a=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)),
        SQUARE,
    ),
}
BOUND: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu": (
        lambda: Wired(lambda m, x: m.bn(m.a(x).relu()), a=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)),
        "not fed by one convolution or linear layer",
    ),
    "pool": (
        lambda: Wired(
            lambda m, x: m.bn(m.pool(m.a(x))), a=nn.Conv2d(4, 6, 3), pool=nn.MaxPool2d(2), bn=nn.BatchNorm2d(6)
        ),
        "something stands between the layer before it and the norm",
    ),
    "a divisor": (
        lambda: Wired(lambda m, x: m.bn(0.5 / m.a(x)), a=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)),
        "not fed by one convolution or linear layer",
    ),
    "times a number, and another reader": (
        lambda: Wired(
            lambda m, x: (lambda y: m.bn(y * 0.5) + y.sigmoid())(m.a(x)), a=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)
        ),
        "a is read by others, too",
    ),
    "another reader": (
        lambda: Wired(lambda m, x: m.bn(m.a(x)) + m.a(x).sigmoid(), a=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)),
        "a is read by others, too",
    ),
    "a norm and the output": (
        lambda: Wired(
            lambda m, x: (lambda y: (m.bn(y), torch.cat([y, x[:, :, :7, :7]], 1)))(m.a(x)),
            a=nn.Conv2d(4, 6, 3),
            bn=nn.BatchNorm2d(6),
        ),
        "a is read by others, too",
    ),
    "a concatenation that is read by others": (
        lambda: Wired(
            lambda m, x: (lambda y: m.bn(y) + y.relu())(torch.cat([m.a(x), m.b(x)], 1)),
            a=nn.Conv2d(4, 3, 3),
            b=nn.Conv2d(4, 3, 3),
            bn=nn.BatchNorm2d(6),
        ),
        "a is read by others, too",
    ),
    "a concatenation of activations": (
        lambda: Wired(
            lambda m, x: m.bn(torch.cat([m.a(x).relu(), x[:, :, 1:-1, 1:-1]], 1)),
            a=nn.Conv2d(4, 3, 3),
            bn=nn.BatchNorm2d(7),
        ),
        "no slice of the concatenation before it is the output of a convolution or linear layer",
    ),
    "a concatenation along an edge": (
        lambda: Wired(lambda m, x: m.bn(torch.cat([m.a(x), m.a(-x)], 2)), a=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)),
        "something stands between the layer before it and the norm",
    ),
    "written over": (
        lambda: Wired(
            lambda m, x: (lambda y: m.bn(y) + y.clamp_(0))(m.a(x)), a=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)
        ),
        "a is read by others, too",
    ),
    "a norm without statistics beside it": (
        lambda: Wired(
            lambda m, x: (lambda y: m.bn(y) + m.other(y))(m.a(x)),
            a=nn.Conv2d(4, 6, 3),
            bn=nn.BatchNorm2d(6),
            other=nn.BatchNorm2d(6, track_running_stats=False),
        ),
        "a is read by other, which cannot take its scales up",
    ),
    "sum": (
        lambda: Wired(
            lambda m, x: m.bn(m.a(x) + m.b(x)), a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)
        ),
        "not fed by one convolution or linear layer",
    ),
    "computed kernel": (
        lambda: chain(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        "the kernel of layer is computed in the forward pass",
    ),
    "frozen": (
        lambda: chain(nn.Conv2d(4, 6, 3).requires_grad_(False), nn.BatchNorm2d(6)),
        "the filters of layer are fixed",
    ),
    "tied": (tied, "shares its parameters with another layer"),
    "a gate by its bias": (
        lambda: Wired(
            lambda m, x: m.bn(m.a(x)) * m.a.bias.sigmoid().view(1, -1, 1, 1), a=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)
        ),
        "the bias of a is also read by mul",
    ),
    "a penalty on its bias in train mode": (
        lambda: Wired(
            lambda m, x: (m.bn(m.a(x)), m.a.bias.abs().sum() if m.training else 0),
            a=nn.Conv2d(4, 6, 3),
            bn=nn.BatchNorm2d(6),
        ),
        "the bias of a is also read by abs",
    ),
    "its bias in another convolution": (
        lambda: Wired(
            lambda m, x: m.bn(m.a(x)) + F.conv2d(x, torch.ones(6, 4, 3, 3).to(x), m.a.bias),
            a=nn.Conv2d(4, 6, 3),
            bn=nn.BatchNorm2d(6),
        ),
        "the bias of a is also read by convolution outside of its layer",
    ),
    "a linear layer's bias": (
        lambda: Wired(lambda m, x: m.bn(m.a(x.mean((2, 3)))) + m.a.bias, a=nn.Linear(4, 16), bn=nn.BatchNorm1d(16)),
        "the bias of a is also read by add",
    ),
}


def trained(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean, std=0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.double().eval()


def scaled_under_batch_norm(model: nn.Module, plan: normswap.Plan) -> nn.Module:
    """Multiply filters by hand, as the plan says, and give the norms behind them what that asks for."""
    other = copy.deepcopy(model)
    modules = dict(other.named_modules())
    with torch.no_grad():
        for name, scale in plan.scales.items():
            layer, s = modules[name], torch.tensor(scale).double()
            axis = 1 if getattr(layer, "transposed", False) else 0
            if axis:
                rows = layer.weight.view(layer.groups, -1, *layer.weight.shape[1:])
                shape = (layer.groups, 1, -1, *(1 for _ in layer.weight.shape[2:]))
                rows.mul_(s.view(shape))
            else:
                layer.weight.mul_(s.view(-1, *(1 for _ in layer.weight.shape[1:])))
            if layer.bias is not None:
                layer.bias.mul_(s)
            for entry in plan.norms:
                if entry.fed_by == (name,) and not entry.scaled_by:
                    follow(modules[entry.name], s)
        for entry in plan.norms:
            follow(modules[entry.name], slices_together(entry, plan))
    return other


def follow(norm: nn.Module, s: Tensor) -> None:
    norm.weight.mul_(s.sign() * ((s**2 * norm.running_var + norm.eps) / (norm.running_var + norm.eps)).sqrt() / s.abs())
    norm.running_mean.mul_(s)
    norm.running_var.mul_(s**2)


def slices_together(entry: normswap.NormEntry, plan: normswap.Plan) -> Tensor:
    s = torch.ones(entry.channels).double()
    for layer, start, stop in entry.scaled_by:
        s[start:stop] = torch.tensor(plan.scales[layer]).double()
    return s


@pytest.mark.parametrize("batches", ["images", None])
@pytest.mark.parametrize(("build", "shape"), FREE.values(), ids=FREE)
def test_batch_norm_does_not_see_it(build: Callable[[], nn.Module], shape: tuple[int, ...], batches: str) -> None:
    model = trained(build())
    x = torch.randn(shape).double() + torch.randn(shape[0], *(1 for _ in shape[1:])).double()
    images = [x[:4], x[4:]] if batches == "images" else None
    plan = normswap.inspect(model, groups=1, batches=images, example_input=x[:2])
    assert [entry.not_equalized for entry in plan.norms] == [""]
    assert len(plan.scales) == 1
    scales = torch.tensor(next(iter(plan.scales.values())))
    assert (scales < 0).any() or batches == "images"
    torch.testing.assert_close(scaled_under_batch_norm(model, plan)(x), model(x), rtol=1e-10, atol=1e-10)
    again = normswap.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    converted = normswap.apply(model, plan)
    assert_same_state(normswap.apply(model, again), converted)
    if batches == "images":
        entry = plan.norms[0]
        assert entry.drift < entry.drift_before  # type: ignore[operator]
        apart = [
            (normswap.apply(model, p)(x) - model(x)).square().mean()
            for p in (plan, normswap.inspect(model, groups=1, shrink=4, equalize=False, example_input=x[:2]))
        ]
        assert apart[0] < apart[1]


@pytest.mark.parametrize(("build", "reason"), BOUND.values(), ids=BOUND)
def test_filters_that_are_not_free_stay(build: Callable[[], nn.Module], reason: str) -> None:
    model, x = trained(build()), torch.randn(SQUARE).double()
    plan = normswap.inspect(model, groups=1, batches=[x], example_input=x[:2])
    assert reason in plan.norms[0].not_equalized
    assert not plan.scales
    assert plan.norms[0].drift_before is not None


def test_it_is_left_out_where_it_is_not_asked_for() -> None:
    build, shape = FREE["conv"]
    model, x = trained(build()), torch.randn(shape).double()
    plan = normswap.inspect(model, groups=1, batches=[x], example_input=x[:2], equalize=False)
    assert (plan.norms[0].not_equalized, plan.scales) == ("not asked for", {})
    assert normswap.inspect(model, groups=1, example_input=x[:2], equalize=False).scales == {}


def test_a_norm_behind_the_standard_form_keeps_the_epsilon_of_the_statistics_it_will_meet() -> None:
    build, shape = FREE["conv"]
    model, x = trained(build()), torch.randn(shape).double()
    plain, seen = (
        normswap.inspect(model, groups=1, ws="standard", batches=b, example_input=x[:2]) for b in (None, [x])
    )
    assert plain.norms[0].eps == seen.norms[0].eps
    assert seen.norms[0].not_equalized == "the filters of layer are standardized without their scale"


def test_scales_of_another_network_are_refused() -> None:
    build, shape = FREE["conv"]
    model, x = trained(build()), torch.randn(shape).double()
    plan = normswap.inspect(model, groups=1, batches=[x], example_input=x[:2])
    data = plan.to_dict()
    data["scales"] = {"other": data["scales"]["layer"]}
    with pytest.raises(normswap.PlanMismatch, match="other: the plan scales 6 filters of it, Wired has no such layer"):
        normswap.apply(model, normswap.Plan.from_dict(data))
    for wrong, said in ((3, "scales cannot be 3"), ("AAA=", "cut off|padding|other than 0")):
        data["scales"] = {"layer": wrong}
        with pytest.raises(normswap.PlanMismatch, match=said):
            normswap.Plan.from_dict(data)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (4, 24, 20), (2, 64), (1, 12, 12, 12)], ids=str)
def test_made_up_inputs_equalize_networks_of_every_rank(shape: tuple[int, ...]) -> None:
    conv, norm = {2: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv2d, nn.BatchNorm2d), 4: (nn.Conv3d, nn.BatchNorm3d)}[
        len(shape)
    ]
    model = trained(nn.Sequential(conv(shape[0], 8, 3), norm(8))).float()
    before = torch.get_rng_state()
    plan = normswap.inspect(model, batches="synthetic", example_input=torch.zeros(2, *shape))
    assert torch.equal(torch.get_rng_state(), before)
    assert plan.scales
    assert normswap.inspect(model, batches="synthetic", example_input=torch.zeros(2, *shape)) == plan
    assert_same_state(
        normswap.apply(model, plan), normswap.convert(model, batches="synthetic", example_input=torch.zeros(2, *shape))
    )


def test_images_set_the_moments_too() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).float()
    x = torch.randn(64, 3, 9, 9) * torch.tensor([1.0, 3.0, 0.3]).view(1, 3, 1, 1)
    labels = torch.zeros(32, dtype=torch.long)
    converted = normswap.convert(model, batches=[[x[:32], labels], [x[32:], labels]], example_input=x[:2])
    torch.testing.assert_close(converted(x).mean((0, 2, 3)), model(x).mean((0, 2, 3)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(converted(x).std((0, 2, 3)), model(x).std((0, 2, 3)), rtol=0.02, atol=0.02)
    assert not any(module._forward_pre_hooks for module in model.modules())


WRONG = {
    "no images": ([], "batches= holds no images"),
    "a word": ("photos", "batches='photos' is neither batches of images nor 'synthetic'"),
}


@pytest.mark.parametrize(("batches", "said"), WRONG.values(), ids=WRONG)
def test_bad_batches_are_named(batches: object, said: str) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).float()
    with pytest.raises(normswap.InvalidOption, match=said):
        normswap.convert(model, batches=batches, example_input=torch.zeros(2, 3, 9, 9))  # type: ignore[arg-type]


def test_images_that_do_not_run_or_are_not_finite_are_named() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).float()
    x = torch.zeros(2, 3, 9, 9)
    with pytest.raises(normswap.NeedsExampleInput, match="no forward pass ran on the images .*; pass batches= as"):
        normswap.convert(model, batches=[torch.zeros(2, 5, 9, 9)], example_input=x)
    with pytest.raises(normswap.InvalidOption, match="batches= make 1 see NaN or infinity"):
        normswap.convert(model, batches=[x / 0], example_input=x)


def test_what_cannot_be_made_up_is_named() -> None:
    model = trained(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))).float()
    with pytest.raises(normswap.NeedsExampleInput, match="no inputs can be made up for Sequential"):
        normswap.convert(model, batches="synthetic", example_input=torch.zeros(2, 3))


@pytest.mark.parametrize(("groups", "warns"), [(32, True), (1, False), ("auto", False)])
def test_without_images_a_group_count_that_may_lose_much_is_told(groups: int | str, warns: bool) -> None:
    plan = normswap.inspect(digits_resnet(), groups=groups)
    lost = sum(entry.drift**2 for entry in plan.norms if entry.drift)
    told = [line for line in plan.warnings if "the groups asked for may lose much" in line]
    assert bool(told) == warns == (lost > 1)
    assert all(f"by {lost:.2g} in all" in line and "--groups auto" in line and line in str(plan) for line in told)


@pytest.mark.parametrize(("groups", "warns"), [(32, True), (1, False), ("auto", False)])
def test_a_group_count_that_loses_most_is_named_with_the_one_that_keeps_it(groups: int | str, warns: bool) -> None:
    images = load_digits()[0][:64]
    plan = normswap.inspect(digits_resnet(), groups=groups, batches=[images], example_input=images[:2])
    lost = sum(entry.drift**2 for entry in plan.norms if entry.drift)
    told = [line for line in plan.warnings if "the groups asked for lose much" in line]
    assert bool(told) == warns == (lost > 0.1)
    if warns:
        one = normswap.inspect(digits_resnet(), groups=1, shrink=4, batches=[images], example_input=images[:2])
        kept = sum(entry.drift**2 for entry in one.norms if entry.drift)
        assert f"by {lost:.2g} in all" in told[0]
        assert float(told[0].rsplit(" by ", 1)[1]) == pytest.approx(kept, rel=0.5)
        assert told[0] in str(plan)
