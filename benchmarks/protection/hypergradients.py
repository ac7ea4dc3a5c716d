"""Hypergradients of MIMA: what each costs, and whether it points where a real attack is.

    python -m benchmarks.protection.hypergradients --work runs/hypergradients
    python -m benchmarks.protection.hypergradients --write docs/hypergradients.md   # its tables

On the digits pipeline with *three*, *five*, *eight* and *six* erased, at the weights that an
immunization starts from. Five estimators of the gradient by theta of the losses that are left after
K inner steps of three concepts and their merge, at two inner rates; beside them the gradient of
what attackers leave: 40 steps of AdamW at the rate of full fine-tuning on 20 images of a concept,
moving cross-attention alone or all layers, differentiated exactly by the same sweep. The cosine
between the two is over the cross-attention layers, which MIMA moves. An estimate and an attack are
drawn anew for every seed.

Memory is what graphs keep for their backward passes at the most, counted by saved-tensor hooks: the
same on every machine. Seconds are those of the process, on one thread, least of the seeds.

Everything finished is kept in ``--work``, and ``hypergradients.json`` is made of what is there: a
run that was stopped goes on, and what it left is a result with fewer seeds. Several processes may
work in one folder on different ``--parts``.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from immunize_ext.bilevel import (
    Adam,
    Composed,
    Hypergradient,
    Parameters,
    adapt,
    displacement_norm,
    gradient,
)
from immunize_ext.storage import environment, write_file
from immunize_ext.text_to_image.immunizers import MIMA
from immunize_ext.text_to_image.immunizers.batches import Batch, ConceptPool, generator_of
from immunize_ext.text_to_image.immunizers.bilevel import denoising_loss
from immunize_ext.text_to_image.immunizers.loop import Run
from immunize_ext.text_to_image.immunizers.parameters import scope_parameters

from .._kept import Kept
from .._page import fills, result_parser, table_row
from .mima_task import TARGETS, MimaTask, digit, mima_task
from .mima_tuning import tuned_attack

OUT = Path(__file__).with_suffix(".json")
ESTIMATORS: dict[str, dict[str, Any]] = {
    "first order": {},
    "unrolled": {"hypergradient": "unrolled"},
    "last step": {"hypergradient": "truncated", "hypergradient_steps": 1},
    "Neumann, 3 terms": {
        "hypergradient": "implicit",
        "solver": "neumann",
        "hypergradient_steps": 3,
    },
    "Gauss-Newton CG": {
        "hypergradient": "implicit",
        "curvature": "gauss_newton",
        "hypergradient_steps": 10,
    },
}
RECORDED = "autograd of the steps"
# The default, and one at which the first-order condition holds.
RATES = (10.0, 0.1)
STEPS = (1, 3, 5, 10)
ATTACKERS = {"attn2": "cross-attention", "all": "all layers"}
PARTS = ("estimates", "norms", "attn2", "pushes", "all")
# Rows of fewer are in the file alone.
LEAST_SEEDS = 2
# How far weights are pushed along an estimate: about one step of MIMA's Adam, 0.01 a number.
PUSH = 2.0
NOT_AT_ALL, AT_RANDOM = "not at all", "at random"
# Purposes of the draws of attacks, beside those of the loop.
ATTACK, LEFT = 11, 12
NAME = "hypergradients"


class Sizes(NamedTuple):
    """How much is done; less in a quick run."""

    steps: Sequence[int] = STEPS
    rates: Sequence[float] = RATES
    attack_steps: int = 40
    images: int = 20
    left: int = 48


QUICK = Sizes(steps=(1, 2), rates=(0.1,), attack_steps=2, images=2, left=2)


class Recorded(MIMA):
    """MIMA whose inner steps autograd records: what the sweep is compared with."""

    def adapt(
        self, run: Run, parameters: Parameters, batches: Sequence[Batch], how: Hypergradient
    ) -> Parameters:
        """Steps of gradient descent with ``create_graph``."""
        del how
        current = parameters
        for batch in batches:
            value = denoising_loss(run, batch)(current)
            slope = gradient(value, current, create_graph=True)
            current = {n: p - self.inner_rate * slope[n] for n, p in current.items()}
            run.inner_losses.append(float(value.detach()))
        return current


def flat(table: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in table.values()])


def started(task: MimaTask, settings: MIMA) -> tuple[Run, Parameters]:
    """A run before its first step, and its leaves."""
    run = Run(settings, task.model.clone(), task.fitted, None, None)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in run.moved.items()}
    return run, leaves


def estimate(task: MimaTask, settings: MIMA, seed: int) -> dict[str, Any]:
    """The gradient that a first step would raise losses along, and what it took."""
    run, leaves = started(task, settings)

    def once() -> list[Tensor]:
        losses = settings.attacked_losses(run, leaves, seed, 0)
        value = losses.clamp(max=settings.loss_clamp).mean()
        return list(torch.autograd.grad(value, list(leaves.values())))

    begun = time.process_time()
    found = once()
    seconds = time.process_time() - begun
    sweeps = [sweep for one in run.sweeps for sweep in one]
    inner = statistics.fmean(run.inner_losses[:: settings.inner_steps])
    last = statistics.fmean(run.inner_losses[settings.inner_steps - 1 :: settings.inner_steps])
    graphs = 0
    if seed == 0:
        with Kept() as kept:
            once()
        graphs = kept.most
    return {
        "gradient": torch.cat([part.flatten() for part in found]),
        "seconds": seconds,
        "bytes": graphs,
        "products": sum(sweep.products for sweep in sweeps),
        "contraction": statistics.fmean(s.contraction for s in sweeps) if sweeps else 1.0,
        "residual": max((s.residual for s in sweeps), default=0.0),
        "first_loss": inner,
        "last_loss": last,
    }


def norm_of_j(task: MimaTask, settings: MIMA, seed: int, pairs: int = 6) -> dict[str, float]:
    """Alpha |J| from below, by differences of gradients."""
    run, leaves = started(task, settings)
    how = Hypergradient("unrolled", operator="secant")

    def end(parameters: Parameters) -> Parameters:
        return settings.ends(run, parameters, seed, how)[0]

    return {"norm": displacement_norm(end, leaves, pairs=pairs)}


class AnAttack(NamedTuple):
    """Losses of its steps, the loss that it leaves, and its optimizer."""

    losses: list[Composed]
    left: Composed
    optimizer: Adam


def an_attack(run: Run, name: str, seed: int, sizes: Sizes) -> AnAttack:
    """Fine-tuning on images of one concept, all of its draws fixed."""
    concept, attack = digit(name), tuned_attack("full_fine_tuning")
    prompt = (attack.prompts([concept])[concept.name],)
    images = concept.images("attack")
    generator = generator_of(seed, 0, ATTACK)
    chosen = torch.randperm(len(images), generator=generator)[: sizes.images]
    pool = ConceptPool(run.model, images[chosen], prompt)
    losses = [
        denoising_loss(run, pool.draw(sizes.images, generator)) for _ in range(sizes.attack_steps)
    ]
    others = ConceptPool(run.model, concept.images("immunize"), prompt)
    left = denoising_loss(run, others.draw(sizes.left, generator_of(seed, 0, LEFT)))
    return AnAttack(losses, left, Adam(attack.learning_rate, weight_decay=attack.weight_decay))


def pushed(
    task: MimaTask, direction: Tensor, seed: int, sizes: Sizes, length: float = PUSH
) -> dict[str, float]:
    """Losses before and after attacks on cross-attention, from weights moved along a direction."""
    run, leaves = started(task, MIMA())
    parts = direction.split([p.numel() for p in leaves.values()])
    factor = length / float(direction.norm())
    theta = {
        name: p.detach() + factor * part.view_as(p)
        for (name, p), part in zip(leaves.items(), parts, strict=True)
    }
    before, after = [], []
    for name in TARGETS:
        losses, left, adam = an_attack(run, name, seed, sizes)
        with torch.no_grad():
            end = adapt(theta, losses, adam).parameters
            before.append(float(left(theta)))
            after.append(float(left(end)))
    return {"before": statistics.fmean(before), "after": statistics.fmean(after)}


def attacked(task: MimaTask, scope: str, name: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """The gradient, by the weights that are attacked, of the loss that an attack leaves.

    An attack draws 20 of the attacker's images and takes steps on all of them, every step with
    fresh noise, as the package's fine-tuning does; what it leaves is measured on other images.
    It clips gradients at norm 1 as a precaution, and this does not.
    """
    run, _ = started(task, MIMA(hypergradient="unrolled"))
    losses, left, adam = an_attack(run, name, seed, sizes)
    theta = {
        n: p.detach().clone().requires_grad_()
        for n, p in scope_parameters(run.model.unet, scope, function=NAME).items()  # type: ignore[arg-type]
    }
    begun = time.process_time()
    with run.inner():
        end = adapt(theta, losses, adam, Hypergradient("unrolled"))
        value = left(end.parameters)
        value.backward()
    seconds = time.process_time() - begun
    moved = [name for name in run.moved if name in theta]
    direct = torch.autograd.grad(left(theta), [theta[name] for name in moved])
    (sweep,) = end.sweeps
    return {
        "gradient": flat({n: theta[n].grad for n in moved}),  # type: ignore[misc]
        "plain": torch.cat([part.flatten() for part in direct]),
        "loss": float(value.detach()),
        "losses": end.losses,
        "contraction": sweep.contraction,
        "seconds": seconds,
    }


# --- what is kept, and the file that it becomes ---------------------------------------------------


class Part(NamedTuple):
    """Something that is measured once and kept.

    Attributes:
        kind: One of :data:`PARTS`.
        key: What it is of; the last is the seed.
        make: Measures it.
    """

    kind: str
    key: tuple[Any, ...]
    make: Callable[[], dict[str, Any]]

    def file(self, work: Path) -> Path:
        """Where it is kept."""
        words = "-".join(str(word) for word in self.key)
        return work / f"{self.kind}-{words.replace(' ', '_').replace(',', '')}.pt"


def along(task: MimaTask, part: Part, work: Path, sizes: Sizes) -> dict[str, float]:
    """A push along an estimate, which must be there."""
    found = torch.load(part.file(work), weights_only=True)
    return pushed(task, found["gradient"], part.key[-1], sizes)


def control(task: MimaTask, way: str, seed: int, sizes: Sizes) -> dict[str, float]:
    """No push, or one of the same length at random."""
    _, leaves = started(task, MIMA())
    size = sum(p.numel() for p in leaves.values())
    noise = torch.randn(size, generator=generator_of(seed, 1, ATTACK))
    return pushed(task, noise, seed, sizes, 0.0 if way == NOT_AT_ALL else PUSH)


def parts(task: MimaTask, work: Path, seeds: Sequence[int], quick: bool) -> list[Part]:
    """All of them, seed by seed."""
    sizes, found = QUICK if quick else Sizes(), []
    small: dict[str, Any] = {"batch_size": 2} if quick else {}
    for seed in seeds:
        for rate, steps in itertools.product(sizes.rates, sizes.steps):
            for name, chosen in ESTIMATORS.items():
                method = MIMA(inner_rate=rate, inner_steps=steps, **chosen, **small)
                make = partial(estimate, task, method, seed)
                found.append(Part("estimates", (rate, steps, name, seed), make))
            recorded = Recorded(
                inner_rate=rate, inner_steps=steps, hypergradient="unrolled", **small
            )
            make = partial(estimate, task, recorded, seed)
            found.append(Part("estimates", (rate, steps, RECORDED, seed), make))
            method = MIMA(inner_rate=rate, inner_steps=steps, **small)
            make = partial(norm_of_j, task, method, seed)
            if steps <= 3:
                found.append(Part("norms", (rate, steps, seed), make))
        pushes = [part for part in found if part.kind == "estimates" and part.key[3] == seed]
        for part in pushes:
            if part.key[0] == sizes.rates[0] and part.key[2] != RECORDED:
                found.append(Part("pushes", part.key, partial(along, task, part, work, sizes)))
        for way in (NOT_AT_ALL, AT_RANDOM):
            make = partial(control, task, way, seed, sizes)
            found.append(Part("pushes", (way, seed), make))
        for scope, name in itertools.product(ATTACKERS, TARGETS):
            make = partial(attacked, task, scope, name, seed, sizes)
            found.append(Part(scope, (name, seed), make))
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two directions, in float64."""
    lengths = float(a.double().norm() * b.double().norm())
    return float(a.double() @ b.double()) / lengths if lengths > 0.0 else 0.0


def over(values: Iterable[float]) -> dict[str, float]:
    """Mean, least and largest."""
    found = list(values)
    return {"mean": statistics.fmean(found), "min": min(found), "max": max(found)}


def attack_summary(rows: Mapping[tuple[str, int], Any]) -> tuple[dict[str, Any], Tensor]:
    """What is told of one attacker, and the mean direction over seeds."""
    seeds = [
        s for s in dict.fromkeys(key[1] for key in rows) if all((n, s) in rows for n in TARGETS)
    ]
    whole = {s: [rows[name, s] for name in TARGETS] for s in seeds}
    total = {s: torch.stack([row["gradient"] for row in whole[s]]).sum(0) for s in seeds}
    plain = {s: torch.stack([row["plain"] for row in whole[s]]).sum(0) for s in seeds}
    every = [row for s in seeds for row in whole[s]]
    pairs = [cosine(total[a], total[b]) for a, b in itertools.combinations(seeds, 2)]
    summary = {
        "seeds": seeds,
        "first_loss": over(row["losses"][0] for row in every),
        "last_loss": over(row["losses"][-1] for row in every),
        "loss_left": over(row["loss"] for row in every),
        "contraction": over(row["contraction"] for row in every),
        "cosine_between_seeds": over(pairs) if pairs else None,
        "cosine_with_plain_ascent": over(cosine(total[s], plain[s]) for s in seeds),
        "seconds": min(row["seconds"] for row in every),
    }
    return summary, torch.stack(list(total.values())).sum(0)


def result(found: Mapping[str, Mapping[tuple[Any, ...], Any]]) -> dict[str, Any]:
    """The content of the result file, of what is there."""
    attacks = {
        scope: attack_summary(found[scope])
        for scope in ATTACKERS
        if len(found[scope]) >= len(TARGETS)
    }
    table, estimates = [], found["estimates"]
    order = [*ESTIMATORS, RECORDED]
    keys = {key[:3] for key in estimates}
    for key in sorted(keys, key=lambda k: (-k[0], k[1], order.index(k[2]))):
        of = {k[3]: row for k, row in estimates.items() if k[:3] == key}
        rows, mean = list(of.values()), torch.stack([row["gradient"] for row in of.values()]).sum(0)
        table.append(
            {
                **dict(zip(("rate", "steps", "estimator"), key, strict=True)),
                "seeds": list(of),
                "seconds": min(row["seconds"] for row in rows),
                "bytes": max(row["bytes"] for row in rows),
                "products": rows[0]["products"],
                **{
                    name: over(row[name] for row in rows)
                    for name in ("contraction", "residual", "first_loss", "last_loss")
                },
                "cosine": {
                    scope: {
                        **over(cosine(row["gradient"], truth) for row in rows),
                        "of_the_mean": cosine(mean, truth),
                    }
                    for scope, (_, truth) in attacks.items()
                },
            }
        )
    pushes: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    still = {key[1]: row for key, row in found["pushes"].items() if key[0] == NOT_AT_ALL}
    for key, row in found["pushes"].items():
        if key[-1] in still and key[0] != NOT_AT_ALL:
            rise = {name: value - still[key[-1]][name] for name, value in row.items()}
            pushes.setdefault(key[:-1], {})[key[-1]] = rise
    norms: dict[tuple[Any, ...], list[float]] = {}
    for (rate, steps, _), row in found["norms"].items():
        norms.setdefault((rate, steps), []).append(row["norm"])
    return {
        "attacks": {scope: summary for scope, (summary, _) in attacks.items()},
        "estimators": table,
        "pushes": {
            "length": PUSH,
            "unmoved": {"seeds": list(still), **_by_name(still.values())},
            "rise": [
                {
                    "direction": AT_RANDOM if key == (AT_RANDOM,) else key[2],
                    "steps": None if key == (AT_RANDOM,) else key[1],
                    "seeds": list(rows),
                    **_by_name(rows.values()),
                }
                for key, rows in pushes.items()
            ],
        },
        "alpha_j": [
            {"rate": rate, "steps": steps, "seeds": len(values), **over(values)}
            for (rate, steps), values in norms.items()
        ],
    }


def _by_name(rows: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """Losses before and after, seed by seed."""
    found = list(rows)
    return {name: [row[name] for row in found] for name in ("before", "after")}


def measure(out: Path, work: Path, seeds: Sequence[int], kinds: Sequence[str], quick: bool) -> None:
    """Everything that is not there yet; then the file of all that is."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    task = mima_task()
    every = parts(task, work, seeds, quick)
    for part in every:
        file = part.file(work)
        if part.kind in kinds and not file.is_file():
            needed = part._replace(kind="estimates").file(work)
            if part.kind == "pushes" and len(part.key) == 4 and not needed.is_file():
                continue
            found = part.make()
            temporary = file.with_suffix(".part")
            torch.save(found, temporary)
            temporary.replace(file)
            print(part.key, {k: v for k, v in found.items() if isinstance(v, float)}, flush=True)
    have = [part for part in every if part.file(work).is_file()]
    loaded: dict[str, dict[tuple[Any, ...], Any]] = {kind: {} for kind in PARTS}
    for part in have:
        loaded[part.kind][part.key] = torch.load(part.file(work), weights_only=True)
    content = {
        "command": "python -m benchmarks.protection.hypergradients",
        "quick": quick,
        "targets": list(TARGETS),
        "attack_steps": (QUICK if quick else Sizes()).attack_steps,
        "attack_rate": tuned_attack("full_fine_tuning").learning_rate,
        "moved_parameters": sum(p.numel() for p in started(task, MIMA())[1].values()),
        "environment": environment(),
        **result(loaded),
    }
    write_file(out, (json.dumps(content, indent=1) + "\n").encode())


# --- the page -------------------------------------------------------------------------------------


def _range(value: Mapping[str, float], form: str = ".2f") -> str:
    return f"{value['mean']:{form}} ({value['min']:{form}} to {value['max']:{form}})"


def _each(values: Sequence[float], form: str) -> str:
    # A rise of nothing has no sign.
    return ", ".join(f"{value:{form}}" for value in (v if abs(v) >= 5e-5 else 0.0 for v in values))


def table(results: Mapping[str, Any]) -> str:
    """Estimators: cost and direction."""
    scopes = list(results["attacks"])
    heads = ["rate", "K", "hypergradient", "s", "MiB", "products", "left of the signal"]
    heads += [f"cosine, {ATTACKERS[scope]}" for scope in scopes]
    lines = [table_row(heads), "|" + "---|" * len(heads)]
    shown = [row for row in results["estimators"] if len(row["seeds"]) >= LEAST_SEEDS]
    for row in shown:
        cells = [f"{row['rate']:g}", str(row["steps"]), row["estimator"], f"{row['seconds']:.2f}"]
        cells += [f"{row['bytes'] / 2**20:.0f}" if row["bytes"] else "", str(row["products"])]
        swept = row["estimator"] not in ("first order", RECORDED)
        cells.append(f"{row['contraction']['mean']:.2f}" if swept else "")
        cells += [_range(row["cosine"][scope], ".3f") for scope in scopes]
        lines.append(table_row(cells))
    seeds = sorted({len(row["seeds"]) for row in shown})
    lines += [
        "",
        f"Seeds of a row: {' or '.join(map(str, seeds))}. s: processor seconds of one thread for a "
        "gradient, least of the seeds. MiB: what graphs keep at the most. Left of the signal: "
        "length of the gradient at theta over that at the end of adaptation. Cosines: mean (least "
        f"to largest) over seeds; random directions of {results['moved_parameters']} numbers have "
        f"{results['moved_parameters'] ** -0.5:.3f}.",
    ]
    return "\n".join(lines)


def attack_table(results: Mapping[str, Any]) -> str:
    """What the attacks did, and how far their gradient is from its own repetition."""
    heads = ["attacker", "seeds", "loss at first", "loss left", "signal over its length"]
    heads += ["cosine between seeds", "cosine with plain ascent"]
    lines = [table_row(heads), "|" + "---|" * len(heads)]
    for scope, row in results["attacks"].items():
        between = row["cosine_between_seeds"]
        cells = [ATTACKERS[scope], str(len(row["seeds"])), f"{row['first_loss']['mean']:.3f}"]
        cells += [f"{row['loss_left']['mean']:.3f}", _range(row["contraction"], ".1f")]
        cells += [_range(between, ".2f") if between else ""]
        cells += [_range(row["cosine_with_plain_ascent"], ".2f")]
        lines.append(table_row(cells))
    return "\n".join(lines)


def push_table(results: Mapping[str, Any]) -> str:
    """What a push along an estimate does to the losses before and after an attack."""
    pushes = results["pushes"]
    lines = [
        table_row(["pushed along", "K", "seeds", "rise before the attack", "rise after it"]),
        "|---|---|---|---|---|",
    ]
    for row in pushes["rise"]:
        cells = [row["direction"], str(row["steps"] or ""), str(len(row["seeds"]))]
        lines.append(table_row([*cells, _each(row["before"], ".3f"), _each(row["after"], ".4f")]))
    before, after = (pushes["unmoved"][name] for name in ("before", "after"))
    lines += [
        "",
        f"Seed by seed. Losses of unmoved weights: {_each(before, '.3f')} before, "
        f"{_each(after, '.3f')} after 40 steps.",
    ]
    return "\n".join(lines)


def condition_table(results: Mapping[str, Any]) -> str:
    """Alpha |J| where it was measured."""
    lines = [table_row(["rate", "K", "alpha J, norm at least", "seeds"]), "|---|---|---|---|"]
    for row in results["alpha_j"]:
        cells = [f"{row['rate']:g}", str(row["steps"]), _range(row, ".2f"), str(row["seeds"])]
        lines.append(table_row(cells))
    return "\n".join(lines)


TABLES = {
    "estimators": table,
    "pushes": push_table,
    "attacks": attack_table,
    "condition": condition_table,
}


def blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """What stands between the marks of the page."""
    return {name: make(results) for name, make in TABLES.items()}


def main() -> int:
    """Measure, or write the page."""
    parser = result_parser(__doc__, OUT)
    parser.add_argument("--work", type=Path, default=Path("runs/hypergradients"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    arguments = parser.parse_args()
    if fills(arguments, blocks):
        return 0
    measure(arguments.out, arguments.work, arguments.seeds, arguments.parts, arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
