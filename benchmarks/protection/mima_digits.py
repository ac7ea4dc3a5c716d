"""Multi-concept immunization on the digits pipeline: methods against attackers, over seeds.

    python -m benchmarks.protection.mima_digits --work runs/mima_digits

Digits three, five, eight and six are erased. Every method immunizes against the first three with a
seed of its own for each of five seeds; six is the specificity control; a new word is taught for
seven. All methods get the same steps, batches and retain term; the learning rates of methods and
attacks were tuned alike on other seeds (``mima_tuning``).

Finished attacks and immunizations are kept in ``--work``, so that an interrupted run goes on. The
result is ``benchmarks/protection/mima_digits.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

from immunize_ext.storage import to_json
from immunize_ext.text_to_image.attacks import ATTACKS
from immunize_ext.text_to_image.digits.judge import DigitJudge
from immunize_ext.text_to_image.evaluation import evaluate_text_to_image, pool
from immunize_ext.text_to_image.immunizers import ImmunizedPipeline
from immunize_ext.text_to_image.metrics.generation import Sampling
from immunize_ext.text_to_image.metrics.similarity import JudgedAccuracy

from .mima_task import CONTROL, NEW_WORD, TARGETS, digit, mima_task
from .mima_tuning import tuned, tuned_attack, tuned_method

OUT = Path(__file__).with_name("mima_digits.json")
METHOD_NAMES = ("mima", "loss_ascent", "joint_training", "merge_only", "imma")


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

    task = mima_task()
    rows = json.loads(arguments.out.read_text())["methods"] if arguments.out.is_file() else {}
    for name in arguments.methods:
        evaluations, shares, seconds = [], [], []
        rate = tuned()["methods"][name]["rate"]
        for seed in range(arguments.seeds):
            folder = arguments.work / f"{name}-{rate:g}-{seed}"
            if folder.is_dir():
                immunized = ImmunizedPipeline.load(folder)
            else:
                method = tuned_method(name).with_seed(seed)
                immunized = method.fit(task.model, task.fitted_by(name))
                immunized.save(folder)
            shares.append(immunized.merge_share)
            seconds.append(immunized.seconds / len(immunized.history))
            print(f"{name} {seed} immunized, {time.time() - started:.0f} s", flush=True)
            evaluations.append(
                evaluate_text_to_image(
                    task.model,
                    immunized.model,
                    task.judged,
                    attacks=[tuned_attack(attack) for attack in arguments.attacks],
                    measures={"accuracy": JudgedAccuracy()},
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
            "merge_share": shares,
            "seconds_per_step": seconds,
            "config": immunized.config,
        }
        print(name, "MSGR at threshold", found.msgr_at_threshold(), flush=True)
        result = {
            "command": "python -m benchmarks.protection.mima_digits",
            "judge_accuracy": DigitJudge().accuracy,
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
