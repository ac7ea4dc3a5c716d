"""What a guarantee for the task to keep leaves of a protection: certified and measured, attackers.

    python -m benchmarks.protection.local_control --mnist ../shared/data/mnist
    python -m benchmarks.protection.local_control --write docs/local_control.md  # the page's tables

Deep: a small network on MNIST at 14 x 14, 0 to 4 kept, 5 to 9 harmful. Gauge: a small transformer
on 16 patches, its heads in another basis. Linear: pairs of the 8 x 8 digits.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunize_ext.ops import InputSubspace, collect_moments, find_attention
from immunize_ext.probing.attacks import compare_attack
from immunize_ext.probing.data import Problem, digits_task, load_mnist
from immunize_ext.probing.immunizers import (
    DeepExtractorImmunizer,
    LocalControl,
    LocalControlImmunizer,
    rank_layers,
)
from immunize_ext.probing.metrics import Allowed, certified_answers, drift_bound
from immunize_ext.quantities import Spread

from .._page import fills, result_parser, table
from ._outcomes import Interval, one_thread, write

OUT = Path(__file__).with_name("local_control.json")
SEEDS, TRAIN, TEST, SHOTS = 5, 1000, 1000, 300
STEPS, LOOKS = 100, (10, 30, 100)
LAYERS = ("0", "2", "4")
FLOOR = 1e-6

DEEP = DeepExtractorImmunizer(
    LAYERS, objective="kappa_log_ratio", steps=200, batch_size=250, learning_rate=0.03, share=1.0
)
RULES: dict[str, LocalControl | None] = {
    "no guarantee": None,
    "null space": LocalControl("null-space"),
    "certified for 99 %": LocalControl("certified", explained=0.97, certified=0.99),
    "certified for 90 %": LocalControl("certified", explained=0.97, certified=0.9),
    "certified for 50 %": LocalControl("certified", explained=0.97, certified=0.5),
    "budget of 1e-8": LocalControl("gauss-newton", budget=1e-8),
    "budget of 1e-6": LocalControl("gauss-newton", budget=1e-6),
}
# Scope: what an attacker trains besides a new head.
SCOPES = {"probe": (), "last block": ("4",), "full": LAYERS}
RATES = {"sgd": (0.003, 0.01, 0.03, 0.1), "adamw": (1e-3, 3e-3, 1e-2, 3e-2)}

Data = tuple[Tensor, Tensor]


@cache
def images(folder: Path, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images and their digits."""
    found = []
    for train in (True, False):
        x, y = load_mnist(folder, train=train, size=size)
        found += [torch.from_numpy(x).float(), torch.from_numpy(y)]
    return tuple(found)  # type: ignore[return-value]


def drawn(folder: Path, seed: int, size: int = 14) -> dict[str, Data]:
    """Samples of both tasks by a seed: to train on, and to test."""
    x, y, x_test, y_test = images(folder, size)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for part, (inputs, labels, count) in {
        "train": (x, y, TRAIN),
        "test": (x_test, y_test, TEST),
    }.items():
        for role, first in (("kept", 0), ("harm", 5)):
            places = ((labels >= first) & (labels < first + 5)).nonzero()[:, 0]
            order = torch.randperm(len(places), generator=generator)[:count]
            chosen = places[order]
            found[f"{role} {part}"] = inputs[chosen], labels[chosen] - first
    return found


def initialised(model: nn.Module, seed: int) -> nn.Module:
    """Weights of a seed, whatever torch's global state is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn_ = torch.randn(parameter.shape, generator=generator)
            scale = 1.4 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.0
            parameter.copy_(scale * drawn_ if parameter.dim() > 1 else parameter * 0.0)
    return model


def accuracy(model: Callable[[Tensor], Tensor], data: Data) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).double().mean())


def train(
    model: nn.Module,
    data: Data,
    *,
    kind: str,
    rate: float,
    steps: int,
    looks: Sequence[int] = (),
    judge: Data | None = None,
) -> list[float]:
    """Full-batch training of what requires gradients; accuracy on other data at some steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=rate, momentum=0.9)
        if kind == "sgd"
        else torch.optim.AdamW(parameters, lr=rate)
    )
    found = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
        if step in looks and judge is not None:
            found.append(accuracy(model, judge))
    return found


def attacked(body: nn.Module, scope: Sequence[str], tasks: Mapping[str, Data]) -> dict[str, Any]:
    """The best of every rate, an optimizer and a look each; an attacker with hindsight."""
    shots = tuple(part[:SHOTS] for part in tasks["harm train"])
    found: dict[str, Any] = {}
    width = body(shots[0][:1]).shape[1]
    for kind, rates in RATES.items():
        curves = []
        for rate in rates:
            extractor = copy.deepcopy(body).requires_grad_(False)
            for name in scope:
                extractor.get_submodule(name).requires_grad_(True)
            head = initialised(nn.Linear(width, 5), 77)
            model = nn.Sequential(extractor, head)
            fixed = {"kind": kind, "rate": rate, "steps": STEPS, "looks": LOOKS}
            curves.append(train(model, shots, judge=tasks["harm test"], **fixed))  # type: ignore[arg-type]
        best = [max(curve[i] for curve in curves) for i in range(len(LOOKS))]
        found[kind] = {
            "best": best,
            "rate": rates[max(range(len(rates)), key=lambda i: curves[i][-1])],
        }
    return found


def solved(body: nn.Module, tasks: Mapping[str, Data]) -> float:
    """A probe by least squares, at its best ridge: no optimizer, no condition number."""
    x, y = (part[:SHOTS] for part in tasks["harm train"])
    with torch.no_grad():
        z, z_test = (body(rows).double() for rows in (x, tasks["harm test"][0]))
    z, z_test = (torch.cat([part, torch.ones(len(part), 1)], 1) for part in (z, z_test))
    targets = functional.one_hot(y).double()
    gram, best = z.mT @ z, 0.0
    for power in range(-12, 1):
        ridge = 10.0**power * gram.diagonal().max() * torch.eye(len(gram), dtype=z.dtype)
        answers = z_test @ torch.linalg.solve(gram + ridge, z.mT @ targets)
        right = (answers.argmax(1) == tasks["harm test"][1]).double().mean()
        best = max(best, float(right))
    return best


def floored(features: Tensor) -> Tensor:
    """Log kappa of H + FLOOR lambda_max I: what has rank one less is not infinitely slow."""
    square = torch.linalg.svdvals(features.double()).square()
    return ((1.0 + FLOOR) / (square[-1] / square[0] + FLOOR)).log()


def kappa_of(body: nn.Module, data: Data) -> float:
    """Log kappa of the features of some samples."""
    with torch.no_grad():
        return float(floored(body(data[0])))


def backbone(seed: int, tasks: Mapping[str, Data]) -> tuple[nn.Sequential, nn.Linear]:
    """A network trained on the task to keep, and its head."""
    sizes = (196, 128, 64, 24)
    parts: list[nn.Module] = []
    for i, (d, o) in enumerate(pairwise(sizes)):
        parts += [nn.ReLU()] * (i > 0) + [nn.Linear(d, o)]
    body = initialised(nn.Sequential(*parts), seed)
    head = initialised(nn.Linear(24, 5), seed + 1)
    train(nn.Sequential(body, head), tasks["kept train"], kind="adamw", rate=1e-3, steps=150)
    return body.requires_grad_(False), head.requires_grad_(False)  # type: ignore[return-value]


def loss(model: nn.Module, data: Data) -> float:
    """Cross-entropy."""
    with torch.no_grad():
        return float(functional.cross_entropy(model(data[0]), data[1]))


def certified(
    found: Any, body: nn.Module, head: nn.Linear, rule: LocalControl, tasks: Mapping[str, Data]
) -> dict[str, Any]:
    """Answers that no allowed change alters, on training and on test samples, and the bound."""
    moments = collect_moments(body, LAYERS, [tasks["kept train"][0]], share=False)
    limits = found.config["guard"]["layers"]
    allowed = {
        name: Allowed(
            InputSubspace.of(one.gram, explained=rule.explained, count=one.rows),
            limits[name]["limit"],
        )
        for name, one in moments.items()
    }
    result: dict[str, Any] = {}
    for part in ("train", "test"):
        x, y = tasks[f"kept {part}"]
        bound = drift_bound(body, allowed, x)
        with torch.no_grad():
            sure = certified_answers(head(body(x)), head.weight, y, bound)
            moved = (found.extractor(x) - body(x)).double().norm(dim=1)
        result[f"certified {part}"] = float(sure.double().mean())
        result[f"share of bound {part}"] = float((moved / bound).max())
    return result


def deep(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Every rule of one seed: what was kept, what was raised, what attackers get."""
    tasks = drawn(folder, seed)
    body, head = backbone(seed, tasks)
    problem: Problem[Any] = Problem.of(tasks["kept train"], tasks["harm train"], head=head)
    rows = []
    for name, rule in {"before": None, **RULES}.items():
        if name == "before":
            after, after_head, extra = body, head, {}
        else:
            found = replace(DEEP, local=rule, seed=seed).fit(body, problem)
            after, after_head, extra = found.extractor, found.head, {}
            if rule is not None:
                layers = found.config["guard"]["layers"]
                extra["layers"] = layers
                if rule.rule == "certified":
                    extra |= certified(found, body, head, rule, tasks)
                if rule.rule == "gauss-newton":
                    extra["predicted"] = sum(one["predicted"] for one in layers.values())
        models = nn.Sequential(body, head), nn.Sequential(after, after_head)
        kept = tasks["kept train"]
        with torch.no_grad():
            drift = float((after(kept[0]) - body(kept[0])).norm() / body(kept[0]).norm())
            answers = [model(kept[0]).argmax(1) for model in models]
        row = {
            "rule": name,
            "seed": seed,
            "drift": drift,
            "changed answers": float((answers[0] != answers[1]).double().mean()),
            "kept train": accuracy(models[1], kept),
            "kept test": accuracy(models[1], tasks["kept test"]),
            "loss rise": loss(models[1], kept) - loss(models[0], kept),
            "log kappa kept": kappa_of(after, kept),
            "log kappa harm": kappa_of(after, tasks["harm train"]),
            "solved": solved(after, tasks),
            "attacks": {scope: attacked(after, names, tasks) for scope, names in SCOPES.items()},
            **extra,
        }
        rows.append(row)
        print({k: v for k, v in row.items() if k != "layers"}, flush=True)
    return rows


def layers(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Layers by what is predicted of them, and what each alone reaches for one budget."""
    tasks = drawn(folder, seed)
    body, head = backbone(seed, tasks)
    body.requires_grad_(True)
    value = floored(body(tasks["harm train"][0]))
    weights = [body.get_submodule(name).weight for name in LAYERS]
    slopes = dict(zip(LAYERS, torch.autograd.grad(value, weights), strict=True))
    ranked = rank_layers(slopes, body, head, tasks["kept train"])
    body.requires_grad_(False)
    problem: Problem[Any] = Problem.of(tasks["kept train"], tasks["harm train"], head=head)
    before = kappa_of(body, tasks["harm train"])
    rows = []
    for one in ranked:
        alone = replace(DEEP, blocks=(one.layer,), local=RULES["budget of 1e-8"], seed=seed)
        found = alone.fit(body, problem)
        rise = kappa_of(found.extractor, tasks["harm train"]) - before
        rows.append({"seed": seed, **one._asdict(), "rise": rise})
        print(rows[-1], flush=True)
    return rows


# --- the gauge ------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a perceptron, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(width, width))
        inner = 2 * width
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t, width) to tokens."""
        normed = functional.layer_norm(x, x.shape[-1:])
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out_proj(mixed)
        added: Tensor = x + self.mlp(functional.layer_norm(x, x.shape[-1:]))
        return added


class Transformer(nn.Module):
    """Digits of 28 x 28 as 16 patches; the mean token goes to a linear head."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(49, width)
        self.place = nn.Linear(16, width, bias=False)
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 784) to logits."""
        patches = x.reshape(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 49)
        tokens = self.blocks(self.embed(patches) + self.place.weight.mT)
        found: Tensor = self.head(functional.layer_norm(tokens, tokens.shape[-1:]).mean(1))
        return found


def random_gauge(seed: int, groups: int, side: int, kappa: float) -> Tensor:
    """Matrices R with kappa(R^T R) = kappa, one a head."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(groups, side, side, generator=generator).double()).Q
        for _ in range(2)
    )
    sigma = torch.logspace(0.25, -0.25, side, base=kappa, dtype=torch.float64)
    return left * sigma @ right


def keys_kappa(model: Transformer, data: Data) -> float:
    """Mean over heads and blocks of log kappa of the keys of some images' tokens."""
    found: list[float] = []

    def look(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        for head in output.detach().flatten(0, 1).unflatten(-1, (4, -1)).unbind(1):
            found.append(float(floored(head)))

    hooks = [block.k_proj.register_forward_hook(look) for block in model.blocks]
    with torch.no_grad():
        model(data[0])
    for hook in hooks:
        hook.remove()
    return sum(found) / len(found)


BASES = ("as trained", "random basis", "balanced")
GAUGE_RATES = {"sgd": (0.003, 0.01, 0.03, 0.1), "adamw": (1e-3, 3e-3, 1e-2)}


def gauge(folder: Path, seed: int) -> list[dict[str, Any]]:
    """One transformer as it is, in a random basis, and balanced again."""
    tasks = drawn(folder, seed, 28)
    model = Transformer()
    initialised(model, seed)
    train(model, tasks["kept train"], kind="adamw", rate=3e-3, steps=60)
    moved = copy.deepcopy(model)
    free: dict[str, Any] = {"keys": True, "values": True}  # in Block, above
    for index, one in enumerate(find_attention(moved, **free).values()):
        r, s = (random_gauge(100 * seed + 2 * index + i, 4, 8, 1e4) for i in (0, 1))
        one.gauge(keys=r, values=s)
    balanced = copy.deepcopy(moved)
    for one in find_attention(balanced, **free).values():
        one.balance()
    rows = []
    shots = tuple(part[:150] for part in tasks["harm train"])
    for name, start in zip(BASES, (model, moved, balanced), strict=True):
        with torch.no_grad():
            x = tasks["kept test"][0]
            change = float((start(x) - model(x)).abs().max())
        row: dict[str, Any] = {
            "basis": name,
            "seed": seed,
            "largest change": change,
            "log kappa keys": keys_kappa(start, shots),
            "attacks": {},
        }
        for kind, rates in GAUGE_RATES.items():
            curves = []
            for rate in rates:
                attacker = copy.deepcopy(start).requires_grad_(True)
                initialised(attacker.head, 77)
                fixed = {"kind": kind, "rate": rate, "steps": 60, "looks": (10, 30, 60)}
                curves.append(train(attacker, shots, judge=tasks["harm test"], **fixed))  # type: ignore[arg-type]
            row["attacks"][kind] = {
                "curves": curves,
                "best": [max(curve[i] for curve in curves) for i in range(3)],
            }
        rows.append(row)
        print({k: v for k, v in row.items() if k != "attacks"}, flush=True)
        print({k: v["best"] for k, v in row["attacks"].items()}, flush=True)
    return rows


# --- linear ---------------------------------------------------------------------------------------

PAIRS = ((3, 8, 4, 9), (0, 1, 3, 5), (2, 6, 7, 9), (1, 7, 5, 8), (5, 6, 2, 3))


def linear() -> list[dict[str, Any]]:
    """The method of the command line, on pairs of digits."""
    rows = []
    for a, b, c, d in PAIRS:
        kept, harm = digits_task((a,), (b,)), digits_task((c,), (d,))
        for settings in (
            {"rule": "null-space"},
            {"rule": "certified", "drift": 0.05},
            {"rule": "gauss-newton", "drift": 0.05},
            {"rule": "gauss-newton", "drift": 0.3},
        ):
            found = LocalControlImmunizer(**settings).fit(None, Problem.of(kept, harm))  # type: ignore[arg-type]
            first, last = found.history[0], found.history[-1]
            slow = {
                name: compare_attack(harm, found.theta, attacker=name).slowdown.ratio
                for name in ("gradient_descent", "adam", "whitened")
            }
            rows.append(
                {
                    "pairs": [a, b, c, d],
                    **settings,
                    "bound": found.config["drift_bound"],
                    "reached": found.config["drift_found"],
                    "rise": last["log_kappa_harmful"] - first["log_kappa_harmful"],
                    "rise kept": last["log_kappa_primary"] - first["log_kappa_primary"],
                    **slow,
                    "kept": compare_attack(kept, found.theta).slowdown.ratio,
                }
            )
            print(rows[-1], flush=True)
    return rows


PARTS: dict[str, Any] = {"deep": deep, "layers": layers, "gauge": gauge}

# --- the page -------------------------------------------------------------------------------------


def _mean(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and half-width of its 95 % interval over seeds."""
    mean, low, high = Interval.of(values)
    # Neither has a half-width: one seed, nor seeds that all say the same.
    half = f" ± {(high - low) / 2.0:{form.lstrip('+')}}" if 0.0 < high - low < math.inf else ""
    return f"{mean:{form}}{half}"


def _best(row: Mapping[str, Any], scope: str, look: int = -1) -> float:
    return max(one["best"][look] for one in row["attacks"][scope].values())


def attackers(row: Mapping[str, Any], look: int = -1) -> dict[str, float]:
    """Accuracy by attacker, after some of the steps or all."""
    found = {
        f"{scope}, {kind}": one["best"][look]
        for scope, by_kind in row["attacks"].items()
        for kind, one in by_kind.items()
    }
    return found | ({"probe, solved": row["solved"]} if look == -1 else {})


def strongest(row: Mapping[str, Any]) -> tuple[float, str]:
    """The best of all attackers of one model, and its name."""
    found = attackers(row)
    name = max(found, key=lambda key: found[key])
    return found[name], name


def _rows(results: Mapping[str, Any], rule: str) -> list[dict[str, Any]]:
    return [row for row in results["deep"] if row["rule"] == rule]


def kept_table(results: Mapping[str, Any]) -> str:
    """What was promised of the task to keep, and what came."""
    rows = []
    for rule in ("before", *RULES):
        found = _rows(results, rule)
        promised = ["", ""]
        if "certified train" in found[0]:
            promised = [_mean([r[f"certified {p}"] for r in found]) for p in ("train", "test")]
        elif rule == "null space":
            # Answers that were right before: no layer answers its training inputs otherwise.
            promised = [_mean([r["kept train"] for r in _rows(results, "before")]), "none"]
        elif rule not in ("before", "no guarantee"):
            promised = ["none", "none"]
        rows.append(
            [
                rule,
                *promised,
                *(_mean([r[f"kept {p}"] for r in found]) for p in ("train", "test")),
                f"{max(r['changed answers'] for r in found):.1%}",
                f"{max(r['drift'] for r in found):.1e}",
            ]
        )
    head = ["rule", "certified, training", "certified, test", "measured, training"]
    head += ["measured, test", "training answers changed, most", "drift, most"]
    return table(head, rows)


def attack_table(results: Mapping[str, Any]) -> str:
    """What was raised, and what attackers get."""
    rows = []
    for rule in ("before", *RULES):
        found = _rows(results, rule)
        names = [strongest(row)[1] for row in found]
        rows.append(
            [
                rule,
                _mean([r["log kappa harm"] for r in found], ".2f"),
                _mean([r["log kappa kept"] for r in found], ".2f"),
                *(_mean([r["attacks"]["probe"][k]["best"][-1] for r in found]) for k in RATES),
                _mean([r["solved"] for r in found]),
                *(_mean([_best(r, scope) for r in found]) for scope in ("last block", "full")),
                f"{_mean([strongest(row)[0] for row in found])} ({statistics.mode(names)})",
            ]
        )
    head = ["rule", "log κ_H", "log κ_P", "probe, SGD", "probe, AdamW", "probe, solved"]
    return table([*head, "last block", "full", "strongest (most often)"], rows)


def early_table(results: Mapping[str, Any]) -> str:
    """The best attacker of each scope after few steps."""
    rows = []
    for rule in ("before", *RULES):
        found = _rows(results, rule)
        cells = [_mean([_best(r, scope, i) for r in found]) for scope in SCOPES for i in (0, 1)]
        rows.append([rule, *cells])
    head = [f"{scope}, {LOOKS[i]} steps" for scope in SCOPES for i in (0, 1)]
    return table(["rule", *head], rows)


def budget_table(results: Mapping[str, Any]) -> str:
    """Gauss-Newton: predicted and measured rise of the loss to keep."""
    rows = []
    for rule in RULES:
        found = _rows(results, rule)
        if "predicted" in found[0]:
            rises = [r["loss rise"] for r in found]
            rows.append(
                [
                    rule,
                    _mean([r["predicted"] for r in found], ".2g"),
                    _mean(rises, ".2g"),
                    _mean([r["loss rise"] / r["predicted"] for r in found], ".2f"),
                ]
            )
    return table(["rule", "predicted", "measured", "measured / predicted"], rows)


def layer_table(results: Mapping[str, Any]) -> str:
    """Layers ranked beforehand, and what each alone reached."""
    rows = []
    for layer in LAYERS:
        found = [row for row in results["layers"] if row["layer"] == layer]
        cells = [_mean([math.log10(r["worth"]) for r in found], ".2f")]
        cells += [_mean([r["free"] for r in found], ".3f")]
        rows.append([layer, *cells, _mean([r["rise"] for r in found], ".2f")])
    head = ["layer", "log10 harm per damage", "share of the gradient in the null space"]
    return table([*head, "rise of log κ_H for a budget of 1e-8"], rows)


def right_pairs(results: Mapping[str, Any]) -> tuple[int, int]:
    """Pairs of layers of a seed whose order was predicted rightly, of all."""
    right = total = 0
    for seed in {row["seed"] for row in results["layers"]}:
        found = [row for row in results["layers"] if row["seed"] == seed]
        for i, one in enumerate(found):
            for other in found[i + 1 :]:
                total += 1
                right += (one["worth"] - other["worth"]) * (one["rise"] - other["rise"]) > 0
    return right, total


def gauge_table(results: Mapping[str, Any]) -> str:
    """The basis of the heads, and what two optimizers make of it."""
    rows = []
    for basis in BASES:
        found = [row for row in results["gauge"] if row["basis"] == basis]
        cells = [f"{max(r['largest change'] for r in found):.1e}"]
        cells += [_mean([r["log kappa keys"] for r in found], ".2f")]
        for kind in GAUGE_RATES:
            cells += [_mean([r["attacks"][kind]["best"][i] for r in found]) for i in range(3)]
        rows.append([basis, *cells])
    head = ["basis", "largest change of a logit", "log κ of the keys"]
    head += [f"{kind}, {step}" for kind in ("SGD", "AdamW") for step in (10, 30, 60)]
    return table(head, rows)


def _paired(
    after: Sequence[Mapping[str, Any]],
    before: Sequence[Mapping[str, Any]],
    key: Callable[[Mapping[str, Any]], float],
) -> list[float]:
    """Differences, seed by seed."""
    base = {row["seed"]: key(row) for row in before}
    return [key(row) - base[row["seed"]] for row in after]


def gauge_answer(results: Mapping[str, Any]) -> str:
    """What a basis of the heads costs an attacker, and what undoing it gives back."""
    by = {name: [r for r in results["gauge"] if r["basis"] == name] for name in BASES}
    parts_ = []
    for label, kind in (("SGD", "sgd"), ("AdamW", "adamw")):
        found = [
            _mean(
                _paired(by[name], by["as trained"], lambda r, k=kind: r["attacks"][k]["best"][-1]),  # type: ignore[misc]
                "+.3f",
            )
            for name in BASES[1:]
        ]
        parts_.append(f"{label} {found[0]} in the random basis and {found[1]} once balanced")
    return f"After 60 steps, against the basis as trained, seed by seed: {'; '.join(parts_)}."


def slowed(results: Mapping[str, Any]) -> str:
    """What the largest budget costs attackers of each scope, seed by seed."""
    budget, before = (_rows(results, rule) for rule in ("budget of 1e-6", "before"))
    rows = []
    for scope in SCOPES:
        cells = [
            _mean(_paired(budget, before, lambda r, s=scope, i=i: _best(r, s, i)), "+.3f")  # type: ignore[misc]
            for i in range(len(LOOKS))
        ]
        rows.append([scope, *cells])
    return table(["budget of 1e-6 against before", *(f"{look} steps" for look in LOOKS)], rows)


def linear_table(results: Mapping[str, Any]) -> str:
    """The method of the command line."""
    rows = []
    keys = dict.fromkeys((row["rule"], row.get("drift")) for row in results["linear"])
    for rule, drift in keys:
        found = [r for r in results["linear"] if (r["rule"], r.get("drift")) == (rule, drift)]
        rows.append(
            [
                rule + ("" if drift is None else f", {drift:g}"),
                f"{max(r['bound'] for r in found):.3g}",
                f"{max(r['reached'] for r in found):.3g}",
                _mean([r["rise"] for r in found], ".2f"),
                _mean([r["rise kept"] for r in found], ".2f"),
                *(
                    f"{math.exp(Spread.of([math.log(r[name]) for r in found]).mean):.3g}x"
                    for name in ("gradient_descent", "adam", "whitened", "kept")
                ),
            ]
        )
    head = ["rule, drift", "drift, bound", "drift, measured", "rise of log κ_H", "of log κ_P"]
    return table([*head, "slower: GD", "Adam", "whitened", "GD, kept task"], rows)


def parts(results: Mapping[str, Any]) -> dict[str, str]:
    """What stands between the marks of the page."""
    return {
        "answer": answer(results),
        "kept": kept_table(results),
        "attacks": attack_table(results),
        "early": early_table(results),
        "slowed": slowed(results),
        "budget": budget_table(results),
        "layers": layer_table(results),
        "gauge": gauge_answer(results) + "\n\n" + gauge_table(results),
        "linear": linear_table(results),
    }


def answer(results: Mapping[str, Any]) -> str:
    """The first sentence of the page; its verdicts are those of the intervals."""
    before = _rows(results, "before")

    def mean(rule: str, key: str) -> str:
        return f"{Spread.of(row[key] for row in _rows(results, rule)).mean:.1%}"

    def differences(rule: str, key: Callable[[Mapping[str, Any]], float]) -> list[float]:
        return _paired(_rows(results, rule), before, key)

    def rises(rule: str) -> list[float]:
        return differences(rule, lambda row: row["log kappa harm"])

    def change(rule: str, key: Callable[[Mapping[str, Any]], float]) -> str:
        return _mean(differences(rule, key), "+.3f")

    sure, exact, budget = "certified for 99 %", "null space", "budget of 1e-6"
    looks = [(name, i) for i in range(len(LOOKS)) for name in attackers(before[0], i - len(LOOKS))]
    hurt = sum(
        Interval.of(
            differences(sure, lambda row, n=name, i=i: attackers(row, i - len(LOOKS))[n])  # type: ignore[misc]
        ).high
        < 0.0
        for name, i in looks
    )
    verdict = "No: with a certificate it does not rise measurably"
    if Interval.of(rises(sure)).low > 0.0:
        verdict = "Yes, with a certificate, and attackers are slowed"
        if not hurt:
            verdict = "Yes, but with a certificate by so little that no attacker notices"
    return (
        f"{verdict}: where {mean(sure, 'certified train')} of the training answers and "
        f"{mean(sure, 'certified test')} of the test answers are certain to stay (measured: "
        f"{mean(sure, 'kept train')} and {mean(sure, 'kept test')}), log kappa_H changes by "
        f"{_mean(rises(sure), '+.2f')}, and in the null space by {_mean(rises(exact), '+.2f')}; "
        f"accuracy falls by more than its interval for {hurt} of {len(looks)} attackers (scope, "
        "optimizer, steps). A budget of the loss changes log kappa_H by "
        f"{_mean(rises(budget), '+.1f')} with {mean(budget, 'kept test')} kept, guarantees "
        "nothing, and moves the accuracy of the "
        f"strongest attacker ({statistics.mode(strongest(row)[1] for row in before)}) by "
        f"{change(budget, lambda row: strongest(row)[0])}, a probe after {LOOKS[1]} steps by "
        f"{change(budget, lambda row: _best(row, 'probe', 1))}. Differences to the network before, "
        f"paired by seed, with 95 % intervals (t, {len(before)} seeds); log kappa_H was "
        f"{_mean([row['log kappa harm'] for row in before], '.2f')}."
    )


def main() -> None:
    """Run the command line."""
    parser = result_parser(__doc__, OUT)
    parser.add_argument("--mnist", type=Path, help="folder of MNIST")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--parts", nargs="+", default=[*PARTS, "linear"])
    arguments = parser.parse_args()
    one_thread()
    if fills(arguments, parts):
        return
    if arguments.mnist is None:
        parser.error("--mnist must name the folder of MNIST")
    found: dict[str, Any] = {}
    if arguments.out.is_file():
        found = json.loads(arguments.out.read_text(encoding="utf-8"))
    for name in arguments.parts:
        if name == "linear":
            found[name] = linear()
        else:
            seeds = range(arguments.seeds)
            found[name] = [row for seed in seeds for row in PARTS[name](arguments.mnist, seed)]
    command = "python -m benchmarks.protection.local_control --mnist DATA/mnist"
    write(arguments.out, command, {k: found[k] for k in (*PARTS, "linear") if k in found})


if __name__ == "__main__":
    main()
