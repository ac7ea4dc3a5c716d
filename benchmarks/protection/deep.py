"""Immunized deep extractors: who gets past them, what a step costs, and the worst of several harms.

    python -m benchmarks.protection.deep --mnist ../shared/data/mnist --parts attackers --seeds 3
    python -m benchmarks.protection.deep --write docs/deep.md     # the page's tables

Parts have numbers of seeds of their own (the page lists its commands).

Attackers: EfficientNet-Lite0 with its public weights, cut after its eleventh block, which is
immunized; digits 0 to 4 are kept, and two of the digits 5 to 9 against the other three are taught,
drawn anew for every seed. Each attacker trains by Adam at one rate (`RATES`).

Costs: seconds of one thread (least of several rounds in alternation) and bytes that graphs keep for
their backward passes, for plain training, for the published procedure (``eigvalsh`` of p x p
matrices, an explicit inverse where the last layer is linear) and for this package's operators.

Worst case: pairs of the digits 5 to 9 as harms, four of ten trained against, weighted alike, by
exponentiated weights or by CVaR, and judged on all ten; on features of the 8 x 8 digits the same
for linear extractors; on the digits pipeline MIMA, whose concepts are attacked by LoRA.

Everything finished is kept in ``--work``, and ``deep.json`` is made of what is there: a run that
was stopped goes on, and what it left is a result with fewer seeds.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunize_ext.errors import EqualSingularValuesError
from immunize_ext.ops import Preconditioner
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well
from immunize_ext.probing.attacks import FineTuningAttack, choose_harm, compare_features
from immunize_ext.probing.certificates import layer_probes
from immunize_ext.probing.data import Problem, digits_task
from immunize_ext.probing.extractors import FeatureExtractor, load_backbone
from immunize_ext.probing.immunizers import METHODS, DeepExtractorImmunizer, ImmunizedExtractor
from immunize_ext.storage import write_file
from immunize_ext.worst_case import conditional_value_at_risk

from .._baselines import published_r_ill, published_r_well
from .._kept import Kept
from .._page import fills, result_parser, table
from ._deep_task import BEFORE, BLOCK, HARMFUL, KEPT, DeepTask, deep_task, log_kappa, top
from ._outcomes import Interval, one_thread, write

OUT = Path(__file__).with_suffix(".json")
PARTS = ("attackers", "costs", "harms", "linear", "mima")
STEPS = (0, 10, 40)
SETTINGS = DeepExtractorImmunizer(
    (BLOCK,), steps=50, batch_size=128, learning_rate=3e-3, head_learning_rate=1e-3, share=100.0
)
MODELS: dict[str, DeepExtractorImmunizer | None] = {
    "none": None,
    "R_well and R_ill": SETTINGS,
    "R_ill alone": replace(SETTINGS, objective="r_ill", share=30.0),
}
TRAINED = {
    "head": "head by Adam",
    "last_block": "last block",
    "lora": "LoRA, rank 4, all layers",
    "full": "full fine-tuning",
}
# Rates of Adam for what is trained.
RATES = {"head": 1e-2, "last_block": 1e-3, "lora": 1e-2, "full": 1e-3}
PROBES = {"gradient_descent": "gradient descent", "conjugate_gradients": "conjugate gradients"}
WEIGHTINGS: dict[str, dict[str, Any]] = {
    "first harm alone": {},
    "mean": {"weighting": "mean"},
    "exponentiated": {"weighting": "exponentiated", "harm_rate": 0.1},
    "CVaR of half": {"weighting": "cvar", "worst_share": 0.5},
}
TRAINED_HARMS = 4
# Times that the rate of a run which ran away is halved.
HALVINGS = 4
LINEAR: dict[str, tuple[str, dict[str, Any]]] = {
    "closed form, first harm alone": ("closed-form", {}),
    "closed form, top": ("several-harms", {}),
    "closed form, log": ("several-harms", {"grading": "log"}),
    "learning curve, mean": ("learning-curve", {"objective": "mean", "steps": 60}),
    "learning curve, exponentiated": ("learning-curve", {"steps": 60}),
    "learning curve, CVaR of half": ("learning-curve", {"objective": "cvar", "steps": 60}),
}
# Beside the plain mean, whose runs under the same attack are those of ``mima_attackers``.
MIMA: dict[str, dict[str, Any]] = {
    # sqrt(8 log N / T), the rate of Hedge's bound for N concepts and T steps.
    "exponentiated": {"weighting": "exponentiated", "concept_rate": 0.38},
    "CVaR of half": {"weighting": "cvar", "worst_share": 0.5},
}
MIMA_STEPS = (0, 10, 20, 40)


# --- who gets past --------------------------------------------------------------------------------


def immunized(
    task: DeepTask, settings: DeepExtractorImmunizer, harms: Sequence[Any], seed: int
) -> ImmunizedExtractor:
    """The last block immunized against harms, beside the task to keep."""
    problem: Problem[Any] = Problem(task.samples(KEPT), tuple(harms), task.head())
    return replace(settings, seed=seed).fit(task.tail, problem)


def kept_share(task: DeepTask, tail: nn.Module, head: nn.Module) -> float:
    """Right answers of the served head on the task to keep, test images."""
    inputs, labels = task.samples(KEPT, "test")
    with torch.no_grad():
        return float((head(tail(inputs)).argmax(1) == labels).double().mean())


def attackers(task: DeepTask, name: str, seed: int, quick: bool) -> dict[str, Any]:
    """One model under all attackers."""
    started = time.process_time()
    ones = sorted(random.Random(seed).sample(HARMFUL, 2))
    zeros = [digit for digit in HARMFUL if digit not in ones]
    tail, whole, head = task.tail, task.whole, task.head()
    settings = MODELS[name]
    if settings is not None:
        found = immunized(task, settings, [task.samples(HARMFUL)], seed)
        tail, whole, head = found.extractor, task.with_block(found), found.head
    rows: dict[str, Any] = {
        "ones": ones,
        "kept": kept_share(task, tail, head),
        "log_kappa": {
            role: log_kappa(tail, inputs, 1e-4 * top(task.tail, inputs))
            for role, (inputs, _) in (
                ("primary", task.samples(KEPT)),
                ("harmful", task.samples(HARMFUL)),
            )
        },
        "immunization_seconds": time.process_time() - started,
    }
    tasks = [task.features_task(one, ones, zeros) for one in (tail, task.tail)]
    kept = [task.features_task(one, (0, 2, 4), (1, 3)) for one in (tail, task.tail)]
    for role, (after, before) in (("harmful", tasks), ("primary", kept)):
        rows[f"slowdown_{role}"] = {
            probe: compare_features(
                after, before, attacker=probe, base_budget=300, limit=64.0
            ).slowdown.ratio
            for probe in PROBES
        }
    pairs = [task.against(ones, zeros, part, whole=True) for part in ("train", "test")]
    signed = [(inputs, 2.0 * labels.double() - 1.0) for inputs, labels in pairs]
    rows["best_probe"] = {
        one.layer: one.accuracy for one in layer_probes(whole, *signed, [BEFORE], batch_size=256)
    }
    steps = STEPS[:2] if quick else STEPS
    rows["fine_tuned"] = {}
    for part in TRAINED:
        cheap = part in ("head", "last_block")
        model = tail if cheap else whole
        attacked = [task.against(ones, zeros, p) for p in ("train", "test")] if cheap else pairs
        got = FineTuningAttack(
            part,  # type: ignore[arg-type]
            learning_rates=(RATES[part],),
            evaluate_at=steps,
            blocks=(BLOCK,),
            seed=seed,
        ).run(model, *attacked)
        rows["fine_tuned"][part] = list(got.accuracy.values())
    return {**rows, "seconds": time.process_time() - started}


# --- what a step costs ----------------------------------------------------------------------------


class Net(NamedTuple):
    """A network and a batch of each task.

    Attributes:
        name: What it is.
        body: Yields features.
        batches: Of the task to keep and of the harm.
        linear: The last layer of the body where it is linear: K^-1 acts there.
    """

    name: str
    body: nn.Module
    batches: tuple[Tensor, Tensor]
    linear: nn.Linear | None = None


def perceptron(width: int, batch: int) -> Net:
    """Two layers of one width."""
    last = nn.Linear(width, width)
    body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)
    shape = (batch, width)
    return Net(
        f"perceptron, {width} wide, batch {batch}",
        body,
        (torch.randn(shape), torch.randn(shape)),
        last,
    )


def backbones(batch: int) -> dict[str, Callable[[], Net]]:
    """Real architectures with random weights (mechanics alone), 32 x 32 pixels."""
    import transformers

    residual = transformers.ResNetConfig(
        num_channels=3,
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
    )
    tokens = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=8,
    )

    def of(name: str, make: Callable[[], nn.Module]) -> Net:
        shape = (batch, 3, 32, 32)
        return Net(name, make().eval(), (torch.randn(shape), torch.randn(shape)))

    made: dict[str, Callable[[], nn.Module]] = {
        "EfficientNet-Lite0, 1280 features": partial(
            load_backbone, "efficientnet-lite0", pretrained=False
        ),
        "ResNet18, 512 features": lambda: FeatureExtractor(transformers.ResNetModel(residual)),
        "ViT, 4 layers, 192 features": lambda: FeatureExtractor(
            transformers.ViTModel(tokens, add_pooling_layer=False)
        ),
    }
    named = ((f"{name}, batch {batch}", make) for name, make in made.items())
    return {name: partial(of, name, make) for name, make in named}


def step_of(net: Net, kind: str) -> Callable[[], None]:
    """Forward and backward passes of one step of a kind (:data:`KINDS`)."""
    few = net.body(net.batches[0][:2])
    every, width = list(net.body.parameters()), few.shape[1]
    # A classifier that features do not pass has no part in them.
    found = torch.autograd.grad(few.sum(), every, allow_unused=True)
    parameters = [p for p, gradient in zip(every, found, strict=True) if gradient is not None]
    head = nn.Linear(width, 10)
    labels = torch.arange(len(net.batches[0])) % 10
    rows: list[Tensor] = []

    def step() -> None:
        rows.clear()
        hook = None
        if net.linear is not None and kind in ("published", "ours"):
            hook = net.linear.register_forward_pre_hook(lambda _, x: rows.append(x[0].detach()))
        features = net.body(net.batches[0])
        loss = functional.cross_entropy(head(features), labels)
        if kind == "plain":
            torch.autograd.grad(loss, parameters)
            return
        harmful = net.body(net.batches[1])
        if hook is not None:
            hook.remove()
        if kind == "two batches":
            torch.autograd.grad(loss + functional.cross_entropy(head(harmful), labels), parameters)
            return
        if kind == "published":
            terms = published_r_well(features), published_r_ill(harmful)
        else:
            terms = gram_r_well(features), gram_r_ill(harmful)
        if net.linear is None:
            torch.autograd.grad(loss + terms[0] + terms[1], parameters)
            return
        place = [id(p) for p in parameters].index(id(net.linear.weight))
        torch.autograd.grad(loss, parameters, retain_graph=True)
        for term, seen in zip(terms, rows, strict=True):
            found = list(torch.autograd.grad(term, parameters, retain_graph=True))
            if kind == "published":
                eye = torch.eye(seen.shape[1])
                found[place] = found[place] @ torch.linalg.inv(seen.mT @ seen + eye)
            else:
                factor = Preconditioner.from_features(seen, ridge=1e-2)
                found[place] = factor.apply(found[place])

    return step


KINDS = ("plain", "two batches", "published", "ours")


def nets() -> dict[str, Callable[[], Net]]:
    """Networks by name: growth with width and batch, then real architectures."""
    sizes = [(64, 64), (256, 64), (1024, 64), (256, 16), (256, 256), (256, 1024)]
    made = {f"perceptron, {w} wide, batch {b}": partial(perceptron, w, b) for w, b in sizes}
    return {**made, **backbones(32)}


def costs(make: Callable[[], Net], quick: bool) -> dict[str, Any]:
    """Seconds and bytes of a step on one network."""
    torch.manual_seed(0)
    net = make()
    steps = {kind: step_of(net, kind) for kind in KINDS}
    memory, least = {}, dict.fromkeys(KINDS, math.inf)
    for kind, step in steps.items():
        step()
        with Kept() as kept:
            step()
        memory[kind] = kept.most
    for _ in range(1 if quick else 8):
        for kind, step in steps.items():
            begun = time.process_time()
            step()
            least[kind] = min(least[kind], time.process_time() - begun)
    return {"net": net.name, "seconds": least, "bytes": memory}


# --- several harms --------------------------------------------------------------------------------


def spread_of(values: Mapping[str, float], trained: Sequence[str]) -> dict[str, dict[str, float]]:
    """Least, mean of the least fifth and mean, over harms trained against and over others."""
    found = {}
    for role in ("trained", "unseen"):
        chosen = [v for name, v in values.items() if (name in trained) == (role == "trained")]
        if chosen:
            logs = torch.tensor(chosen, dtype=torch.float64)
            found[role] = {
                "least": float(logs.min()),
                "least_fifth": float(conditional_value_at_risk(logs, 0.2)),
                "mean": float(logs.mean()),
            }
    return found


def ran_away(error: ValueError) -> bool:
    """Whether a run came to features without a direction or beyond all numbers."""
    return isinstance(error, EqualSingularValuesError) or "keep the features finite" in str(error)


def harms(task: DeepTask, name: str, seed: int, quick: bool) -> dict[str, Any]:
    """One weighting against pairs of digits."""
    started = time.process_time()
    pairs = list(combinations(HARMFUL, 2))
    chosen = random.Random(1000 + seed).sample(pairs, TRAINED_HARMS)
    if name == "first harm alone":
        chosen = chosen[:1]
    changes: dict[str, Any] = {**WEIGHTINGS[name]}
    settings = replace(SETTINGS, **changes, **({"steps": 2} if quick else {}))
    samples = [task.samples(pair) for pair in chosen]
    for _ in range(HALVINGS):
        try:
            found = immunized(task, settings, samples, seed)
            break
        except ValueError as error:
            if not ran_away(error):
                raise
            settings = replace(settings, learning_rate=settings.learning_rate / 2.0)
    else:
        return {"diverged": settings.learning_rate}
    growth, slower = {}, {}
    for one, other in pairs:
        inputs, _ = task.samples((one, other))
        floor = 1e-4 * top(task.tail, inputs)
        growth[f"{one}:{other}"] = log_kappa(found.extractor, inputs, floor) - log_kappa(
            task.tail, inputs, floor
        )
        after, before = (
            task.features_task(tail, (one,), (other,)) for tail in (found.extractor, task.tail)
        )
        slower[f"{one}:{other}"] = math.log(
            compare_features(after, before, base_budget=100, limit=20.0).slowdown.ratio
        )
    trained = [f"{one}:{other}" for one, other in chosen]
    inputs, _ = task.samples(KEPT)
    floor = 1e-4 * top(task.tail, inputs)
    return {
        "trained": trained,
        "learning_rate": settings.learning_rate,
        "log_kappa_growth": spread_of(growth, trained),
        "log_slowdown": spread_of(slower, trained),
        "log_kappa_primary_growth": log_kappa(found.extractor, inputs, floor)
        - log_kappa(task.tail, inputs, floor),
        "kept": kept_share(task, found.extractor, found.head),
        "seconds": time.process_time() - started,
    }


def linear(name: str, seed: int, quick: bool) -> dict[str, Any]:
    """One method against pairs of the 8 x 8 digits 3 to 9; 0 against 1 and 2 is kept."""
    started = time.process_time()
    pairs = list(combinations(range(3, 10), 2))
    tasks = {f"{a}:{b}": digits_task((a,), (b,), seed=seed) for a, b in pairs}
    trained = random.Random(2000 + seed).sample(list(tasks), TRAINED_HARMS)
    trained = trained[:1] if "alone" in name else trained
    method, settings = LINEAR[name]
    more = {"steps": 3} if quick and "steps" in settings else {}
    primary = digits_task((0,), (1, 2), seed=seed)
    immunizer = METHODS.build(method, {**settings, **more}, "linear")
    theta = immunizer.fit(None, Problem.of(primary, *(tasks[t] for t in trained))).theta
    pool = dict(list(tasks.items())[:6]) if quick else tasks
    choice = choose_harm(theta, list(pool.values()), base_budget=1000, limit=64.0)
    by_name = {task.name: key for key, task in tasks.items()}
    logs = {by_name[k]: math.log(max(v.ratio, 1e-3)) for k, v in choice.slowdowns.items()}
    kept = choose_harm(theta, [primary], base_budget=1000, limit=64.0).slowdown.ratio
    return {
        "trained": trained,
        "log_slowdown": spread_of(logs, trained),
        "slowdown_primary": kept,
        "seconds": time.process_time() - started,
    }


def mima(name: str, seed: int, quick: bool) -> dict[str, Any]:
    """MIMA under one weighting, each concept attacked by LoRA."""
    from immunize_ext.text_to_image.attacks import Target
    from immunize_ext.text_to_image.immunizers import METHODS as PIPELINE_METHODS

    from .mima_attackers import IMAGES, Judges, attacker
    from .mima_task import TARGETS, digit, mima_task
    from .mima_tuning import tuned

    started = time.process_time()
    task, judges = mima_task(), Judges()
    rates = {"learning_rate": tuned()["methods"]["mima"]["rate"], **({"steps": 2} if quick else {})}
    method: Any = PIPELINE_METHODS.build("mima", {**rates, **MIMA[name]}, "deep", seed=seed)
    found = method.fit(task.model, task.fitted)
    made = time.process_time() - started
    attack, counts = attacker("lora"), {}
    steps = (0, 1) if quick else MIMA_STEPS
    for target in TARGETS:
        concept, seen = digit(target), []

        def look(
            model: Any, step: int, concept: Any = concept, seen: list[int] = seen
        ) -> dict[str, float]:
            del step
            prompt = attack.prompts([concept])[concept.name]
            seen.append(judges.counts(model, prompt, concept, seed)[0])
            return {"recognised": seen[-1] / IMAGES}

        attack.run(found.model, Target([concept], None, look, steps), steps=steps[-1], seed=seed)
        counts[target] = [count / IMAGES for count in seen]
    kept = judges.kept(task, found.model, seed)
    return {
        "recognised": counts,
        "kept": statistics.fmean(kept.values()) / IMAGES,
        "immunization_seconds": made,
        "seconds": time.process_time() - started,
    }


# --- everything that is missing -------------------------------------------------------------------


def job(part: str, name: str, seed: int, mnist: Path, quick: bool) -> dict[str, Any]:
    """One row of one part but the costs."""
    if part in ("attackers", "harms"):
        function = attackers if part == "attackers" else harms
        return function(deep_task(mnist), name, seed, quick)
    return (linear if part == "linear" else mima)(name, seed, quick)


def measure(
    out: Path, work: Path, mnist: Path, seeds: int, parts: Sequence[str], quick: bool
) -> None:
    """Everything that is not there yet, seed by seed; then the file of all that is."""
    work.mkdir(parents=True, exist_ok=True)
    names = {"attackers": MODELS, "harms": WEIGHTINGS, "linear": LINEAR, "mima": MIMA}
    jobs: list[tuple[str, str, int, Callable[[], Any]]] = []
    if "costs" in parts:
        for net, make in list(nets().items())[: 1 if quick else None]:
            jobs.append(("costs", net, 0, partial(costs, make, quick)))
    for seed, part in product(range(seeds), [p for p in parts if p != "costs"]):
        for name in names[part]:
            jobs.append((part, name, seed, partial(job, part, name, seed, mnist, quick)))
    for part, name, seed, make in jobs:
        file = work / f"{part}-{name.replace(' ', '_').replace(',', '')}-{seed}.json"
        if not file.is_file():
            found = {"part": part, "name": name, "seed": seed, "found": make()}
            write_file(file, json.dumps(found).encode())
            print(json.dumps(found)[:400], flush=True)
    content: dict[str, Any] = {part: {} for part in PARTS}
    for file in sorted(work.glob("*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        content[row["part"]].setdefault(row["name"], {})[str(row["seed"])] = row["found"]
    write(out, "python -m benchmarks.protection.deep --mnist DATA/mnist", content)


# --- the page -------------------------------------------------------------------------------------


def _cell(values: Iterable[float], form: str = ".2f", *, share: bool = False) -> str:
    """Mean and interval of three seeds or more; of fewer the values themselves."""
    found = list(values)
    if len(found) < 3:
        return ", ".join(f"{value:{form}}" for value in found)
    interval = Interval.of(found)
    return (interval.share() if share else interval).text(form)


def _seeds(results: Mapping[str, Any], part: str) -> list[str]:
    """Seeds that every row of a part has."""
    rows = [
        {seed for seed, one in found.items() if "diverged" not in one}
        for found in results[part].values()
    ]
    return sorted(set.intersection(*rows), key=int) if rows else []


def lost(results: Mapping[str, Any], model: str, trained: str, at: int = -1) -> Interval:
    """Accuracy that an attacker has less than without immunization, paired by seed."""
    rows = results["attackers"]
    return Interval.of(
        rows["none"][s]["fine_tuned"][trained][at] - rows[model][s]["fine_tuned"][trained][at]
        for s in _seeds(results, "attackers")
    )


def probe_lost(results: Mapping[str, Any], model: str, layer: str) -> Interval:
    """The same for the best ridge probe of a layer."""
    rows = results["attackers"]
    return Interval.of(
        rows["none"][s]["best_probe"][layer] - rows[model][s]["best_probe"][layer]
        for s in _seeds(results, "attackers")
    )


def held_up(results: Mapping[str, Any], model: str) -> tuple[list[str], list[str]]:
    """Attackers who know less at the end, the interval says; and those of whom it does not."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for trained, words in TRAINED.items():
        found[lost(results, model, trained).low > 0.0].append(words)
    for layer, words in (("output", "best ridge probe"), (BEFORE, "probe one layer earlier")):
        found[probe_lost(results, model, layer).low > 0.0].append(words)
    return found[True], found[False]


def _steps(results: Mapping[str, Any], model: str, probe: str, role: str = "harmful") -> Interval:
    rows = results["attackers"][model]
    return Interval.of_logs(
        rows[s][f"slowdown_{role}"][probe] for s in _seeds(results, "attackers")
    )


def answer(results: Mapping[str, Any]) -> str:
    """The first sentence of the page."""
    model = "R_well and R_ill"
    yes, no = held_up(results, model)
    slower = _steps(results, model, "gradient_descent")
    krylov = _steps(results, model, "conjugate_gradients")
    verdict = {
        (True, False): "Only whom it was made for",
        (True, True): "Whom it was made for and others",
        (False, True): "Others than whom it was made for",
        (False, False): "Nobody that could be shown",
    }[slower.low > 1.0, bool(yes) or krylov.low > 1.0]
    words = (
        f"{verdict}: with R_well and R_ill on the last block of a cut "
        f"EfficientNet-Lite0 gradient descent on a linear probe takes {slower.mean:.1f} times the "
        f"steps ({slower.low:.1f} to {slower.high:.1f}), conjugate gradients {krylov.mean:.1f} "
        f"times ({krylov.low:.1f} to {krylov.high:.1f})"
    )
    if yes:
        words += f"; after {STEPS[-1]} steps of training it still holds up: {', '.join(yes)}"
    if no:
        words += f"; no loss after {STEPS[-1]} steps could be shown for: {', '.join(no)}"
    return f"{words} ({len(_seeds(results, 'attackers'))} seeds, 95 % intervals)."


def attacker_table(results: Mapping[str, Any]) -> str:
    """Attackers by model."""
    seeds = _seeds(results, "attackers")
    models = [name for name in MODELS if name in results["attackers"]]
    rows: list[list[str]] = []
    for probe, words in PROBES.items():
        for role in ("harmful", "primary"):
            cells = [f"linear probe by {words}, times the steps, {role} task", "1"]
            cells += [_steps(results, m, probe, role).text(".1f") for m in models if m != "none"]
            rows.append(cells)
    of = results["attackers"]
    for layer, words in (("output", "last block"), (BEFORE, "one block earlier")):
        before = Interval.of(of["none"][s]["best_probe"][layer] for s in seeds)
        cells = [f"best ridge probe, {words}: accuracy lost", f"has {before.mean:.3f}"]
        cells += [probe_lost(results, m, layer).text(".3f") for m in models if m != "none"]
        rows.append(cells)
    for trained, words in TRAINED.items():
        for at, step in list(enumerate(STEPS))[1:]:
            before = Interval.of(of["none"][s]["fine_tuned"][trained][at] for s in seeds)
            cells = [f"{words}, {step} steps: accuracy lost", f"has {before.mean:.3f}"]
            cells += [lost(results, m, trained, at).text(".3f") for m in models if m != "none"]
            rows.append(cells)
    for role in ("harmful", "primary"):
        cells = [f"log kappa, {role}"]
        for m in models:
            cells.append(Interval.of(of[m][s]["log_kappa"][role] for s in seeds).text())
        rows.append(cells)
    cells = ["right on the task kept"]
    cells += [_cell((of[m][s]["kept"] for s in seeds), ".3f", share=True) for m in models]
    rows.append(cells)
    lines = [
        table(["attacker", *models], rows),
        "",
        f"{len(seeds)} seeds; mean and 95 % interval, paired by seed; of steps the geometric mean. "
        "Intervals of shares end at 0 and 1.",
    ]
    return "\n".join(lines)


def cost_table(results: Mapping[str, Any]) -> str:
    """Time and memory of a step."""
    heads = ["network"]
    heads += [f"{kind}, ms" for kind in KINDS]
    heads += [f"{kind}, MiB" for kind in KINDS]
    rows = []
    for row in (found["0"] for found in results["costs"].values()):
        cells = [row["net"], *(f"{1e3 * row['seconds'][kind]:.1f}" for kind in KINDS)]
        cells += [f"{row['bytes'][kind] / 2**20:.1f}" for kind in KINDS]
        rows.append(cells)
    return table(heads, rows)


def _harm_rows(results: Mapping[str, Any], part: str, key: str) -> list[list[str]]:
    rows = []
    for name, found in results[part].items():
        cells = [name]
        for role in ("trained", "unseen"):
            for what in ("least", "mean"):
                cells.append(_cell(found[s][key][role][what] for s in _seeds(results, part)))
        rows.append(cells)
    return rows


_HARM_HEADS = ["trained: least", "trained: mean", "unseen: least", "unseen: mean"]


def harm_table(results: Mapping[str, Any]) -> str:
    """Weightings against several harms, deep."""
    seeds = _seeds(results, "harms")
    rows = []
    growth, slower = (_harm_rows(results, "harms", k) for k in ("log_kappa_growth", "log_slowdown"))
    for (name, *first), (_, *second) in zip(growth, slower, strict=True):
        found = results["harms"][name]
        kept = _cell((found[s]["kept"] for s in seeds), ".3f", share=True)
        own = _cell(found[s]["log_kappa_primary_growth"] for s in seeds)
        rows.append([name, *first, *second[:1], *second[2:3], own, kept])
    heads = ["weighting", *(f"growth of log kappa, {head}" for head in _HARM_HEADS)]
    heads += ["log slow-down, trained: least", "log slow-down, unseen: least"]
    heads += ["growth of log kappa_P", "right on the task kept"]
    runs = [(name, s, one) for name, of in results["harms"].items() for s, one in of.items()]
    rates = [one.get("learning_rate") for _, s, one in runs if s in seeds]
    halved = [rate for rate in rates if rate is not None and rate < SETTINGS.learning_rate]
    count = len(seeds)
    words = f"{count} seeds; " + ("mean and 95 % interval." if count > 2 else "their values.")
    if halved:
        at = " or ".join(f"{rate:g}" for rate in sorted(set(halved), reverse=True))
        words += f" {len(halved)} of {len(rates)} runs ran away at the rate of the others, "
        words += f"{SETTINGS.learning_rate:g}, and were run again at {at}."
    if None in rates:
        words += f" {rates.count(None)} of the {len(rates)} come from an earlier version of the "
        words += "program, which recorded no rate."
    unused = [f"{name}, seed {s}" for name, s, _ in runs if s not in seeds]
    if unused:
        words += f" In the file, but not here, as other rows lack the seed: {'; '.join(unused)}."
    return "\n".join([table(heads, rows), "", words])


def linear_table(results: Mapping[str, Any]) -> str:
    """The same for linear extractors."""
    seeds = _seeds(results, "linear")
    rows = _harm_rows(results, "linear", "log_slowdown")
    for row in rows:
        found = results["linear"][row[0]]
        row.append(Interval.of_logs(found[s]["slowdown_primary"] for s in seeds).text())
    heads = [
        "method",
        *(f"log slow-down, {head}" for head in _HARM_HEADS),
        "slow-down of the task kept",
    ]
    words = f"{len(seeds)} seeds; mean and 95 % interval, of the last column the geometric mean."
    return "\n".join([table(heads, rows), "", words])


def mean_weighted() -> dict[str, Any]:
    """Seeds of MIMA without weights, out of ``mima_attackers.json``: the same attack and judge."""
    found = json.loads(OUT.with_name("mima_attackers.json").read_text(encoding="utf-8"))
    return {
        seed: {
            "recognised": {
                name: [count / found["images"] for count in one["recognised"]]
                for name, one in by_concept.items()
            }
        }
        for seed, by_concept in found["counts"]["mima"]["lora"].items()
    }


def mima_table(results: Mapping[str, Any]) -> str:
    """MIMA by weighting: the concept that is learnt best beside the mean."""
    rows = []
    for name, found in {"mean": mean_weighted(), **results["mima"]}.items():
        seeds = sorted(found, key=int)
        cells = [name, str(len(seeds))]
        for at in range(1, len(MIMA_STEPS)):
            by_seed = [[c[at] for c in found[s]["recognised"].values()] for s in seeds]
            cells.append(_cell(map(max, by_seed), share=True))
            cells.append(_cell(map(statistics.fmean, by_seed), share=True))
        rows.append(cells)
    heads = ["weighting", "seeds"]
    for step in MIMA_STEPS[1:]:
        heads += [f"least protected, {step} steps", f"mean, {step} steps"]
    lines = table(heads, rows)
    return "\n".join([lines, "", "Share of images recognised, mean of seeds and 95 % interval."])


def parts(results: Mapping[str, Any]) -> dict[str, str]:
    """What stands between the marks of the page."""
    return {
        "answer": answer(results),
        "attackers": attacker_table(results),
        "costs": cost_table(results),
        "harms": harm_table(results),
        "linear": linear_table(results),
        "mima": mima_table(results),
    }


def main() -> int:
    """Run the command line."""
    parser = result_parser(__doc__, OUT)
    parser.add_argument("--mnist", type=Path, help="folder of MNIST")
    parser.add_argument("--work", type=Path, default=Path("runs/deep"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    arguments = parser.parse_args()
    if fills(arguments, parts):
        return 0
    needs = {"attackers", "harms"} & set(arguments.parts)
    if arguments.mnist is None and needs:
        parser.error("--mnist must name the folder of MNIST")
    one_thread()
    measure(
        arguments.out,
        arguments.work,
        arguments.mnist,
        arguments.seeds,
        arguments.parts,
        arguments.quick,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
