"""Write docs/backbones.md: what text does to layers of each family, and what edits leave of it.

``python -m benchmarks.backbones [--quick] [--write docs/backbones.md]``  measure, and write the page
``python -m benchmarks.backbones --check docs/backbones.md``              exit status 1 where the page
                                                                          is not what the results say

Tiny random models of diffusers' own classes, those of the tests: what is exact in them is exact in
every model of the class; how much an edit leaves in a trained one is not known from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.immunizers import ConceptMerge, MomentMerge, erase
from immunize_ext.text_to_image.immunizers.batches import ConceptPool, generator_of
from immunize_ext.text_to_image.model import Conditioning, TextToImage
from immunize_ext.text_to_image.projections import linear_layers, parameters_of, text_entrances
from immunize_ext.text_to_image.text_layers import find_text_layers
from python_tests.attack_pipelines import (
    concept,
    tiny_flux_pipeline,
    tiny_sd3_pipeline,
    tiny_xl_pipeline,
)

FILE = "backbones.json"
SEEDS = range(5)
FAMILIES: dict[str, Callable[[int], Any]] = {
    "SDXL": tiny_xl_pipeline,
    "SD3": tiny_sd3_pipeline,
    "FLUX": tiny_flux_pipeline,
}
CLASSES = ("exact", "modulated", "propagated")
PROMPT, ANCHORED = "a photo of the digit three", "a photo of the digit digit"
CAPTIONS = ("a photo of a cat", "a red dog", "blue cat painting", "a drawing of a red cat")
RIDGE = 1e-3

# Size of the changes that copies have, beside weights of 0.2 or so.
_MOVED = 0.1


def classes(model: TextToImage) -> dict[str, Any]:
    """How many linear layers are of each class, and by which text enters."""
    found = find_text_layers(model.unet)
    linear = sum(isinstance(module, torch.nn.Linear) for module in model.unet.modules())
    counts = Counter(layer.kind for layer in found)
    return {
        **{kind: counts[kind] for kind in CLASSES},
        "without text": linear - len(found),
        "entrances": [(e.name, e.role) for e in text_entrances(model.unet)],
    }


def _predict(model: TextToImage, text: Conditioning) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(8, 4, 8, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return model.predict(noisy, torch.linspace(60.0, 940.0, 8), text)


def erasure(model: TextToImage) -> dict[str, float]:
    """Distance of predictions under the name from those under the anchor, relative."""
    with torch.no_grad():
        name, anchor = (model.conditioning([text]) for text in (PROMPT, ANCHORED))
    goal = _predict(model, anchor)

    def apart(text: Conditioning) -> float:
        return float((_predict(model, text) - goal).norm() / goal.norm())

    found = {"before": apart(name)}
    with erase(model, [concept("three")], ridge=RIDGE):
        found["edited"] = apart(name)
        # Of what is left, the part of positions that the edit did not look at.
        hidden = torch.where(name.mask.unsqueeze(-1), name.hidden, anchor.hidden)
        found["words alone"] = apart(name._replace(hidden=hidden))
    [pooled] = [e for e in text_entrances(model.unet) if e.role == "pooled"]
    old = pooled.module.weight.detach().clone()
    with erase(model, [concept("three")], ridge=RIDGE), torch.no_grad():
        pooled.module.weight.copy_(old)
        found["tokens only"] = apart(name)
        pooled.module.weight.copy_(old)
    return found


def merges(model: TextToImage, seed: int) -> dict[str, dict[str, float]]:
    """What a layer's output misses of the copy's, on draws the merge has not seen, by class.

    In units of how far the copy's output is from the base's: 1 is what the base itself misses.
    """
    concepts = [concept("three"), concept("five")]
    names = linear_layers("benchmark", model.unet, "attention")
    base = {n: p.detach().clone() for n, p in parameters_of(model.unet, names).items()}
    copies = []
    for index in range(len(concepts)):
        generator = torch.Generator().manual_seed(100 * seed + index)
        copies.append(
            {
                n: w + _MOVED * torch.randn(w.shape, generator=generator, dtype=w.dtype)
                for n, w in base.items()
            }
        )
    pools = [ConceptPool(model, c.images("attack"), c.prompts) for c in concepts]
    generator = generator_of(seed, 0)
    seen = [[pool.draw(6, generator) for _ in range(4)] for pool in pools]
    fresh = [pool.draw(6, generator) for pool in pools]
    by_moments = MomentMerge(model, list(base), seen, [], ridge=RIDGE)
    merged = {
        "mean": {n: (copies[0][n] + copies[1][n]) / 2 for n in base},
        "moments": {**base, **by_moments.layers(base, copies)},
        "exact": {**base, **_exact(model, concepts, base, copies)},
    }
    kinds = {
        layer.name: layer.kind for layer in find_text_layers(model.unet) if layer.name in names
    }
    missed: dict[str, dict[str, list[float]]] = {}
    for index, batch in enumerate(fresh):
        for layer, rows in _received(model, list(kinds), batch).items():
            weight, bias = f"{layer}.weight", f"{layer}.bias"

            def moved(
                one: dict[str, Tensor], other: dict[str, Tensor], rows: Tensor = rows
            ) -> float:
                w = one[weight] - other[weight]  # noqa: B023
                b = one[bias] - other[bias] if bias in base else 0.0  # noqa: B023
                return float((rows @ w.mT + b).norm())

            for how, values in merged.items():
                if how == "exact" and kinds[layer] != "exact":
                    continue
                share = moved(values, copies[index]) / moved(copies[index], base)
                missed.setdefault(kinds[layer], {}).setdefault(how, []).append(share)
    return {
        kind: {how: sum(found) / len(found) for how, found in by_how.items()}
        for kind, by_how in missed.items()
    }


def _exact(
    model: TextToImage, concepts: Sequence[Concept], base: dict[str, Tensor], copies: list[Any]
) -> dict[str, Tensor]:
    merge = ConceptMerge(model, concepts, CAPTIONS, ridge=RIDGE)
    return dict(merge.layers(base, copies))


def _received(model: TextToImage, layers: Sequence[str], batch: Any) -> dict[str, Tensor]:
    """Rows that layers receive: of the concept's own name where text alone arrives, else all."""
    heard: dict[str, Tensor] = {}
    handles = [
        model.unet.get_submodule(layer).register_forward_pre_hook(
            lambda _, x, layer=layer: heard.__setitem__(layer, x[0].detach())
        )
        for layer in layers
    ]
    with torch.no_grad():
        batch.prediction(model)
    for handle in handles:
        handle.remove()
    mask = batch.conditioning.mask
    found = {}
    for layer, x in heard.items():
        if x.dim() < 3 or x.shape[1] < mask.shape[1] or mask.shape[1] < 100:
            found[layer] = x.reshape(-1, x.shape[-1])
            continue
        image = mask.new_ones(len(x), x.shape[1] - mask.shape[1])
        found[layer] = x[torch.cat([mask, image], 1)]
    return found
