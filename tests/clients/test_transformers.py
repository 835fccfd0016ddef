"""Networks of transformers: save_pretrained, from_pretrained and Trainer with converted ones, and without normswap."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForSequenceClassification,
)

import normswap
from normswap.errors import CheckpointError
from normswap.layers.convs import WeightStandardized

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def resnet() -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(**SMALL, num_labels=4))


def regnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8}
    return RegNetForImageClassification(RegNetConfig(**sizes, num_labels=4))


def mobilenet() -> nn.Module:
    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, image_size=64, num_labels=4))


def detr() -> nn.Module:
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=ResNetConfig(**SMALL, out_features=["stage2"]), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=4,
    )  # fmt: skip
    return DetrForObjectDetection(config)


def rt_detr() -> nn.Module:
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[16, 16, 16], feat_strides=[8, 16, 32], encoder_hidden_dim=16,
        encoder_ffn_dim=16, d_model=16, num_queries=8, decoder_layers=1, decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16, decoder_attention_heads=2, encoder_attention_heads=2, num_denoising=0,
    )  # fmt: skip
    return RTDetrForObjectDetection(config)


def conformer() -> nn.Module:
    config = Wav2Vec2ConformerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(4, 4), conv_stride=(4, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, conv_depthwise_kernel_size=3, classifier_proj_size=8,
    )  # fmt: skip
    return Wav2Vec2ConformerForSequenceClassification(config)


BUILDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "resnet": (resnet, {"pixel_values": IMAGES}),
    "regnet": (regnet, {"pixel_values": IMAGES}),
    "mobilenet_v2": (mobilenet, {"pixel_values": IMAGES}),
    "detr": (detr, {"pixel_values": IMAGES}),
    "rt_detr": (rt_detr, {"pixel_values": IMAGES}),
    "wav2vec2-conformer": (conformer, {"input_values": IMAGES[:, 0, :, :].flatten(1)[:, :400]}),
}
ALL = pytest.mark.parametrize(("build", "inputs"), BUILDS.values(), ids=BUILDS)


def trained(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network whose norms hold statistics."""
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.1, 4)
    return model.eval()


def converted_resnet(**options: object) -> nn.Module:
    return normswap.convert(trained(resnet), example_input={"pixel_values": IMAGES}, **options)


def tensors(output: dict[str, object]) -> dict[str, Tensor]:
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}


def must_be_equal(ours: nn.Module, theirs: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        a, b = tensors(ours(**inputs)), tensors(theirs(**inputs))
    assert a
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@ALL
def test_from_pretrained_rebuilds_what_save_pretrained_wrote_bit_for_bit(
    build: Callable[[], nn.Module], inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    original = trained(build)
    converted = normswap.convert(original, example_input=inputs)
    assert getattr(original.config, "quantization_config", None) is None
    assert not hasattr(original, "hf_quantizer") or original.hf_quantizer is None
    converted.save_pretrained(tmp_path)
    again, found = type(original).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    kinds = [{name: type(m).__name__ for name, m in model.named_modules()} for model in (again, converted)]
    assert kinds[0] == kinds[1]
    assert any(isinstance(module, nn.GroupNorm) for module in again.modules())
    must_be_equal(again, converted, inputs)
    ours, theirs = again.state_dict(), converted.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert normswap.plan_of(again).changes == normswap.plan_of(converted).changes
    again.save_pretrained(tmp_path / "twice")
    must_be_equal(type(original).from_pretrained(tmp_path / "twice"), converted, inputs)


@ALL
def test_without_normswap_transformers_raises_rather_than_build_batch_norm(
    build: Callable[[], nn.Module], inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    converted = normswap.convert(trained(build), example_input=inputs)
    converted.save_pretrained(tmp_path)
    code = (
        f"import sys; from transformers import {type(converted).__name__} as Net\n"
        f"Net.from_pretrained({str(tmp_path)!r}); print('loaded', 'normswap' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "loaded" not in result.stdout
    assert "running_mean" in result.stdout + result.stderr
    assert "Unknown quantization type, got normswap" in result.stderr
    code = f"import normswap\n{code}"  # before transformers, which is how a script imports it
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["loaded", "True"], result.stderr


def test_importing_normswap_does_not_import_transformers() -> None:
    code = "import sys, normswap; normswap.convert; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("kind", [AutoModelForImageClassification, AutoModel, ResNetModel, ResNetBackbone])
def test_other_classes_of_the_family_load_it(kind: type, tmp_path: Path) -> None:
    converted = converted_resnet()
    converted.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    with torch.no_grad():
        if kind is AutoModelForImageClassification:
            must_be_equal(again, converted, {"pixel_values": IMAGES})
            return
        output = again(pixel_values=IMAGES)
        ours = output.feature_maps[-1] if kind is ResNetBackbone else output.last_hidden_state
        assert torch.equal(ours, converted.resnet(IMAGES).last_hidden_state)


def test_a_head_loads_the_body_that_was_converted_alone(tmp_path: Path) -> None:
    body = normswap.convert(trained(resnet).resnet, example_input={"pixel_values": IMAGES})
    body.save_pretrained(tmp_path)
    again = ResNetForImageClassification.from_pretrained(tmp_path, num_labels=7)
    with torch.no_grad():
        assert torch.equal(again.resnet(IMAGES).last_hidden_state, body(IMAGES).last_hidden_state)
    again.save_pretrained(tmp_path / "again")
    must_be_equal(ResNetForImageClassification.from_pretrained(tmp_path / "again"), again, {"pixel_values": IMAGES})


class Holder(nn.Module):
    """A network of one's own around one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 3, 1), trained(resnet)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x)).logits


def test_a_part_saves_itself_where_the_whole_was_converted(tmp_path: Path) -> None:
    whole = normswap.convert(Holder().eval(), example_input=IMAGES)
    whole.body.save_pretrained(tmp_path)
    must_be_equal(ResNetForImageClassification.from_pretrained(tmp_path), whole.body, {"pixel_values": IMAGES})


@pytest.mark.parametrize(
    "options",
    [{"ws": "none"}, {"ws": "standard"}, {"groups": "auto"}, {"exclude": "resnet.encoder"}, {"affine": "copy"}],
    ids=["no ws", "standard", "auto", "frozen norms", "copy"],
)
def test_options_come_back(options: dict[str, str], tmp_path: Path) -> None:
    converted = converted_resnet(**options)
    converted.save_pretrained(tmp_path)
    must_be_equal(ResNetForImageClassification.from_pretrained(tmp_path), converted, {"pixel_values": IMAGES})


def test_what_changed_after_conversion_is_written_as_it_is(tmp_path: Path) -> None:
    folded = normswap.fold(converted_resnet())
    folded.save_pretrained(tmp_path)
    again = ResNetForImageClassification.from_pretrained(tmp_path)
    assert not any(isinstance(module, WeightStandardized) for module in again.modules())
    must_be_equal(again, folded, {"pixel_values": IMAGES})
    folded.resnet.embedder.embedder.normalization = nn.Identity()
    with pytest.raises(CheckpointError, match=r"normalization: has become a Identity"):
        folded.save_pretrained(tmp_path)


def test_the_file_loads_as_a_state_dict(tmp_path: Path) -> None:
    converted = converted_resnet()
    converted.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert [name for name, value in state.items() if not value.numel()] == [
        "resnet.embedder.embedder.normalization.running_mean"
    ]
    again = converted_resnet()
    nn.init.zeros_(again.classifier[1].weight)
    again.load_state_dict(state, strict=True)
    must_be_equal(again, converted, {"pixel_values": IMAGES})
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "normswap"


def test_trainer_saves_and_reloads_the_best(tmp_path: Path) -> None:
    model = converted_resnet()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = [{"pixel_values": image, "labels": label % 4} for label, image in enumerate(IMAGES.repeat(4, 1, 1, 1))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=2, learning_rate=1e-3,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, report_to=[], use_cpu=True,
        disable_tqdm=True, save_total_limit=2,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert all(bool((p.detach() != before[name]).any()) for name, p in model.named_parameters())
    trainer.save_model(str(tmp_path / "final"))
    must_be_equal(
        ResNetForImageClassification.from_pretrained(tmp_path / "final"), model.eval(), {"pixel_values": IMAGES}
    )
    last = sorted(tmp_path.glob("checkpoint-*"))[-1]
    resumed = transformers.Trainer(
        ResNetForImageClassification.from_pretrained(last), arguments, train_dataset=data, eval_dataset=data
    )
    resumed.train(resume_from_checkpoint=str(last))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    converted = converted_resnet().to(dtype)
    converted.save_pretrained(tmp_path)
    again = ResNetForImageClassification.from_pretrained(tmp_path)
    assert again.dtype == dtype
    must_be_equal(again, converted, {"pixel_values": IMAGES.to(dtype)})
