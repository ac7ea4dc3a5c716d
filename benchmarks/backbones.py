"""Write docs/backbones.md: what text does to layers of each family, and what edits leave of it.

``python -m benchmarks.backbones [--quick] [--write docs/backbones.md]`` measures, writes the page;
``--check docs/backbones.md`` has exit status 1 where it is not what the results say.

Tiny random models of diffusers' own classes, those of the tests. Which layers are exact in them is
so in every model of the class; how much an edit leaves in a trained one is not known from them.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from immunize_ext.quantities import Spread
from immunize_ext.text_to_image.concepts import ConceptSet
from immunize_ext.text_to_image.immunizers import ConceptMerge, MomentMerge, erase
from immunize_ext.text_to_image.immunizers.batches import Batch, ConceptPool, generator_of
from immunize_ext.text_to_image.immunizers.token_rows import without_padding
from immunize_ext.text_to_image.model import Conditioning, TextToImage
from immunize_ext.text_to_image.projections import linear_layers, parameters_of, text_entrances
from immunize_ext.text_to_image.text_layers import TextLayer, find_text_layers
from python_tests.attack_pipelines import (
    concept,
    tiny_flux_pipeline,
    tiny_sd3_pipeline,
    tiny_xl_pipeline,
)

from ._environment import environment_record
from ._page import parser, run, table

FILE = "backbones.json"
SEEDS = range(5)
FAMILIES: Mapping[str, Callable[[int], Any]] = {
    "SDXL": tiny_xl_pipeline,
    "SD3": tiny_sd3_pipeline,
    "FLUX": tiny_flux_pipeline,
}
CLASSES = ("exact", "modulated", "propagated")
PROMPT, ANCHORED = "a photo of the digit three", "a photo of the digit digit"
CAPTIONS = ("a photo of a cat", "a red dog", "blue cat painting", "a drawing of a red cat")
RIDGE = 1e-3

# Size of the random changes that the copies of the weights have.
MOVED = 0.1

Weights = dict[str, Tensor]


def classes(model: TextToImage) -> dict[str, Any]:
    """How many linear layers are of each class, and by which text enters."""
    found = find_text_layers(model.unet)
    counts = Counter(layer.kind for layer in found)
    linear = sum(isinstance(module, torch.nn.Linear) for module in model.unet.modules())
    entrances = Counter(entrance.role for entrance in text_entrances(model.unet))
    return {kind: counts[kind] for kind in CLASSES} | {
        "none": linear - len(found),
        "entrances": dict(entrances),
        "parameters": sum(p.numel() for p in model.unet.parameters()),
    }


def _predicted(model: TextToImage, text: Conditioning) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(8, 4, 8, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return model.predict(noisy, torch.linspace(60.0, 940.0, 8), text)


def erasure(model: TextToImage) -> dict[str, float]:
    """Relative distance of predictions under the name from those under the anchor, unedited."""
    concepts = ConceptSet((concept("three"),), (concept("six"), concept("seven")), CAPTIONS)
    with torch.no_grad():
        name, anchor = (model.conditioning([text]) for text in (PROMPT, ANCHORED))
    goal = _predicted(model, anchor)

    def apart(text: Conditioning) -> float:
        return float((_predicted(model, text) - goal).norm() / goal.norm())

    [pooled] = [e.module for e in text_entrances(model.unet) if e.role == "pooled"]
    old = pooled.weight.detach().clone()
    found = {"before": apart(name)}
    with erase(model, concepts), torch.no_grad():
        found["edited"] = apart(name)
        new = pooled.weight.clone()
        pooled.weight.copy_(old)
        found["tokens"] = apart(name)
        found["tokens, vector given"] = apart(name._replace(pooled=anchor.pooled))
        pooled.weight.copy_(new)
    return found


def merges(model: TextToImage, seed: int) -> dict[str, dict[str, float]]:
    """What the output of a merged layer misses of each copy's, by class, in units of the change.

    Exact layers on the rows that the merge is told of; others on draws that it has not seen.
    """
    concepts = [concept("three"), concept("five")]
    layers = {layer.name: layer for layer in find_text_layers(model.unet)}
    names = linear_layers("benchmark", model.unet, "attention")
    names += [e.name for e in text_entrances(model.unet) if e.name not in names]
    base = {n: p.detach().clone() for n, p in parameters_of(model.unet, names).items()}
    copies = [_moved(base, 100 * seed + index) for index in range(len(concepts))]
    pools = [ConceptPool(model, c.images("attack"), c.prompts) for c in concepts]
    generator = generator_of(seed, 0)
    seen = [[pool.draw(6, generator) for _ in range(4)] for pool in pools]
    fresh = [pool.draw(6, generator) for pool in pools]
    exact = ConceptMerge(model, concepts, CAPTIONS, ridge=RIDGE)
    merged = {
        "mean": {n: (copies[0][n] + copies[1][n]) / 2 for n in base},
        "moments": MomentMerge(model, list(base), seen, [], ridge=RIDGE).layers(base, copies),
        "constraints": exact.layers(base, copies),
    }
    missed: dict[str, dict[str, list[float]]] = {kind: {} for kind in CLASSES}
    for index, copy in enumerate(copies):
        for entrance in exact.entrances:
            for how in ("constraints", "mean"):
                tables = ({**base, **merged[how]}, copy, base)
                for new, own, old in zip(*map(entrance.take, tables), strict=True):
                    share = _missed(new, own, old, entrance.embeddings[index])
                    missed["exact"].setdefault(how, []).append(share)
        for name, x in _received(model, [layers[n] for n in names], fresh[index]).items():
            weight = f"{name}.weight"
            if layers[name].kind != "exact":
                for how in ("moments", "mean"):
                    share = _missed(merged[how][weight], copy[weight], base[weight], x)
                    missed[layers[name].kind].setdefault(how, []).append(share)
    return {
        kind: {how: sum(found) / len(found) for how, found in by_how.items()}
        for kind, by_how in missed.items()
    }


def _moved(base: Weights, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: w + MOVED * torch.randn(w.shape, generator=generator, dtype=w.dtype)
        for n, w in base.items()
    }


def _missed(merged: Tensor, copy: Tensor, base: Tensor, rows: Tensor) -> float:
    """|(W - W_n) h| over rows, in units of |(W_n - W_0) h|."""
    return float((rows @ (merged - copy).mT).norm() / (rows @ (copy - base).mT).norm())


def _received(model: TextToImage, layers: Sequence[TextLayer], batch: Batch) -> dict[str, Tensor]:
    """Rows that layers receive, without T5's padding, as moments count them."""
    heard: dict[str, Tensor] = {}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, x, name=layer.name: heard.__setitem__(name, x[0].detach())
        )
        for layer in layers
    ]
    with torch.no_grad():
        batch.prediction(model)
    for handle in handles:
        handle.remove()
    mask = batch.conditioning.mask
    return {
        layer.name: without_padding(model, layer.rows, mask, heard[layer.name]).flatten(0, -2)
        for layer in layers
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, seed by seed of the weights."""
    torch.set_num_threads(1)
    seeds = list(SEEDS)[:1] if arguments.quick else list(SEEDS)
    found: dict[str, Any] = {}
    for family, make in FAMILIES.items():
        rows = []
        for seed in seeds:
            pipeline = make(seed)
            pipeline.to(torch.float64)
            model = TextToImage(pipeline)
            rows.append({"erasure": erasure(model), "merges": merges(model, seed)})
        found[family] = {"classes": classes(model), "seeds": rows}
    environment = environment_record(torch.device("cpu"), 1, "benchmarks.backbones", sys.argv[1:])
    return {"families": found, "count": len(seeds), "environment": environment}


# --- the page -------------------------------------------------------------------------------------

PAGE = """\
# Backbones: where text enters, and what merges where

<!-- written by benchmarks.backbones; edit that -->

A UNet of Stable Diffusion takes text by K and V of every cross-attention. SD3 and FLUX have no
cross-attention: text is embedded once, and runs beside the image through joint attention.
What can be said of a layer before any image is drawn depends on what reaches it. That is found by
moving one input of the denoiser at a time and looking at what every linear layer receives
(`find_text_layers`):

| class | receives | merged by | erased by |
| --- | --- | --- | --- |
| exact | a function of the text alone | token constraints (`merge_kv`), bias included | UCE |
| modulated | text, scaled and shifted by time | second moments over noise, time | what feeds it |
| propagated | text and image | second moments over noise, time | what feeds it |

`immunize mima --merge by_class` merges each layer so; `--merge closed_form` keeps to the
constraints and takes the mean elsewhere. The exact layers by which text enters are
`context_embedder` and the first layer of the pooled vector's network in SD3 and FLUX, K, V and
`add_embedding.linear_1` in SDXL. Scopes in joint models: `kv` is where text enters, `attn2` adds
what tokens alone go through in attention, `attn` all of attention.

No trained SD3 or FLUX was at hand: **every number below is of tiny random models of diffusers' own
classes**, with random CLIP and T5 encoders. Which layers are of which class, and that constraints
are met to rounding, carries over; how much an edit leaves in a trained model, and whether
immunization protects one, is not known.

## Layers

{layers}

The image's own layers count as propagated from the first block on: their scale and shift know the
pooled vector.

## Erasure

Relative distance of what the denoiser predicts for *a photo of the digit three* from what it
predicted, unedited, for the prompt with the anchor in the name's place. Two concepts kept; mean
(least to largest) of {count} seeds of the weights.

{erasure}

With the tokens alone edited the pooled vector still tells the concept. `erase` edits the vector's
layer by the same rule. T5's padding is attended to without a mask: an edit that leaves it out of
account shifts hundreds of rows that every image sees, so erasure maps evenly spaced padding
positions along with the words, and merges keep them among what stays. A concept's own rows are
words alone: where features look both ways (T5), those that move by more than a quarter of their
norm when the anchor takes the name's place. That quarter is a choice, and untested on a trained T5.

## Merges

Two copies of the weights, each moved at random; what the merged layer's output misses of each
copy's, as a share of how far the copy's is from the base's. Exact layers on the rows of the
concept's own tokens, the others on images, noise and times that the moments have not seen. Mean
over layers, and of that mean (least to largest) of {count} seeds.

{merges}

The mean of two unrelated copies misses about 0.7. Two concepts send nearly the same rows through
most layers of a random model, and no weight can answer both as their copies do.

## Training and attacks

The loss is chosen from the pipeline's scheduler. Flow matching: x_t = (1 - sigma) x + sigma noise,
target noise - x, sigma by a logit-normal law with the schedule's shift; schedules that shift by the
size of the image are not shifted for training. A FLUX with distilled guidance is trained at 3.5.
`snr_gamma` is refused, having no meaning there. LoRA adapters are written under diffusers' names
(`transformer. ...`), by `immunize export-lora` and by `attacks.save_lora`, and plain pipelines load
them.
"""


def _spread(values: Sequence[float]) -> str:
    if max(values) < 1e-6:
        return f"{max(values):.0e} at most"
    return f"{Spread.of(values).mean:.2g} ({min(values):.2g} to {max(values):.2g})"


def page(found: dict[str, Any]) -> str:
    """The page as the results have it."""
    counted, erased, merged = [], [], []
    steps = ("before", "tokens", "tokens, vector given", "edited")
    for family, results in found["families"].items():
        kinds, seeds = results["classes"], results["seeds"]
        enters = ", ".join(f"{n} {role}" for role, n in kinds["entrances"].items())
        counts = [f"{kinds[column]:,}" for column in ("parameters", *CLASSES, "none")]
        counted.append([family, *counts, enters])
        erased.append([family, *(_spread([s["erasure"][step] for s in seeds]) for step in steps)])
        for kind in CLASSES:
            how = "constraints" if kind == "exact" else "moments"
            if how in seeds[0]["merges"][kind]:
                missed = [_spread([s["merges"][kind][by] for s in seeds]) for by in (how, "mean")]
                merged.append([family, kind, how, *missed])
    return PAGE.format(
        count=found["count"],
        layers=table(("", "parameters", *CLASSES, "no text", "text enters by"), counted),
        erasure=table(("", "before", "tokens", "tokens, anchor's vector", "edited"), erased),
        merges=table(("", "class", "by", "missed", "by the mean"), merged),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run."""
    flags = parser((__doc__ or "").partition("\n")[0])
    return run(FILE, page, measure, flags, argv)


if __name__ == "__main__":
    sys.exit(main())
