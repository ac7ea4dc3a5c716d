"""Multi-concept immunization on the digits pipeline: methods against attackers, over seeds.

    python -m benchmarks.protection.mima_digits --work runs/mima_digits

Digits three, five, eight and six are erased. Every method immunizes against the first three with a
seed of its own for each of five seeds; six is the specificity control; a new word is taught for
seven. All methods get the same steps, batches and retain term; the learning rates of methods and
attacks were tuned alike on other seeds (``mima_tuning``). ``never_learnt`` is no method but the
outside option of an attacker: a pipeline trained as the bundled one was, without the erased digits;
protection beyond it buys nothing.

Finished attacks and immunizations are kept in ``--work``, so that an interrupted run goes on. The
result is ``benchmarks/protection/mima_digits.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from immunize_ext.storage import to_json
from immunize_ext.text_to_image.attacks import ATTACKS
from immunize_ext.text_to_image.digits.judge import DigitJudge
from immunize_ext.text_to_image.digits.pipeline import build_digits_pipeline
from immunize_ext.text_to_image.evaluation import evaluate_text_to_image, pool
from immunize_ext.text_to_image.immunizers import ImmunizedPipeline
from immunize_ext.text_to_image.metrics.generation import Measure, Sampling
from immunize_ext.text_to_image.metrics.similarity import AcceptedShare, JudgedAccuracy
from immunize_ext.text_to_image.model import TextToImage

from .mima_task import CONTROL, NEW_WORD, TARGETS, MimaTask, digit, mima_task
from .mima_tuning import tuned, tuned_attack, tuned_method

OUT = Path(__file__).with_name("mima_digits.json")
NEVER = "never_learnt"
METHOD_NAMES = ("mima", "loss_ascent", "joint_training", "merge_only", "imma", NEVER)


class Made(NamedTuple):
    """A model to attack, and how it was made."""

    model: TextToImage
    merge_share: float
    seconds_per_step: float
    config: dict[str, Any]


def never_learnt(folder: Path) -> Made:
    """The outside option."""
    if not folder.is_dir():
        build_digits_pipeline(folder, without=(*TARGETS, CONTROL))
    model = TextToImage.from_pretrained(folder)
    return Made(model, math.nan, math.nan, {"without": [*TARGETS, CONTROL], "seed": 0})


def immunized(task: MimaTask, name: str, seed: int, folder: Path) -> Made:
    """One immunization, made or taken from its folder."""
    if folder.is_dir():
        found = ImmunizedPipeline.load(folder)
    else:
        found = tuned_method(name).with_seed(seed).fit(task.model, task.fitted_by(name))
        found.save(folder)
    steps = len(found.history)
    return Made(found.model, found.merge_share, found.seconds / steps, found.config)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/mima_digits"))
    parser.add_argument("--methods", nargs="+", default=list(METHOD_NAMES), choices=METHOD_NAMES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--attacks", nargs="+", default=["lora"], choices=sorted(ATTACKS))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()

    task, judge = mima_task(), DigitJudge()
    measures: dict[str, Measure] = {
        "accuracy": JudgedAccuracy(judge),
        "second judge": JudgedAccuracy(DigitJudge("trees")),
        "any digit": AcceptedShare(judge),
    }
    rows = json.loads(arguments.out.read_text())["methods"] if arguments.out.is_file() else {}
    for name in arguments.methods:
        evaluations, every = [], []
        for seed in range(arguments.seeds):
            if name == NEVER:
                made = never_learnt(arguments.work / name)
            else:
                rate = tuned()["methods"][name]["rate"]
                made = immunized(task, name, seed, arguments.work / f"{name}-{rate:g}-{seed}")
            every.append(made)
            print(f"{name} {seed} made, {time.time() - started:.0f} s", flush=True)
            evaluations.append(
                evaluate_text_to_image(
                    task.model,
                    made.model,
                    task.judged,
                    attacks=[tuned_attack(attack) for attack in arguments.attacks],
                    measures=measures,
                    control=digit(CONTROL),
                    new_word_concept=digit(NEW_WORD),
                    steps=40,
                    evaluate_at=(0, 10, 20, 40),
                    seeds=(seed,),
                    kept_images=0,
                    sampling=Sampling(images=32),
                    out=arguments.work / "attacks",
                )
            )
            print(f"{name} {seed} attacked, {time.time() - started:.0f} s", flush=True)
        found = pool(evaluations)
        rows[name] = {
            "evaluation": found.to_dict(losses=False),
            "merge_share": [one.merge_share for one in every],
            "seconds_per_step": [one.seconds_per_step for one in every],
            "config": every[-1].config,
        }
        print(name, "MSGR at threshold", found.msgr_at_threshold(), flush=True)
        result = {
            "command": f"python -m benchmarks.protection.mima_digits --seeds {arguments.seeds}",
            "judge": judge.identity(),
            "judge_accuracy": judge.accuracy,
            "targets": TARGETS,
            "control": CONTROL,
            "new_word": NEW_WORD,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "methods": rows,
        }
        text = json.dumps(to_json(result), indent=1, allow_nan=False)
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
