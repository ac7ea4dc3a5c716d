"""How kappa_P keeps to a corridor while kappa_H rises: controllers compared, linear and deep.

    python -m benchmarks.protection.corridor --mnist ../shared/data/mnist
    python -m benchmarks.protection.corridor --write docs/corridor.md     # the page's tables

Linear: MNIST at 7 x 7 pixels, from the whitened start, against the closed-form optimum. Deep: the
last layer of a small network on the 8 x 8 digits; what is judged is kappa_P of all its training
samples before every step, not what the controller believes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from immunize_ext.probing.data import Problem, gram_equivalent, load_digits, load_problem
from immunize_ext.probing.immunizers import (
    ControllerName,
    DeepExtractorImmunizer,
    MultiplicativeImmunizer,
    WhiteningImmunizer,
)
from immunize_ext.probing.metrics import pencil

from .._page import fills, result_parser
from ._outcomes import one_thread, write

OUT = Path(__file__).with_name("corridor.json")
RIDGE, HIGH, STEPS = 1e-3, 30.0, 400
DEEP_HIGH, DEEP_STEPS, BURN_IN, SEEDS = 1000.0, 150, 30, 2
GOAL = 0.95
# How kappa_P is measured: steps between two measurements, and samples.
LOOKS = {
    "all samples, every step": (1, None),
    "all samples, every 5 steps": (5, None),
    "200 samples, every step": (1, 200),
    "64 samples, every step": (1, 64),
}


def linear(folder: Path) -> dict[str, Any]:
    """Each controller on MNIST 7 x 7, 3:8 kept and 4:9 harmful."""
    problem = load_problem("mnist", "3:8", ("4:9",), data_dir=str(folder), size=7)
    tasks = gram_equivalent(problem.primary), gram_equivalent(problem.harmful[0])
    small = Problem.of(*tasks)
    values = pencil(*(task.x_train for task in tasks), ridge=RIDGE).values
    start = WhiteningImmunizer(ridge=RIDGE, rotate=False).fit(None, small).theta
    rows = []
    for controller in ("projection", *get_args(ControllerName)):
        immunizer = MultiplicativeImmunizer(
            STEPS, 0.0, 0.025, ridge=RIDGE, corridor=(1.0, HIGH), controller=controller
        )
        history = immunizer.fit(start, small).history
        kappas = [math.exp(record["log_kappa_primary"]) for record in history]
        tail = kappas[STEPS // 3 :]
        rows.append(
            {
                "controller": controller,
                "kappa_last": kappas[-1],
                "kappa_least": min(tail),
                "kappa_largest": max(tail),
                "inside": sum(kappa <= HIGH * (1 + 1e-6) for kappa in kappas) / len(kappas),
                "log_kappa_harmful": history[-1]["log_kappa_harmful"],
            }
        )
        print(rows[-1], flush=True)
    best = math.log(HIGH) + float((values[0] / values[-1]).log())
    return {"best_log_kappa_harmful": best, "rows": rows}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels of the digits 0 to 4, kept, and 5 to 9, harmful."""
    images, labels = (torch.from_numpy(part) for part in load_digits())
    x, y = images.reshape(len(images), -1).to(torch.float32), labels.to(torch.int64)
    x = (x - x.mean()) / x.std()
    kept = y < 5
    return x[kept], y[kept], x[~kept], y[~kept] - 5


def network(seed: int, x: Tensor, y: Tensor) -> nn.Module:
    """A small network, trained on the task to keep."""
    generator = torch.Generator().manual_seed(seed)
    body = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 16))
    head = nn.Linear(16, 5)
    for parameter in (*body.parameters(), *head.parameters()):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8.0)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    for _ in range(100):
        chosen = torch.randperm(len(x), generator=generator)[:128]
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(body(x[chosen])), y[chosen]).backward()
        optimizer.step()
    return body.requires_grad_(False)


def log_kappa(features: Tensor, floor: float) -> float:
    """Of H + floor I."""
    values = torch.linalg.svdvals(features.to(torch.float64)).square() + floor
    return float((values[0] / values[-1]).log())


@contextmanager
def watched(body: nn.Module, x: Tensor, floor: float) -> Iterator[list[float]]:
    """The log of kappa_P of all samples before every step of whatever optimizer runs inside."""
    seen: list[float] = []
    hidden = body[:2](x)  # type: ignore[index]

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weight, bias = (p.detach() for p in optimizer.param_groups[0]["params"])
        seen.append(log_kappa(hidden @ weight.mT + bias, floor))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def deep_row(settings: DeepExtractorImmunizer, seed: int) -> dict[str, Any]:
    """One run, judged on all training samples."""
    x, y, x_harm, y_harm = digits()
    body = network(seed, x, y)
    floors = []
    for rows in (x, x_harm):
        sigma = torch.linalg.svdvals(body(rows).to(torch.float64))
        floors.append(settings.corridor_ridge * float(sigma[0]) ** 2)
    problem: Problem[Any] = Problem.of((x, y), (x_harm, y_harm))
    with watched(body, x, floors[0]) as seen:
        found = replace(settings, seed=seed).fit(body, problem)
    kappas = [math.exp(value) for value in seen]
    with torch.no_grad():
        harmful = log_kappa(found.extractor(x_harm), floors[1])
        right = float((found.head(found.extractor(x)).argmax(1) == y).double().mean())
    tail = kappas[BURN_IN:]
    return {
        "seed": seed,
        "kappa_start": kappas[0],
        "kappa_last": kappas[-1],
        "kappa_largest": max(tail),
        "inside": sum(kappa <= DEEP_HIGH for kappa in tail) / len(tail),
        "log_kappa_harmful": harmful,
        "log_kappa_harmful_start": log_kappa(body(x_harm), floors[1]),
        "accuracy": right,
    }


def deep() -> list[dict[str, Any]]:
    """Controllers by how kappa_P is measured, and constant lambdas of R_well."""
    plain = DeepExtractorImmunizer(
        ("2",), objective="r_ill", steps=DEEP_STEPS, learning_rate=3e-3, share=3.0
    )
    runs: list[tuple[str, str, DeepExtractorImmunizer]] = [("none", "", plain)]
    for kind in get_args(ControllerName):
        for look, (every, samples) in LOOKS.items():
            if kind == "sqp" or look == "all samples, every step":
                corridor = replace(
                    plain,
                    corridor=(1.0, DEEP_HIGH),
                    controller=kind,
                    corridor_every=every,
                    corridor_samples=samples,
                )
                runs.append((kind, look, corridor))
    for weight in (1e-8, 1e-7, 1e-6, 2e-6):
        constant = replace(plain, objective="condition_number", lambda_well=weight)
        runs.append((f"constant lambda_P {weight:g}", "", constant))
    rows = []
    for name, look, settings in runs:
        for seed in range(SEEDS if not name.startswith("constant") else 1):
            rows.append({"controller": name, "measured": look, **deep_row(settings, seed)})
            print(rows[-1], flush=True)
    return rows


# --- the page -------------------------------------------------------------------------------------


def _of(rows: list[dict[str, Any]], controller: str, measured: str) -> list[dict[str, Any]]:
    return [r for r in rows if (r["controller"], r["measured"]) == (controller, measured)]


def answer(results: dict[str, Any]) -> str:
    """The first sentence of the page."""
    sqp = next(r for r in results["linear"]["rows"] if r["controller"] == "sqp")
    dual = next(r for r in results["linear"]["rows"] if r["controller"] == "dual")
    kept = _of(results["deep"], "sqp", "all samples, every step")
    share = sum(row["inside"] for row in kept) / len(kept)
    return (
        f'Yes: tangent and normal steps (`controller="sqp"`) end at kappa_P = '
        f"{sqp['kappa_last']:.1f} with log kappa_H = {sqp['log_kappa_harmful']:.3f} of "
        f"{results['linear']['best_log_kappa_harmful']:.3f}, the largest there is, where dual "
        f"ascent swings from {dual['kappa_least']:.1f} to {dual['kappa_largest']:.0f}; on a deep "
        f"extractor, with kappa_P streamed over all samples before every step, {share:.1%} of the "
        f"steps after the first {BURN_IN} are inside."
    )


def linear_table(results: dict[str, Any]) -> str:
    """Controllers on MNIST."""
    lines = [
        "| controller | kappa_P, last | least | largest | share inside | log kappa_H |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["linear"]["rows"]:
        lines.append(
            f"| {row['controller']} | {row['kappa_last']:.2f} | {row['kappa_least']:.2f} "
            f"| {row['kappa_largest']:.2f} | {row['inside']:.1%} "
            f"| {row['log_kappa_harmful']:.3f} |"
        )
    return "\n".join(lines)


def deep_table(results: dict[str, Any]) -> str:
    """Controllers on a deep extractor: means over seeds."""
    lines = [
        "| controller | kappa_P measured on | share inside (least) | kappa_P, largest | last "
        "| log kappa_H | right on the task kept |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = results["deep"]
    for controller, measured in dict.fromkeys((r["controller"], r["measured"]) for r in rows):
        chosen = _of(rows, controller, measured)

        def mean(key: str, chosen: list[dict[str, Any]] = chosen) -> float:
            return sum(float(row[key]) for row in chosen) / len(chosen)

        lines.append(
            f"| {controller} | {measured} | {mean('inside'):.1%} "
            f"({min(row['inside'] for row in chosen):.1%}) "
            f"| {max(row['kappa_largest'] for row in chosen):.3g} | {mean('kappa_last'):.3g} "
            f"| {mean('log_kappa_harmful'):.2f} | {mean('accuracy'):.3f} |"
        )
    return "\n".join(lines)


def parts(results: dict[str, Any]) -> dict[str, str]:
    """What stands between the marks of the page."""
    return {
        "answer": answer(results),
        "linear": linear_table(results),
        "deep": deep_table(results),
    }


def main() -> None:
    """Run the command line."""
    parser = result_parser(__doc__, OUT)
    parser.add_argument("--mnist", type=Path, help="folder of MNIST")
    arguments = parser.parse_args()
    one_thread()
    if fills(arguments, parts):
        return
    if arguments.mnist is None:
        parser.error("--mnist must name the folder of MNIST")
    command = "python -m benchmarks.protection.corridor --mnist DATA/mnist"
    write(arguments.out, command, {"deep": deep(), "linear": linear(arguments.mnist)})


if __name__ == "__main__":
    main()
