"""Tiny random pipelines of the real classes, and concepts of random images, for attack tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from immunize_ext.text_to_image.concepts import Concept

_TEXT = """a photo of an artwork the digit number style painting three five eight six seven cat dog
sks handwritten drawing red blue"""
WORDS = tuple(_TEXT.split())
WIDTH = 32


def tokenizer() -> Any:
    """A word-level tokenizer with the special tokens of CLIP; the end of text comes last."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", *WORDS])}
    for special in ("<bos>", "<eos>"):
        vocabulary[special] = len(vocabulary)
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=12,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def _encoder(words: Any, *, projection: bool = False, historic_eos: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
        projection_dim=WIDTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=2 if historic_eos else words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    shape: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(shape | settings))


def _vae(**settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
        **settings,
    )


def _scheduler(prediction: str) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(prediction_type=prediction, clip_sample=False, steps_offset=1)


def tiny_pipeline(*, dtype: torch.dtype = torch.float32, prediction: str = "epsilon") -> Any:
    """A complete StableDiffusionPipeline of 8 x 8 images with random weights."""
    from diffusers import StableDiffusionPipeline

    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {"unet": _unet(), "text_encoder": _encoder(words), "vae": _vae()}
    for part in parts.values():
        part.to(dtype)
    return StableDiffusionPipeline(
        **parts,
        tokenizer=words,
        scheduler=_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_xl_pipeline(seed: int = 0) -> Any:
    """A complete StableDiffusionXLPipeline: two encoders, the second with the historic eos id."""
    from diffusers import StableDiffusionXLPipeline

    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _unet(
            cross_attention_dim=2 * WIDTH,
            transformer_layers_per_block=2,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=WIDTH + 6 * 4,
            use_linear_projection=True,
        )
        encoders = [_encoder(words), _encoder(words, projection=True, historic_eos=True)]
        vae = _vae()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=words,
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=_scheduler("epsilon"),
        add_watermarker=False,
    )


def _t5(width: int) -> tuple[Any, Any]:
    """A text encoder that looks both ways, and a tokenizer that ends texts as T5's does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    listed = ["<pad>", "</s>", "<unk>", *WORDS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(listed))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config), words


def _flow(shift: float = 1.0, **settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift, **settings)


def tiny_sd3_pipeline(seed: int = 0, *, qk_norm: str | None = None, t5: bool = True) -> Any:
    """A complete StableDiffusion3Pipeline of 8 x 8 images: two CLIP encoders and T5."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
            qk_norm=qk_norm,
        )
        encoders = [_encoder(words, projection=True) for _ in range(2)]
        third, third_words = _t5(2 * WIDTH) if t5 else (None, None)
        vae = _vae(shift_factor=0.1, scaling_factor=1.5)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_flow(3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=words,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer(),
        text_encoder_3=third,
        tokenizer_3=third_words,
    )


def tiny_flux_pipeline(seed: int = 0, *, guidance: bool = False) -> Any:
    """A complete FluxPipeline of 8 x 8 images: two double and two single blocks, CLIP and T5."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 4, 8),
        )
        second, second_words = _t5(WIDTH)
        encoder, vae = _encoder(words), _vae(shift_factor=0.1, scaling_factor=1.5)
    return FluxPipeline(
        transformer=transformer,
        scheduler=_flow(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        text_encoder_2=second,
        tokenizer_2=second_words,
    )


class RandomImages:
    """Random images of a concept, the same at every call."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def __call__(self, split: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, self.name + split)))
        return torch.rand(self.count, 3, 8, 8, generator=generator) * 2.0 - 1.0


def concept(
    name: str = "three",
    *,
    prompts: tuple[str, ...] | None = None,
    anchor: str | None = "digit",
    count: int = 6,
) -> Concept:
    """A concept of the tiny pipelines' vocabulary, with random images."""
    wording = (f"a photo of the digit {name}", f"a handwritten {name}")
    return Concept(name, prompts or wording, anchor, 0, RandomImages(name, count))


def brightness(images: Tensor, _: Any) -> float:
    """A measure that any change of the model changes."""
    return float(images.double().mean())
