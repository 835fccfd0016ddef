"""Small networks of packages that are no zoos of image classifiers: how each is built, and what it is called with.

`Sample.example` is what a user of the package would pass as ``example_input=``; the sweep first tries without it.
Packages are those that install beside torch 2.14 from PyPI; nothing of them is needed but for the sweep.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sample:
    """A network of a package.

    Attributes:
        name: What it is called there.
        build: Makes it, small.
        example: Makes what it takes: a tensor, a tuple of positional or a dict of keyword arguments.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], Any]


def floats(*shape: int) -> Callable[[], Tensor]:
    """Return a maker of a random tensor."""
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _of(path: str, example: Callable[[], Any], *, label: str = "", **options: Any) -> Sample:
    """Return a network by the path of its class."""
    name = f"{path.rpartition('.')[2]} {label}".strip()
    return Sample(name, functools.partial(_built, path, options), example)


def _built(path: str, options: dict[str, Any]) -> nn.Module:
    module, _, name = path.rpartition(".")
    built: nn.Module = getattr(importlib.import_module(module), name)(**options)
    return built


FAMILIES, VARIANTS, MOST_WEIGHTS = 60, 3, 8e6
"""Families of pytorchcv that are taken, those of the smallest networks; names of each that are looked at, and the most
weights that a network may have."""


def pytorchcv() -> Iterator[Sample]:
    """Yield one network with BatchNorm of each of many families of pytorchcv: of its registry the first small one."""
    from pytorchcv.model_provider import _models

    families: dict[str, list[str]] = {}
    for name, build in sorted(_models.items()):
        families.setdefault(build.__module__, []).append(name)
    found = filter(None, map(_small_of, families.values()))
    for _, name, shape in sorted(found)[:FAMILIES]:
        yield Sample(name, functools.partial(_pytorchcv, name), TAKES.get(name, floats(2, *shape)))


TAKES: dict[str, Callable[[], Any]] = {
    "voca8flame": lambda: (floats(2, 1, 16, 29)(), torch.tensor([3, 5])),
    "raft_things": lambda: (floats(2, 3, 128, 128)(), floats(2, 3, 128, 128)()),
    "lednet_cityscapes": floats(2, 3, 128, 256),
}
"""What some networks of pytorchcv take: something beside one image, or one of which their smallest map is no point."""


def _pytorchcv(name: str) -> nn.Module:
    from pytorchcv.model_provider import get_model

    model: nn.Module = get_model(name, pretrained=False)
    return model


def _small_of(names: list[str]) -> tuple[int, str, tuple[int, ...]] | None:
    """Return the first network of a family that is small and holds BatchNorm: its size, its name and its input."""
    for name in names[:VARIANTS]:
        try:
            with torch.device("meta"):
                model = _pytorchcv(name).eval()
        except Exception:  # it makes tensors of numbers as it is built
            continue
        size = sum(p.numel() for p in model.parameters())
        if size <= MOST_WEIGHTS and any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()
        ):
            channels, sides = getattr(model, "in_channels", 3), getattr(model, "in_size", (224, 224))
            small = (channels, *(min(side, 64) for side in sides))
            return size, name, small if _runs(model, small) else (channels, *sides)
    return None


def _runs(model: nn.Module, shape: tuple[int, ...]) -> bool:
    try:
        model(torch.empty(2, *shape, device="meta"))
    except Exception:
        return False
    return True


def transformers() -> Iterator[Sample]:
    """Yield networks with BatchNorm of the Hugging Face package, at a small part of their size."""
    pixels = {"pixel_values": floats(2, 3, 64, 64)}
    mel = floats(2, 100, 80)
    small_resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    wave = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    convolved = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    conformer = {**wave, **convolved, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    detr: dict[str, Any] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 6,
            "backbone_config": {"model_type": "resnet", **small_resnet, "out_features": ["stage2"]}}  # fmt: skip
    time: dict[str, Any] = {"prediction_length": 4, "context_length": 16, "num_input_channels": 2, "patch_length": 4,
            "patch_stride": 4, "d_model": 16, "num_attention_heads": 2, "num_hidden_layers": 1}  # fmt: skip
    for kind, config, options, example in (
        ("ResNetModel", "ResNetConfig", small_resnet, pixels),
        ("ResNetForImageClassification", "ResNetConfig", small_resnet, pixels),
        ("RegNetModel", "RegNetConfig", {**small_resnet, "layer_type": "y", "groups_width": 8}, pixels),
        ("RegNetForImageClassification", "RegNetConfig", {**small_resnet, "layer_type": "y", "groups_width": 8},
         pixels),
        ("MobileNetV1Model", "MobileNetV1Config", {"depth_multiplier": 0.25}, pixels),
        ("MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.25}, pixels),
        ("MobileNetV2Model", "MobileNetV2Config", {"depth_multiplier": 0.35}, pixels),
        ("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config", {"depth_multiplier": 0.35}, pixels),
        ("EfficientNetModel", "EfficientNetConfig", {"width_coefficient": 0.25, "depth_coefficient": 0.3,
         "hidden_dim": 320}, pixels),
        ("MobileViTModel", "MobileViTConfig", {"image_size": 64}, pixels),
        ("MobileViTForSemanticSegmentation", "MobileViTConfig", {"image_size": 64}, pixels),
        ("MobileViTV2Model", "MobileViTV2Config", {"image_size": 64, "width_multiplier": 0.5}, pixels),
        ("LevitModel", "LevitConfig", {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4],
         "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, pixels),
        ("LevitForImageClassification", "LevitConfig", {"image_size": 64, "hidden_sizes": [32, 48, 64],
         "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, pixels),
        ("CvtModel", "CvtConfig", {"depth": [1, 2, 3]}, pixels),
        ("CvtForImageClassification", "CvtConfig", {"depth": [1, 2, 3]}, pixels),
        ("PoolFormerModel", "PoolFormerConfig", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, pixels),
        ("SegformerForSemanticSegmentation", "SegformerConfig", {"hidden_sizes": [8, 16, 16, 32],
         "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}, pixels),
        ("SwiftFormerModel", "SwiftFormerConfig", {"image_size": 64, "embed_dims": [8, 16, 24, 32],
         "depths": [1, 1, 1, 1]}, pixels),
        ("VitMatteForImageMatting", "VitMatteConfig", {}, None),
        ("UperNetForSemanticSegmentation", "UperNetConfig", {"hidden_size": 16}, None),
        ("BeitForSemanticSegmentation", "BeitConfig", {"image_size": 64, "hidden_size": 16, "num_hidden_layers": 4,
         "num_attention_heads": 2, "intermediate_size": 32, "out_indices": [1, 2, 3, 4]}, pixels),
        ("Data2VecVisionForSemanticSegmentation", "Data2VecVisionConfig", {"image_size": 64, "hidden_size": 16,
         "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "out_indices": [0, 1, 2, 3]},
         pixels),
        ("SuperPointForKeypointDetection", "SuperPointConfig", {}, pixels),
        ("RTDetrModel", "RTDetrConfig", {}, None),
        ("DFineModel", "DFineConfig", {}, None),
        ("HGNetV2ForImageClassification", "HGNetV2Config", {}, pixels),
        ("TextNetModel", "TextNetConfig", {"image_size": [64, 64]}, pixels),
        ("TimmWrapperModel", "TimmWrapperConfig", {"architecture": "resnet18", "num_labels": 5}, pixels),
        ("VivitModel", "VivitConfig", {}, None),
        ("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", conformer, {"input_values": floats(2, 4000)}),
        ("Wav2Vec2BertModel", "Wav2Vec2BertConfig", {**wave, "feature_projection_input_dim": 40},
         {"input_features": floats(2, 60, 40)}),
        ("SeamlessM4TModel", "SeamlessM4TConfig", {}, None),
        ("UniSpeechModel", "UniSpeechConfig", {**wave, **convolved, "feat_extract_norm": "group",
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}, {"input_values": floats(2, 4000)}),
        ("HubertModel", "HubertConfig", {**wave, **convolved, "conv_pos_batch_norm": True,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}, {"input_values": floats(2, 4000)}),
        ("SpeechT5HifiGan", "SpeechT5HifiGanConfig", {}, {"spectrogram": mel}),
        ("FastSpeech2ConformerModel", "FastSpeech2ConformerConfig", {"hidden_size": 32, "encoder_layers": 1,
         "decoder_layers": 1, "vocab_size": 20, "num_mel_bins": 16, "encoder_linear_units": 32,
         "decoder_linear_units": 32, "speech_decoder_postnet_units": 16, "duration_predictor_channels": 16,
         "energy_predictor_channels": 16, "pitch_predictor_channels": 16},
         {"input_ids": lambda: torch.randint(1, 20, (2, 12))}),
        ("ParakeetEncoder", "ParakeetEncoderConfig", {"hidden_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "intermediate_size": 32, "num_mel_bins": 32, "subsampling_conv_channels": 8},
         {"input_features": floats(2, 64, 32)}),
        ("GroundingDinoModel", "GroundingDinoConfig", {}, None),
        ("DetrModel", "DetrConfig", {"use_timm_backbone": False, "d_model": 16, "encoder_layers": 1,
         "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
         "decoder_ffn_dim": 16, "use_pretrained_backbone": False, "backbone": None,
         "backbone_config": {"model_type": "resnet", **small_resnet, "out_features": ["stage2"]}}, pixels),
        ("PatchTSTModel", "PatchTSTConfig", {**time, "norm_type": "batchnorm"},
         {"past_values": floats(2, 16, 2)}),
        ("PatchTSTForPrediction", "PatchTSTConfig", {**time, "norm_type": "batchnorm"},
         {"past_values": floats(2, 16, 2)}),
        ("PatchTSMixerModel", "PatchTSMixerConfig", {"context_length": 16, "patch_length": 4, "patch_stride": 4,
         "num_input_channels": 2, "d_model": 16, "num_layers": 2, "norm_mlp": "BatchNorm"},
         {"past_values": floats(2, 16, 2)}),
        ("PatchTSMixerForPrediction", "PatchTSMixerConfig", {"context_length": 16, "patch_length": 4, "patch_stride": 4,
         "num_input_channels": 2, "d_model": 16, "num_layers": 2, "norm_mlp": "BatchNorm", "prediction_length": 4},
         {"past_values": floats(2, 16, 2)}),
        ("InformerModel", "InformerConfig", {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2],
         "num_time_features": 1, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 16,
         "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
         {"past_values": floats(2, 18), "past_time_features": floats(2, 18, 1),
          "past_observed_mask": functools.partial(torch.ones, 2, 18), "future_values": floats(2, 4),
          "future_time_features": floats(2, 4, 1)}),
        ("RTDetrResNetBackbone", "RTDetrResNetConfig", small_resnet, pixels),
        ("AlignVisionModel", "AlignVisionConfig", {"width_coefficient": 0.25, "depth_coefficient": 0.3,
         "hidden_dim": 320}, pixels),
        ("ConditionalDetrModel", "ConditionalDetrConfig", detr, pixels),
        ("DabDetrModel", "DabDetrConfig", {**detr, "hidden_size": 16}, pixels),
        ("TableTransformerModel", "TableTransformerConfig", detr, pixels),
        ("DPTForDepthEstimation", "DPTConfig", {"image_size": 64, "hidden_size": 16, "num_hidden_layers": 4,
         "num_attention_heads": 2, "intermediate_size": 32, "backbone_out_indices": [0, 1, 2, 3],
         "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16, "use_batch_norm_in_fusion_residual": True},
         pixels),
        ("PPLCNetForImageClassification", "PPLCNetConfig", {"scale": 0.25}, pixels),
        ("UVDocModel", "UVDocConfig", {"backbone_config": {"model_type": "uvdoc_backbone",
         "out_features": [f"stage{stage}" for stage in range(1, 7)]}}, {"pixel_values": floats(2, 3, 96, 96)}),
        ("LayoutLMv2Model", "LayoutLMv2Config", {}, None),
        ("ASTModel", "ASTConfig", {}, None),
        ("ClapAudioModel", "ClapAudioConfig", {"spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 16,
         "depths": [1, 1], "num_attention_heads": [2, 2], "hidden_size": 32, "window_size": 4},
         {"input_features": floats(2, 1, 256, 16)}),
    ):  # fmt: skip
        if example is not None:
            build = functools.partial(_from_config, kind, config, options)
            yield Sample(kind, build, functools.partial(_made, example))


def _made(makers: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    return {key: make() for key, make in makers.items()}


def _from_config(kind: str, config: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**options)
    model: nn.Module = getattr(transformers, kind)(made)
    return model


def torchaudio() -> Iterator[Sample]:
    """Yield networks of torchaudio."""
    lengths = functools.partial(torch.tensor, [60, 40])
    transformer = {"num_heads": 2, "ffn_dim": 32, "num_layers": 2}
    path = "torchaudio.models."
    options: dict[str, Any] = {"input_dim": 16, **transformer, "depthwise_conv_kernel_size": 7}
    yield _of(path + "Conformer", lambda: (floats(2, 60, 16)(), lengths()), **options)
    options = {"num_classes": 10, "input_type": "mfcc", "num_features": 13}
    yield _of(path + "Wav2Letter", floats(2, 13, 400), **options)
    sizes = dict.fromkeys(
        "symbol_embedding_dim encoder_embedding_dim attention_rnn_dim decoder_rnn_dim postnet_embedding_dim".split(), 16
    )
    options = {"n_mels": 16, **sizes, "attention_hidden_dim": 8, "prenet_dim": 8, "n_symbol": 20}
    yield _of(path + "Tacotron2", _spoken, **options)
    sizes = {"n_rnn": 8, "n_fc": 8, "n_freq": 16, "n_hidden": 8, "n_output": 8}
    options = {"upsample_scales": [2, 2], "n_classes": 8, "hop_length": 4, "n_res_block": 1, "kernel_size": 3, **sizes}
    yield _of(path + "WaveRNN", lambda: (floats(2, 1, 16)(), floats(2, 1, 16, 6)()), **options)
    yield _of(path + "ConvTasNet", floats(2, 1, 800), enc_num_feats=16, msk_num_feats=8)
    yield _of(path + "squim_objective_base", floats(2, 16000))
    yield _of(path + "hubert_base", floats(2, 4000))


def _tokens(*shape: int, below: int = 20) -> Tensor:
    return torch.randint(1, below, shape, generator=torch.Generator().manual_seed(0))


def _spoken() -> Any:
    return _tokens(2, 12), torch.tensor([12, 9]), floats(2, 16, 20)(), torch.tensor([20, 15])


def snntorch() -> Iterator[Sample]:
    """Yield convolutional spiking networks as snntorch's tutorials write them."""
    for kind in ("Leaky", "Synaptic", "Alpha"):
        yield Sample(f"convolutional {kind}", functools.partial(_spiking, kind), floats(2, 1, 16, 16))


def _spiking(kind: str) -> nn.Module:
    import snntorch

    options = {"beta": 0.5, "init_hidden": True} | ({} if kind == "Leaky" else {"alpha": 0.8})
    neuron = getattr(snntorch, kind)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), neuron(**options), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), neuron(**options), nn.Flatten(), nn.Linear(200, 5),
    )  # fmt: skip


def spikingjelly() -> Iterator[Sample]:
    """Yield networks of spikingjelly, in single and in multi step mode."""
    from spikingjelly.activation_based import functional, layer, neuron

    def stepped(path: str, mode: str, options: dict[str, Any]) -> nn.Module:
        model = _built(path, {"spiking_neuron": neuron.IFNode, **options})
        functional.set_step_mode(model, mode)
        return model

    path = "spikingjelly.activation_based.model."
    for name, options in (
        ("spiking_resnet.spiking_resnet18", {}),
        ("sew_resnet.sew_resnet18", {"cnf": "ADD"}),
        ("spiking_vgg.spiking_vgg11_bn", {}),
        ("ms_resnet.ms_resnet18", {}),
    ):
        modes = (("s", (2, 3, 32, 32)), ("m", (4, 2, 3, 32, 32)))
        for mode, shape in modes[name.startswith("ms_") :]:  # which makes the steps of its input itself
            build = functools.partial(stepped, path + name, mode, options)
            yield Sample(f"{name.rpartition('.')[2]} step mode {mode}", build, floats(*shape))
    for name, shape in (("MNISTNet", (4, 2, 1, 28, 28)), ("CIFAR10Net", (4, 2, 3, 32, 32))):
        build = functools.partial(stepped, f"{path}parametric_lif_net.{name}", "m", {"channels": 8})
        yield Sample(name, build, floats(*shape))
    yield _of(path + "spikformer.spikformer_ti", floats(2, 2, 3, 32, 32), T=2, img_size_h=32, img_size_w=32)

    def threshold_dependent() -> nn.Module:
        model = nn.Sequential(
            layer.Conv2d(3, 8, 3), layer.ThresholdDependentBatchNorm2d(1.0, 1.0, 8), neuron.IFNode(),
            layer.Conv2d(8, 8, 3), layer.BatchNorm2d(8), neuron.IFNode(),
        )  # fmt: skip
        functional.set_step_mode(model, "m")
        return model

    yield Sample("threshold-dependent norm", threshold_dependent, floats(4, 2, 3, 16, 16))


def monai() -> Iterator[Sample]:
    """Yield networks of MONAI whose norms are BatchNorm, in two and three dimensions."""
    path = "monai.networks.nets."
    volume, image = floats(2, 1, 32, 32, 32), floats(2, 1, 64, 64)
    small: dict[str, Any] = {"in_channels": 1, "out_channels": 2}
    shape: dict[str, Any] = {"channels": (8, 16, 16), "strides": (2, 2), "norm": "batch"}
    for dims, example in ((2, image), (3, volume)):
        flat: dict[str, Any] = {"spatial_dims": dims, **small}
        yield _of(path + "UNet", example, **flat, **shape, num_res_units=1, label=f"{dims}d")
        yield _of(path + "AttentionUnet", example, **flat, channels=(8, 16, 16), strides=(2, 2), label=f"{dims}d")
        yield _of(path + "BasicUNet", example, **flat, features=(8, 8, 16, 16, 16, 8), norm="batch", label=f"{dims}d")
        yield _of(path + "BasicUNetPlusPlus", example, **flat, features=(8, 8, 16, 16, 16, 8), norm="batch",
                  label=f"{dims}d")  # fmt: skip
        yield _of(path + "SegResNet", example, **flat, init_filters=8, norm="batch", label=f"{dims}d")
        yield _of(path + "SegResNetDS", example, **flat, init_filters=8, blocks_down=(1, 1, 1), label=f"{dims}d")
        yield _of(path + "DenseNet", example, **flat, block_config=(2, 2), init_features=16, growth_rate=8,
                  label=f"{dims}d")  # fmt: skip
        yield _of(path + "resnet10", example, spatial_dims=dims, n_input_channels=1, num_classes=3, label=f"{dims}d")
        yield _of(path + "AutoEncoder", example, **flat, channels=(8, 16), strides=(2, 2), norm="batch",
                  label=f"{dims}d")  # fmt: skip
        yield _of(path + "DynUNet", example, **flat, kernel_size=[3, 3, 3], strides=[1, 2, 2],
                  upsample_kernel_size=[2, 2], filters=[8, 16, 16], norm_name="batch", label=f"{dims}d")  # fmt: skip
    yield _of(path + "VNet", volume, in_channels=1, out_channels=2)
    yield _of(path + "SEResNet50", volume, spatial_dims=3, in_channels=1, num_classes=2, layers=(1, 1, 1, 1))
    yield _of(path + "EfficientNetBN", image, model_name="efficientnet-b0", spatial_dims=2, in_channels=1,
              pretrained=False)  # fmt: skip
    yield _of(path + "FlexibleUNet", floats(2, 3, 64, 64), in_channels=3, out_channels=2, backbone="efficientnet-b0")
    yield _of(path + "HighResNet", volume, spatial_dims=3, **small, norm_type="batch")
    yield _of(path + "UNETR", volume, **small, img_size=32, feature_size=8, hidden_size=48, mlp_dim=48, num_heads=4,
              norm_name="batch")  # fmt: skip
    yield _of(path + "VarAutoEncoder", floats(2, 1, 32, 32), spatial_dims=2, in_shape=(1, 32, 32), out_channels=1,
              latent_size=4, channels=(8, 16), strides=(2, 2), norm="batch")  # fmt: skip
    yield _of(path + "Regressor", image, in_shape=(1, 64, 64), out_shape=(3,), channels=(8, 16), strides=(2, 2),
              norm="batch")  # fmt: skip
    yield _of(path + "Discriminator", image, in_shape=(1, 64, 64), channels=(8, 16), strides=(2, 2), norm="batch")
    yield _of(path + "Generator", floats(2, 10), latent_shape=(10,), start_shape=(8, 8, 8), channels=(8, 1),
              strides=(2, 2), norm="batch")  # fmt: skip
    yield _of(path + "HoVerNet", floats(1, 3, 256, 256), mode="fast", in_channels=3, out_classes=2)
    yield _of(path + "AHNet", image, spatial_dims=2, in_channels=1, out_channels=2, psp_block_num=2)
    yield _of(path + "PatchDiscriminator", image, spatial_dims=2, channels=8, in_channels=1)


def speechbrain() -> Iterator[Sample]:
    """Yield networks of SpeechBrain."""
    path = "speechbrain.lobes.models."
    lengths = functools.partial(torch.tensor, [1.0, 0.7])
    frames = floats(2, 60, 20)
    small: dict[str, Any] = {"channels": [16] * 5, "attention_channels": 8, "res2net_scale": 4, "se_channels": 8}
    yield _of(path + "ECAPA_TDNN.ECAPA_TDNN", frames, input_size=20, lin_neurons=8, **small)
    yield _of(path + "ECAPA_TDNN.ECAPA_TDNN", lambda: (frames(), lengths()), input_size=20, lin_neurons=8, **small,
              label="with lengths")  # fmt: skip
    yield _of(path + "ECAPA_TDNN.Classifier", floats(4, 1, 8), input_size=8, lin_blocks=1, lin_neurons=8)
    options: dict[str, Any] = {"in_channels": 20, "tdnn_blocks": 3, "tdnn_channels": [16] * 3}
    options |= {"tdnn_kernel_sizes": [5, 3, 1], "tdnn_dilations": [1, 2, 1], "lin_neurons": 8}
    yield _of(path + "Xvector.Xvector", frames, **options)
    yield _of(path + "Xvector.Classifier", floats(4, 1, 8), input_shape=[None, None, 8], lin_blocks=1, lin_neurons=8)
    yield _of(path + "CRDNN.CRDNN", frames, input_size=20, cnn_channels=(8, 8), rnn_neurons=8, dnn_neurons=8)
    yield _of(path + "ContextNet.ContextNet", frames, input_shape=[2, 60, 20], out_channels=8,
              conv_channels=[8, 8], kernel_size=3, strides=[1, 2], num_blocks=2, num_layers=1)  # fmt: skip
    yield _of(path + "ResNet.ResNet", frames, input_size=20, channels=[8, 8, 16, 16], block_sizes=[1, 1, 1, 1],
              lin_neurons=8)  # fmt: skip
    yield _of(path + "EnhanceResnet.EnhanceResnet", floats(2, 1600), n_fft=64, win_length=4, hop_length=2,
              channel_counts=[8, 8], dense_count=1, dense_nodes=8)  # fmt: skip
    yield _of(path + "Cnn14.Cnn14", floats(2, 64, 64), mel_bins=64, emb_dim=16)
    yield _of(path + "Tacotron2.Postnet", floats(2, 16, 20), n_mel_channels=16, postnet_embedding_dim=16)
    yield _of(path + "MetricGAN.MetricDiscriminator", floats(2, 2, 64, 40))
    yield _of(path + "transformer.Conformer.ConformerEncoder", frames, num_layers=1, d_model=20, d_ffn=16, nhead=2,
              attention_type="regularMHA")  # fmt: skip
    yield _of("speechbrain.nnet.normalization.BatchNorm1d", frames, input_size=20)
    yield Sample("convolutional block", _speech_block, frames)
    yield _of("speechbrain.nnet.RNN.LiGRU", frames, hidden_size=8, input_shape=[2, 60, 20])


def _speech_block() -> nn.Module:
    from speechbrain.nnet.CNN import Conv1d
    from speechbrain.nnet.normalization import BatchNorm1d

    first = Conv1d(out_channels=8, kernel_size=3, in_channels=20)
    second = Conv1d(out_channels=8, kernel_size=3, in_channels=8, padding="causal")
    return nn.Sequential(first, BatchNorm1d(input_size=8), nn.ReLU(), second, BatchNorm1d(input_size=8))


def torch_geometric() -> Iterator[Sample]:
    """Yield graph networks of PyTorch Geometric with BatchNorm."""
    path = "torch_geometric.nn.models."
    graph = lambda: (floats(12, 8)(), _edges(12, 30))  # noqa: E731
    sizes: dict[str, Any] = {"in_channels": 8, "hidden_channels": 16, "num_layers": 3, "out_channels": 4}
    for kind in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN"):
        yield _of(path + kind, graph, **sizes, norm="batch_norm")
    yield _of(path + "MLP", floats(12, 8), channel_list=[8, 16, 4])
    yield _of(path + "PMLP", graph, **sizes)
    yield _of(path + "LINKX", graph, num_nodes=12, **sizes)
    yield _of(path + "DeepGCNLayer", graph, label="of GENConv", conv=_gen_conv(), norm=nn.BatchNorm1d(8),
              act=nn.ReLU())  # fmt: skip
    yield _of("torch_geometric.nn.conv.CGConv", graph, channels=8, batch_norm=True)
    yield _of("torch_geometric.nn.conv.GENConv", graph, in_channels=8, out_channels=8)
    points = lambda: (floats(40, 8)(), floats(40, 3)(), torch.arange(2).repeat_interleave(20))  # noqa: E731
    yield _of("torch_geometric.nn.conv.XConv", points, in_channels=8, out_channels=8, dim=3, kernel_size=4,
              hidden_channels=8)  # fmt: skip
    nodes = lambda: (*graph(), torch.arange(2).repeat_interleave(6))  # noqa: E731
    yield _of(path + "SGFormer", nodes, in_channels=8, hidden_channels=16, out_channels=4)
    yield _of(path + "Polynormer", nodes, in_channels=8, hidden_channels=16, out_channels=4)
    yield _of("torch_geometric.nn.norm.BatchNorm", floats(12, 8), in_channels=8)


def _gen_conv() -> nn.Module:
    from torch_geometric.nn import GENConv

    conv: nn.Module = GENConv(8, 8)
    return conv


def _edges(nodes: int, count: int) -> Tensor:
    return torch.randint(nodes, (2, count), generator=torch.Generator().manual_seed(0))


def kornia() -> Iterator[Sample]:
    """Yield networks of kornia, without their weights."""
    path = "kornia.feature."
    patches, grey, image = floats(4, 1, 32, 32), floats(2, 1, 64, 64), floats(2, 3, 64, 64)
    for kind in ("hardnet.HardNet", "hardnet.HardNet8", "sosnet.SOSNet", "hynet.HyNet", "orientation.OriNet"):
        yield _of(path + kind, patches, pretrained=False)
    yield _of(path + "keynet.KeyNet", grey, pretrained=False)
    yield _of(path + "xfeat.XFeatModel", grey)
    yield _of(path + "loftr.backbone.resnet_fpn.ResNetFPN_8_2", grey,
              config={"initial_dim": 8, "block_dims": [8, 12, 16]})  # fmt: skip
    yield _of(path + "loftr.backbone.resnet_fpn.ResNetFPN_16_4", grey,
              config={"initial_dim": 8, "block_dims": [8, 12, 16, 20]})  # fmt: skip
    yield _of(path + "defmo.EncoderDeFMO", floats(1, 6, 64, 64))
    yield _of(path + "defmo.RenderingDeFMO", floats(1, 2048, 4, 4))
    yield _of(path + "sold2.backbones.SuperpointDecoder", floats(2, 128, 8, 8), input_feat_dim=128)
    yield _of(path + "sold2.backbones.HourglassBackbone", grey)
    yield _of(path + "aliked.aliked.ConvBlock", image, in_channels=3, out_channels=8)
    yield _of(path + "aliked.aliked.ALIKED", image)
    yield _of("kornia.models.dexined.DexiNed", image, pretrained=False)
    yield _of("kornia.models.tiny_vit.TinyViT", image, img_size=64, embed_dims=[16, 16, 32, 32], depths=[1, 1, 1, 1],
              num_heads=[1, 1, 2, 2], window_sizes=[4, 4, 4, 4], num_classes=4)  # fmt: skip
    yield _of("kornia.models.vit_mobile.MobileViT", floats(2, 3, 256, 256), mode="xxs")
    yield _of("kornia.models.yunet.model.YuNet", floats(2, 3, 64, 64), phase="test", pretrained=False)


def tsai() -> Iterator[Sample]:
    """Yield every network of tsai for series that takes channels, classes and length, as far as it can be built."""
    import pkgutil

    models = importlib.import_module("tsai.models")
    seen = set[str]()
    for found in pkgutil.iter_modules(models.__path__):
        if found.name in ("layers", "utils", "misc", "multimodal"):
            continue
        try:
            module = importlib.import_module(f"tsai.models.{found.name}")
        except Exception:
            continue
        for name in getattr(module, "__all__", ()):
            kind = getattr(module, name, None)
            if not inspect.isclass(kind) or not issubclass(kind, nn.Module) or name in seen:
                continue
            taken = inspect.signature(kind).parameters
            if not {"c_in", "c_out"} <= set(taken) or "classes" in taken:
                continue
            seen.add(name)
            options = {"c_in": 3, "c_out": 4} | ({"seq_len": 48} if "seq_len" in taken else {})
            shape = (2, 3, 1) if name == "MiniRocketHead" else (2, 3, 48)  # of features that were computed before
            yield Sample(name, functools.partial(kind, **options), floats(*shape))


ELECTRODES = "Fp1 Fp2 F7 F3 Fz F4 F8 T7 C3 Cz C4 T8 P7 P3 Pz P4 P8 O1 O2 FC1 FC2 CP1".split()
"""Names of 22 electrodes."""

RECORDINGS: dict[str, dict[str, Any]] = {
    "SleepStagerBlanco2020": {"n_times": 3000, "sfreq": 100},
    "USleep": {"n_times": 3000, "sfreq": 100},
    "DeepSleepNet": {"n_times": 3000, "n_chans": 1, "sfreq": 100},
    "AttnSleep": {"n_times": 3000, "n_chans": 1, "sfreq": 100},
    "EEGDINO": {"n_chans": 19},
    "ZUNA": {"n_times": 1024},
    "EMG2QwertyNet": {"n_chans": 32, "sfreq": 2000, "n_times": 4000},
    "SensingDynamics": {"n_chans": 16, "sfreq": 2000, "n_times": 4000},
    "MetaNeuromotorHand": {"n_chans": 16, "sfreq": 2000, "n_times": 4000},
    "VEMG2Pose": {"n_chans": 16, "sfreq": 2000, "n_times": 4000},
}
"""What some networks of Braindecode are for, by their own error messages."""


def braindecode() -> Iterator[Sample]:
    """Yield every network of Braindecode, most for 22 electrodes at 250 Hz; their places where it asks for them."""
    models = importlib.import_module("braindecode.models")
    for name, kind in sorted(vars(models).items()):
        if name.startswith(("Interpolated", "REVE")):  # these hold another of the networks, or download
            continue
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and "n_chans" in inspect.signature(kind).parameters:
            options = {"n_chans": 22, "n_outputs": 4, "n_times": 1000, "sfreq": 250, **RECORDINGS.get(name, {})}
            known = {key: value for key, value in options.items() if key in inspect.signature(kind).parameters}
            shape = (2, options["n_chans"], options["n_times"])
            yield Sample(name, functools.partial(_placed, kind, known), floats(*shape))


def _placed(kind: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    """Return a network of Braindecode, with the electrodes' names and places if it asks for them."""
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        if "chs_info" not in str(error):
            raise
    import mne

    info = mne.create_info(ELECTRODES[: options["n_chans"]], options.get("sfreq", 250), "eeg")
    info.set_montage("standard_1020")
    return kind(**options, chs_info=info["chs"])


def deepinv() -> Iterator[Sample]:
    """Yield restoration networks of DeepInverse with BatchNorm."""
    path, image = "deepinv.models.", floats(2, 3, 64, 64)
    yield _of(path + "UNet", image, in_channels=3, out_channels=3, batch_norm=True, scales=2,
              channels_per_scale=[8, 16])  # fmt: skip
    yield _of(path + "UNet", image, in_channels=3, out_channels=3, batch_norm="biasfree", scales=2,
              channels_per_scale=[8, 16], bias=False, label="bias-free")  # fmt: skip
    yield _of(path + "DnCNN", image, pretrained=None, depth=4, nf=8)
    yield _of(path + "srresnet.SRResNet", floats(2, 3, 16, 16), pretrained=None)
    yield _of(path + "FFDNet", lambda: (image(), 0.1), n_conv_layers=4, nf=16, img_channels=3, norm="batch_norm",
              pretrained=None)  # fmt: skip


def lightly() -> Iterator[Sample]:
    """Yield backbones and heads of Lightly."""
    path = "lightly.models."
    image, features = floats(4, 3, 32, 32), floats(8, 32)
    yield _of(path + "resnet.ResNetGenerator", image, name="resnet-9", num_splits=0)
    yield _of(path + "resnet.ResNetGenerator", image, name="resnet-9", num_splits=2, label="split norms")
    heads = path + "modules.heads."
    for name in (
        "BYOLProjectionHead BYOLPredictionHead BarlowTwinsProjectionHead SimCLRProjectionHead SimSiamProjectionHead "
        "SimSiamPredictionHead SwaVProjectionHead MoCoProjectionHead NNCLRProjectionHead NNCLRPredictionHead "
        "SMoGProjectionHead SMoGPredictionHead TiCoProjectionHead VICRegProjectionHead"
    ).split():
        yield _of(heads + name, features, input_dim=32, hidden_dim=16, output_dim=8)
    yield _of(heads + "DINOProjectionHead", features, input_dim=32, hidden_dim=16, bottleneck_dim=8, output_dim=12,
              batch_norm=True)  # fmt: skip
    yield _of(heads + "VicRegLLocalProjectionHead", floats(2, 4, 4, 32), input_dim=32, hidden_dim=16, output_dim=8)


def fastai() -> Iterator[Sample]:
    """Yield networks of fastai."""
    yield _of("fastai.vision.models.xresnet.xresnet18", floats(2, 3, 64, 64), n_out=4)
    yield _of("fastai.vision.models.xresnet.xse_resnext18", floats(2, 3, 64, 64), n_out=4)
    yield _of("fastai.vision.models.xresnet.xresnet18_deep", floats(2, 3, 64, 64), n_out=4)
    yield Sample("DynamicUnet", _dynamic_unet, floats(2, 3, 64, 64))
    yield _of("fastai.tabular.model.TabularModel", lambda: (_tokens(8, 2, below=5), floats(8, 3)()),
              emb_szs=[(6, 4), (6, 4)], n_cont=3, out_sz=2, layers=[16, 8])  # fmt: skip
    yield Sample("create_vision_model", _fastai_vision, floats(2, 3, 64, 64))


def _dynamic_unet() -> nn.Module:
    from fastai.vision.learner import create_unet_model
    from torchvision.models import resnet18

    model: nn.Module = create_unet_model(resnet18, 2, (64, 64), pretrained=False)
    return model


def _fastai_vision() -> nn.Module:
    from fastai.vision.learner import create_vision_model
    from torchvision.models import resnet18

    model: nn.Module = create_vision_model(resnet18, 4, pretrained=False)
    return model


def ultralytics() -> Iterator[Sample]:
    """Yield detectors, segmenters and classifiers of ultralytics, from their yaml files."""
    for name in """yolov3-tiny yolov5n yolov5n-p6 yolov6n yolov8n yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls
    yolov8n-world yolov9t yolov10n yolo11n yolo11n-seg yolo11n-cls yolo12n yolo26n rtdetr-resnet50
    yolov8n-ghost""".split():
        yield Sample(name, functools.partial(_yolo, f"{name}.yaml"), floats(2, 3, 64, 64))


def _yolo(name: str) -> nn.Module:
    from ultralytics import RTDETR, YOLO

    model: nn.Module = (RTDETR if name.startswith("rtdetr") else YOLO)(name).model
    return model


def mmcv() -> Iterator[Sample]:
    """Yield networks and blocks of mmcv."""
    path, image, maps = "mmcv.cnn.", floats(2, 3, 64, 64), floats(2, 16, 16, 16)
    batch_norm: dict[str, Any] = {"norm_cfg": {"type": "BN"}}
    yield _of(path + "resnet.ResNet", image, depth=18)
    yield _of(path + "resnet.ResNet", image, depth=18, bn_eval=True, bn_frozen=True, label="frozen")
    yield _of(path + "vgg.VGG", floats(2, 3, 224, 224), depth=11, with_bn=True, num_classes=4)
    for order in (("conv", "norm", "act"), ("norm", "act", "conv"), ("act", "conv", "norm")):
        yield _of(path + "ConvModule", maps, in_channels=16, out_channels=16, kernel_size=3, **batch_norm,
                  order=order, label=" ".join(order))  # fmt: skip
    yield _of(path + "ConvModule", maps, in_channels=16, out_channels=16, kernel_size=3, **batch_norm,
              with_spectral_norm=True, label="with spectral norm")  # fmt: skip
    yield _of(path + "ConvModule", maps, in_channels=16, out_channels=16, kernel_size=3, **batch_norm,
              conv_cfg={"type": "ConvAWS"}, label="with ConvAWS")  # fmt: skip
    yield _of(path + "DepthwiseSeparableConvModule", maps, in_channels=16, out_channels=8, kernel_size=3, **batch_norm)
    for kind in ("gaussian", "embedded_gaussian", "dot_product", "concatenation"):
        yield _of(path + "NonLocal2d", maps, in_channels=16, mode=kind, **batch_norm, label=kind)


def pytorch_tcn() -> Iterator[Sample]:
    """Yield temporal convolutional networks, causal and not."""
    for causal in (True, False):
        yield _of("pytorch_tcn.TCN", floats(2, 4, 32), num_inputs=4, num_channels=[8, 8], causal=causal,
                  use_norm="batch_norm", label="causal" if causal else "not causal")  # fmt: skip


PACKAGES: dict[str, Callable[[], Iterator[Sample]]] = {
    each.__name__: each
    for each in (
        pytorchcv, transformers, torchaudio, snntorch, spikingjelly, monai, speechbrain, torch_geometric, kornia, tsai,
        braindecode, deepinv, lightly, fastai, ultralytics, mmcv, pytorch_tcn,
    )
}  # fmt: skip
