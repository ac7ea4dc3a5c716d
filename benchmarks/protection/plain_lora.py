"""LoRA on a saved pipeline with diffusers and PEFT alone: what anyone can do to what we publish.

    python benchmarks/protection/plain_lora.py PIPELINE IMAGES.npy "a photo of the digit three" OUT

``IMAGES.npy`` holds float32 images in [-1, 1], shape ``(n, c, h, w)``. Nothing of this package is
imported. The settings, and the order in which random numbers are drawn, are those of
``immunize_ext.text_to_image.attacks.LoRAAttack``, so that both can be held against each other:
``OUT`` gets ``losses.json``, the factors as ``lora.pt`` and ``images.npy``, drawn afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig


def train(pipeline, images, prompt, *, steps, rate, rank, batch, seed):
    """Train factors in all attention layers; give the loss of every step."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    for part in (unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    factors = [p for name, p in unet.named_parameters() if ".lora_" in name]
    optimizer = torch.optim.AdamW(factors, lr=rate, weight_decay=0.01)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        chosen = images[torch.randperm(len(images), generator=draw)[:20]]
        latents = pipeline.vae.encode(chosen).latent_dist.mode()
        latents = latents * pipeline.vae.config.scaling_factor
        tokens = pipeline.tokenizer(
            prompt,
            padding="max_length",
            max_length=pipeline.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        text = pipeline.text_encoder(tokens.input_ids)[0]
    losses = []
    for _ in range(steps):
        batch_of = torch.randperm(len(latents), generator=draw)[:batch]
        clean = latents[batch_of]
        when = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),), generator=draw)
        noise = torch.randn(clean.shape, generator=draw)
        noisy = scheduler.add_noise(clean, noise, when)
        predicted = unet(noisy, when, encoder_hidden_states=text.expand(len(clean), -1, -1)).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> int:
    """Attack and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=9e-3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(asked.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    images = torch.from_numpy(np.load(asked.images))
    losses = train(
        pipeline,
        images,
        asked.prompt,
        steps=asked.steps,
        rate=asked.rate,
        rank=asked.rank,
        batch=asked.batch,
        seed=asked.seed,
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "losses.json").write_text(json.dumps(losses) + "\n")
    factors = {n: p.detach() for n, p in pipeline.unet.named_parameters() if ".lora_" in n}
    torch.save(factors, asked.out / "lora.pt")
    drawn = pipeline(
        [asked.prompt] * asked.count,
        num_inference_steps=20,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type="np",
    ).images
    np.save(asked.out / "images.npy", drawn)
    if "immunize_ext" in sys.modules:
        raise RuntimeError("plain_lora must not import immunize_ext, got it; start it as a script")
    return 0


if __name__ == "__main__":
    sys.exit(main())
