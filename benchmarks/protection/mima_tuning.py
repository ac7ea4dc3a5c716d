"""Learning rates of immunizers and attacks on the digits pipeline, tuned alike.

    python -m benchmarks.protection.mima_tuning --work runs/mima_tuning

Every attack gets four rates, every immunizer three, all of them two seeds, and none of these seeds
is used by ``mima_digits``. An attack takes the rate that brings the *unprotected* model highest,
mean over steps 10, 20 and 40. An immunizer takes the rate with the highest mean SGR of its targets
at step 20 of LoRA so tuned, among those that cost what has to be kept at most 0.05 accuracy (if
none does, the one that costs least); IMMA is judged on the one concept that it immunizes. The
result is ``benchmarks/protection/mima_tuning.json``; ``mima_digits`` reads its rates from there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from immunize_ext.storage import to_json, write_file
from immunize_ext.text_to_image.attacks import (
    ATTACKS,
    TextToImageAttack,
    asked_by,
    tune_learning_rate,
)
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.evaluation import evaluate_text_to_image
from immunize_ext.text_to_image.immunizers import METHODS, ImmunizedPipeline
from immunize_ext.text_to_image.metrics.generation import Sampling
from immunize_ext.text_to_image.metrics.similarity import JudgedAccuracy
from immunize_ext.text_to_image.model import TextToImage

from .mima_task import MimaTask, mima_task

OUT = Path(__file__).with_name("mima_tuning.json")
SEEDS, RESULT_SEEDS = (100, 101), (0, 1, 2, 3, 4)
METHOD_RATES = (3e-3, 1e-2, 3e-2)
# A first guess, a third of it, and three and nine times as much.
ATTACK_RATES = {
    name: (guess / 3, guess, 3 * guess, 9 * guess)
    for name, guess in (
        ("lora", 3e-3),
        ("full_fine_tuning", 3e-4),
        ("textual_inversion", 2e-2),
        ("dreambooth", 1e-3),
    )
}
STEP, MOST_LOSS = 20, 0.05
# Those with a learning rate.
METHOD_NAMES = sorted(name for name in METHODS if hasattr(METHODS[name], "learning_rate"))


def tuned() -> dict[str, Any]:
    """What was tuned, as committed."""
    found: dict[str, Any] = json.loads(OUT.read_text(encoding="utf-8"))
    return found


def tuned_attack(name: str) -> TextToImageAttack:
    """The attack at its tuned rate, under its own name; as registered if it was not tuned.

    ``lora:rare_token`` is LoRA that asks by a rare word.
    """
    base, _, wording = name.partition(":")
    attack: Any = ATTACKS[base]
    found = tuned()["attacks"].get(base)
    attack = attack if found is None else replace(attack, learning_rate=found["rate"])
    return asked_by([attack], [wording] if wording else [])[0]


def tuned_method(name: str) -> Any:
    """The immunizer at its tuned rate."""
    return method_at(name, tuned()["methods"][name]["rate"])


def method_at(name: str, rate: float) -> Any:
    """The immunizer at a rate; merge only is made of IMMA runs, whose rate it is."""
    return METHODS.build(name, {"learning_rate": rate}, "mima_tuning")


def best_rate(table: dict[float, dict[str, float]]) -> float:
    """The rate to take; see the module docstring. Of equal ones the smallest."""
    allowed = [rate for rate, row in table.items() if row["retained_change"] >= -MOST_LOSS]
    if allowed:
        return min(allowed, key=lambda rate: (-table[rate]["msgr"], rate))
    return min(table, key=lambda rate: (-table[rate]["retained_change"], rate))


def tune_method(task: MimaTask, name: str, lora: Any, work: Path) -> dict[str, Any]:
    """One immunizer at all rates."""
    table: dict[float, dict[str, float]] = {}
    for rate in METHOD_RATES:
        msgr, change = [], []
        for seed in SEEDS:
            folder = work / f"{name}-{rate:g}-{seed}"
            if folder.is_dir():
                immunized = ImmunizedPipeline.load(folder)
            else:
                method = method_at(name, rate).with_seed(seed)
                immunized = method.fit(task.model, task.fitted_by(name))
                immunized.save(folder)
            evaluation = evaluate_text_to_image(
                task.model,
                immunized.model,
                task.judged_for(name),
                attacks=[lora],
                measures={"accuracy": JudgedAccuracy()},
                steps=STEP,
                evaluate_at=(0, STEP),
                seeds=(seed,),
                kept_images=0,
                sampling=Sampling(images=32),
                out=work / "attacks",
            )
            msgr.append(evaluation.msgr().at(STEP).mean)
            change.append(evaluation.retained_change().mean)
        table[rate] = {
            "msgr": math.fsum(msgr) / len(msgr),
            "retained_change": math.fsum(change) / len(change),
        }
        print(f"{name} {rate:g}: {table[rate]}", flush=True)
    return {"rate": best_rate(table), "table": {f"{rate:g}": row for rate, row in table.items()}}


def tune_attack(task: MimaTask, name: str) -> dict[str, Any]:
    """One attack at all rates on the unprotected model, mean over the concepts, one at a time."""
    attack: Any = ATTACKS[name]
    measure = JudgedAccuracy()

    def score_of(concept: Concept) -> dict[float, float]:
        prompt = attack.prompts([concept])[concept.name]

        def evaluate(model: TextToImage, step: int) -> dict[str, float]:
            del step
            images = Sampling(images=32).for_seed(SEEDS[0]).generate(model, prompt)
            return {"accuracy": measure(images, concept)}

        found = tune_learning_rate(
            attack,
            task.model,
            [concept],
            evaluate,
            rates=ATTACK_RATES[name],
            steps=40,
            seeds=SEEDS,
            reserved_seeds=RESULT_SEEDS,
            evaluate_at=(10, 20, 40),
        )
        return found.table

    tables = [score_of(concept) for concept in task.fitted.concepts]
    table = {rate: math.fsum(t[rate] for t in tables) / len(tables) for rate in tables[0]}
    print(f"{name}: {table}", flush=True)
    best = min(table, key=lambda rate: (-table[rate], rate))
    return {
        "rate": float(f"{best:.12g}"),
        "table": {f"{rate:g}": score for rate, score in table.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and write; what the file holds already is kept for names that are not asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/mima_tuning"))
    parser.add_argument("--methods", nargs="*", default=METHOD_NAMES, choices=METHOD_NAMES)
    parser.add_argument(
        "--attacks", nargs="*", default=list(ATTACK_RATES), choices=sorted(ATTACK_RATES)
    )
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.time()
    task = mima_task()
    written = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    methods, attacks = written.get("methods", {}), written.get("attacks", {})

    def save() -> None:
        result = {
            "command": "python -m benchmarks.protection.mima_tuning",
            "judge": JudgedAccuracy().identity(),
            "seeds": SEEDS,
            "step": STEP,
            "most_retained_loss": MOST_LOSS,
            "methods": methods,
            "attacks": attacks,
        }
        text = json.dumps(to_json(result), indent=1, allow_nan=False) + "\n"
        write_file(arguments.out, text.encode())

    if arguments.methods and "lora" not in {*attacks, *arguments.attacks}:
        parser.error("methods are tuned against the tuned LoRA; add --attacks lora")
    for name in arguments.attacks:
        attacks[name] = tune_attack(task, name)
        save()
    for name in arguments.methods:
        lora: Any = ATTACKS["lora"]
        lora = replace(lora, learning_rate=attacks["lora"]["rate"])
        methods[name] = tune_method(task, name, lora, arguments.work)
        save()
    print(f"{time.time() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
