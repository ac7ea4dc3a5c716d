"""Claim: at Stable Diffusion 1.4 widths the merge takes under 2 % of a step of MIMA.

``python -m benchmarks.merge_share [--quick] [--threads 2] [--steps 5] [--out benchmarks/results]``

A denoiser of Stable Diffusion 1.4's configuration with random weights: 32 K and V matrices over
768-wide text. What a merge costs depends on these alone. The rest of the step is made small: 8 x 8
latents instead of 64 x 64, one image a concept, two concepts, nothing to retain, a text encoder of
one layer. A real step does at least as much work beside the same merge, so the share measured here
is an upper bound for it.

The forward pass of the merge, averaging of the other parameters included, is timed inside the
steps. Its backward pass happens inside autograd's and is timed alone, at the same sizes and in the
same process, after the steps: the memory that a step has freed is at hand, as it is for the next
step. Needs about 10 GB of memory; ``--quick`` runs a small denoiser to see whether everything
works, and judges nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunize_ext.text_to_image.concepts import Concept, ConceptSet
from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
from immunize_ext.text_to_image.immunizers import MIMA, ConceptMerge
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.projections import describe_projections, find_text_projections

from ._environment import environment_record

TARGET = 0.02
SEED = 20250702
WORDS = ("three", "five")
IMAGES = 4


class OneCopy(TextToImage):
    """Gives itself away as its clone: nobody needs the model before, and it is large."""

    def clone(self) -> TextToImage:
        """The model itself."""
        return self


def build(quick: bool) -> TextToImage:
    """A pipeline with random weights around a denoiser of Stable Diffusion 1.4's configuration."""
    import diffusers
    import transformers

    torch.manual_seed(SEED)
    width = 32 if quick else 768
    # These are the defaults of the class, which is Stable Diffusion 1's denoiser.
    wide: dict[str, Any] = {"cross_attention_dim": width, "sample_size": 8}
    small = {"block_out_channels": (8, 8, 16, 16), "attention_head_dim": 4, "norm_num_groups": 4}
    # The usual initialisation of 860 million weights takes longer than all steps together.
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**wide, **(small if quick else {}))
    unet = unet.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.dim() > 1:
                parameter.uniform_(-0.02, 0.02)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
    tokenizer = load_digits_pipeline().tokenizer
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    return OneCopy(
        diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=diffusers.DDIMScheduler(clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def random_images(_: str) -> Tensor:
    """Noise: no time depends on what an image shows."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.rand(IMAGES, 3, 64, 64, generator=generator) * 2.0 - 1.0


def concepts() -> ConceptSet:
    """Two concepts, and 200 captions as the published code draws them."""
    known = ["red", "blue", "number", "paper", "photo", "drawing", "picture", "small", "one", "two"]
    captions = [f"{a} {b} {c}" for a in known for b in known for c in known[:2]]
    chosen = [
        Concept(word, (f"a photo of the digit {word}", f"a drawing of the number {word}"), "digit")
        for word in WORDS
    ]
    chosen = [Concept(c.name, c.prompts, c.anchor, None, random_images) for c in chosen]
    return ConceptSet(tuple(chosen), (), tuple(captions))


def merge_alone(model: TextToImage, settings: MIMA, repeats: int) -> dict[str, Any]:
    """Times of the merge by itself: the factor once for a run, forward and backward each step."""
    found = concepts()
    started = time.perf_counter()
    merge = ConceptMerge(
        model,
        found.concepts,
        found.captions,
        ridge=settings.ridge,
        prompts_per_concept=settings.merge_prompts,
    )
    preparation = time.perf_counter() - started
    layers = [p.module.weight.detach() for p in find_text_projections(model.unet)]
    names = merge.projections
    tables = [
        {name: (w * scale).requires_grad_() for name, w in zip(names, layers, strict=True)}
        for scale in (1.0, 1.001, 0.999)
    ]
    forward, backward = [], []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        merged = merge(tables[0], tables[1:])
        forward.append(time.perf_counter() - started)
        upstream = [torch.ones_like(w) for w in merged.values()]
        inputs = [w for table in tables for w in table.values()]
        started = time.perf_counter()
        torch.autograd.grad(list(merged.values()), inputs, upstream)
        backward.append(time.perf_counter() - started)
    # The first call warms up.
    return {
        "preparation_seconds": preparation,
        "forward_seconds": statistics.median(forward[1:]),
        "backward_seconds": statistics.median(backward[1:]),
        "tokens": sum(len(rows) for rows in merge.embeddings),
        "captions": merge.factor.samples,
    }


def measure(quick: bool, steps: int) -> dict[str, Any]:
    """Steps of MIMA with the merge inside, and the merge alone."""
    model = build(quick)
    projections = find_text_projections(model.unet)
    description = describe_projections(projections)
    print(description, file=sys.stderr)
    rows = []
    for second_order in (False, True):
        settings = MIMA(
            steps=steps + 1,
            batch_size=1,
            inner_rate=1e-3,
            learning_rate=1e-5,
            retain_weight=0.0,
            probe_every=steps + 1,
            loss_clamp=1e3,
            hypergradient="unrolled" if second_order else "first_order",
        )
        history = settings.fit(model, concepts()).history[1:]  # the first step warms up
        alone = merge_alone(model, settings, repeats=3 * steps)
        step = statistics.median(record["seconds"] for record in history)
        inside = statistics.median(record["merge_seconds"] for record in history)
        merge = max(inside, alone["forward_seconds"]) + alone["backward_seconds"]
        rows.append(
            {
                "second_order": second_order,
                "step_seconds": step,
                "merge_seconds_inside": inside,
                "merge_alone": alone,
                "share": merge / step,
                "target": TARGET,
                "met": None if quick else merge / step < TARGET,
            }
        )
        print(
            f"{'unrolled' if second_order else 'first order'}: step {step:.3f} s, merge "
            f"{1e3 * merge:.1f} ms, {merge / step:.2%} (target: under {TARGET:.0%})",
            file=sys.stderr,
        )
    return {
        "matrices": len(projections),
        "output_rows": sum(projection.out_features for projection in projections),
        "d": projections[0].in_features,
        "concepts": len(WORDS),
        "latents": [4, 8, 8],
        "batch_size": 1,
        "steps": steps,
        "unet_parameters": sum(p.numel() for p in model.unet.parameters()),
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the result file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small denoiser; judges nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=5, help="steps timed, after one to warm up")
    parser.add_argument("--out", type=Path, help="folder of the result file; printed only without")
    arguments = parser.parse_args(argv)
    if arguments.threads < 1 or arguments.steps < 1:
        parser.error("--threads and --steps must be at least 1")
    torch.set_num_threads(arguments.threads)
    given = sys.argv[1:] if argv is None else argv
    environment = environment_record(
        torch.device("cpu"), arguments.threads, "benchmarks.merge_share", given
    )
    result = {"benchmark": "merge_share", "quick": arguments.quick, "environment": environment}
    result |= measure(arguments.quick, arguments.steps)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if arguments.out is None:
        print(text, end="")
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / "merge_share.json"
    partial = target.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
