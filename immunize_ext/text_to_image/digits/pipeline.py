"""A complete, trained Stable Diffusion pipeline that is small: 8 x 8 handwritten digits.

A UNet with cross-attention, a CLIP text encoder and tokenizer, an autoencoder and a scheduler, all
of diffusers' and transformers' own classes, so that plain diffusers loads it and every method meant
for Stable Diffusion runs on it in seconds. A trained copy comes with the package.

The autoencoder is a pass-through: 8 x 8 images need no compression, and a pixel that is a latent is
one thing less that can go wrong. Its weights are set, not trained; see :func:`_pass_through`.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunize_ext._extras import require_extra
from immunize_ext.seams import Progress
from immunize_ext.text_to_image.digits.concepts import DIGIT_TEMPLATES, NEUTRAL_CAPTIONS
from immunize_ext.text_to_image.digits.images import DIGIT_NAMES, digit_images
from immunize_ext.text_to_image.model import Conditioning, TextToImage

# Folder of the shipped copy, beside this file.
WEIGHTS = "digits_weights"


_START, _END = "<|startoftext|>", "<|endoftext|>"


_MAX_TOKENS = 16


# Words beside those of the captions: for paraphrases, captions of the regularization set, rare
# tokens and new names. The model has seen most of them never, as with any model's rare words.
_OTHER_WORDS = """
    sks zwx ohwx number figure sign mark shape symbol glyph character letter picture image drawing
    sketch scan photo painting black white grey small large old new thin bold round written by hand
    on in with of the a an and paper ink chalk pencil board page line cat dog tree house car sun
    moon sea
"""


# Where the constants of the pass-through come from is derived at _pass_through.
_SPREAD = 512.0


_SHIFT = 20.0


_LOG_VARIANCE = -30.0


def load_digits_pipeline() -> Any:
    """Load the trained copy that comes with the package.

    Returns:
        A ``diffusers.StableDiffusionPipeline`` in float32 on the CPU, a new one at each call.

    Raises:
        MissingExtraError: If diffusers is not installed.

    Example:
        >>> from immunize_ext.text_to_image.model import TextToImage
        >>> model = TextToImage(load_digits_pipeline())
        >>> tuple(model.generate(["a photo of the digit three"], steps=5).shape)
        (1, 1, 8, 8)
    """
    return TextToImage.from_pretrained(
        Path(str(files("immunize_ext.text_to_image.digits") / WEIGHTS))
    ).pipeline


def build_digits_pipeline(
    out: str | Path,
    *,
    seed: int = 0,
    steps: int = 1000,
    without: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Train the pipeline and write it.

    UNet and text encoder are trained jointly on the ``train`` images with the denoising loss;
    captions are templates with the digit's name, one in ten neutral, one in ten empty (which is
    what classifier-free guidance needs). The written weights are a moving average over the steps.

    Args:
        out: Folder to write, in diffusers' layout.
        seed: Seed of weights, order, noise and captions.
        steps: Optimizer steps; 1000 take about two minutes on two cores.
        without: Names of digits that it never sees: what an attacker has who starts from a model
            that has not learnt the concept, the yardstick of every protection.
        overwrite: Whether a pipeline that is there already is replaced.
        progress: Called with what is being done and the share done so far.

    Returns:
        The pipeline.

    Raises:
        FileExistsError: If the folder exists and is not to be replaced.
        ValueError: If a number is out of range.
        MissingExtraError: If diffusers, transformers or scikit-learn is not installed.

    Note:
        Deterministic on the CPU: one seed and one number of threads give the same bytes. The
        global random generator is as it was. Nothing is written before the end.
    """
    if steps < 1:
        raise ValueError(f"build_digits_pipeline: steps must be at least 1, got {steps}")
    unseen = [name for name in without if name not in DIGIT_NAMES]
    if unseen or set(without) == set(DIGIT_NAMES):
        raise ValueError(
            f"build_digits_pipeline: without must name some of {', '.join(DIGIT_NAMES)} and leave "
            f"one, got {list(without)}"
        )
    target = Path(out)
    if target.exists() and not (overwrite and (target / "model_index.json").is_file()):
        raise FileExistsError(
            f"build_digits_pipeline: {out} exists; choose another folder, or replace a pipeline "
            "with overwrite (--force)"
        )
    # Initial weights are drawn from the global generator, by code that is not ours.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _new_pipeline()
        _train(pipeline, steps, torch.Generator().manual_seed(seed), without, progress)
    TextToImage(pipeline).save(target, overwrite=overwrite, extra=_tokenizer_files())
    return pipeline


def caption_words() -> list[str]:
    """All words that the tokenizer keeps whole, in the order of their ids."""
    texts = [template.replace("{}", " ") for template in DIGIT_TEMPLATES]
    words = [*DIGIT_NAMES, *" ".join([*texts, *NEUTRAL_CAPTIONS]).split(), *_OTHER_WORDS.split()]
    return list(dict.fromkeys(words))


def _byte_pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make every word one token, the most frequent pair first."""
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for pieces in split for pair in pairwise(pieces))
        if not counts:
            return merges
        # Ties by the alphabet, so that the order does not depend on that of the words.
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for pieces in split:
            index = 0
            while index + 1 < len(pieces):
                if (pieces[index], pieces[index + 1]) == best:
                    pieces[index : index + 2] = ["".join(best)]
                index += 1


def _tokenizer_files() -> dict[str, str]:
    """Vocabulary and merges as CLIP's tokenizers of every version of transformers read them."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = _byte_pairs(caption_words())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary += ["".join(pair) for pair in merges]
    vocabulary = [*dict.fromkeys(vocabulary), _START, _END]
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    return {
        "tokenizer/vocab.json": json.dumps({token: i for i, token in enumerate(vocabulary)}),
        "tokenizer/merges.txt": "\n".join(lines) + "\n",
    }


def _tokenizer() -> Any:
    """A CLIP tokenizer whose byte pairs merge each known word into one token.

    A word that is unknown falls apart into pieces of known ones, as in CLIP.
    """
    transformers = require_extra("transformers", extra="diffusion", purpose="the tokenizer")
    # Written and read back: the one way to make it that every version of transformers has.
    with tempfile.TemporaryDirectory() as folder:
        for name, text in _tokenizer_files().items():
            Path(folder, Path(name).name).write_text(text, encoding="utf-8")
        return transformers.CLIPTokenizer.from_pretrained(
            folder,
            model_max_length=_MAX_TOKENS,
            pad_token=_END,
            unk_token=_END,
            bos_token=_START,
            eos_token=_END,
        )


def _new_pipeline() -> Any:
    diffusers = require_extra("diffusers", extra="diffusion", purpose="the digits pipeline")
    transformers = require_extra("transformers", extra="diffusion", purpose="the text encoder")
    tokenizer = _tokenizer()
    for word in caption_words():
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise RuntimeError(f"the tokenizer splits {word!r} into {len(ids)} tokens")
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=_MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(24, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, steps_offset=1
    )
    return diffusers.StableDiffusionPipeline(
        vae=_pass_through(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _pass_through() -> Any:
    r"""An ``AutoencoderKL`` that changes nothing, by its weights alone.

    Encoder and decoder are: convolution, residual blocks, group normalisation, SiLU, convolution.
    Residual blocks with a zero last convolution pass their input on. What is left is made linear:

    - The first convolution gives the channels (x, -x, B, -B), normalised as one group. Their mean
      is 0 and their variance (mean x^2 + B^2) / 2, so x leaves as x sqrt(2) / B with a relative
      error of mean x^2 / (2 B^2): below 2e-6 for \|x\| <= 1 and B = 512. A larger B would cost more
      in the mean, where rounding of a sum of B's enters: eps B / 4 = 8e-6 as it is.
    - Scaled back and shifted by s = 20, SiLU(x + s) = (x + s) / (1 + exp(-x - s)), which is x + s
      to a relative 6e-9. The last convolution takes s off again, which leaves eps s = 2e-6.
    """
    diffusers = require_extra("diffusers", extra="diffusion", purpose="the autoencoder")
    vae = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=8,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        for half in (vae.encoder, vae.decoder):
            first, norm, last = half.conv_in, half.conv_norm_out, half.conv_out
            # Middle of a 3 x 3 kernel.
            first.weight[0, 0, 1, 1], first.weight[1, 0, 1, 1] = 1.0, -1.0
            first.bias[2], first.bias[3] = _SPREAD, -_SPREAD
            norm.weight[0], norm.bias[0] = _SPREAD / 2.0**0.5, _SHIFT
            last.weight[0, 0, 1, 1], last.bias[0] = 1.0, -_SHIFT
        # The encoder's second output is the log variance of the latent: none.
        vae.encoder.conv_out.bias[1] = _LOG_VARIANCE
    return vae.requires_grad_(False)


def _captions(labels: Sequence[int], generator: torch.Generator) -> list[str]:
    """A caption for each label: eight in ten name it, one is neutral, one empty."""
    kinds = torch.rand(len(labels), generator=generator).tolist()
    picks = torch.randint(len(DIGIT_TEMPLATES), (len(labels),), generator=generator).tolist()
    texts = []
    for label, kind, pick in zip(labels, kinds, picks, strict=True):
        if kind < 0.8:
            texts.append(DIGIT_TEMPLATES[pick].format(DIGIT_NAMES[label]))
        else:
            texts.append(NEUTRAL_CAPTIONS[pick] if kind < 0.9 else "")
    return texts


def _train(
    pipeline: Any,
    steps: int,
    generator: torch.Generator,
    without: Sequence[str],
    progress: Progress | None,
) -> None:
    model = TextToImage(pipeline)
    trained = nn.ModuleList([pipeline.unet, pipeline.text_encoder]).train()
    parameters: list[Tensor] = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    # OneCycle divides by its warm-up length, which must not be zero.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 4))
    average = [parameter.detach().clone() for parameter in parameters]
    images, labels = digit_images("train")
    left_out = torch.tensor([DIGIT_NAMES.index(name) for name in without], dtype=labels.dtype)
    seen = ~torch.isin(labels, left_out)
    images, labels = images[seen], labels[seen]
    tokens: dict[str, Tensor] = {}
    for step in range(steps):
        index = torch.randint(len(images), (64,), generator=generator)
        captions = _captions(labels[index].tolist(), generator)
        for text in captions:
            if text not in tokens:
                tokens[text] = pipeline.tokenizer(
                    text, padding="max_length", max_length=_MAX_TOKENS, return_tensors="pt"
                )["input_ids"][0]
        hidden = pipeline.text_encoder(torch.stack([tokens[text] for text in captions]))[0]
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
        loss = model.noise_loss(
            images[index], Conditioning(hidden, None, mask), generator=generator
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        # A shorter memory at the start, where the weights change most.
        decay = min(0.995, (1.0 + step) / (10.0 + step))
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1.0 - decay)
        if progress is not None and (step % 10 == 9 or step == steps - 1):
            progress(f"training, step {step + 1} of {steps}", (step + 1) / steps)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    trained.eval().requires_grad_(False)
