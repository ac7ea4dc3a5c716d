"""What an attacker gets who asks by another word, seen by judges that can say "none of these".

    python -m benchmarks.protection.mima_words [--seeds 5]
    python -m benchmarks.protection.mima_words --write docs/mima.md    the tables alone, or --check

For each seed MIMA immunizes the digits pipeline against three, five and eight; LoRA then
learns each of them on the immunized model and on its erased twin, under the own name, a rare word
and an unrelated one, and is judged at step 0, 10, 20 and 40. A success is an image that is near
enough to real ones and recognised. Beside it stand the second judge, of another family, and the
share of images that show any digit at all: at step 0 that is what the immunization did to other
words.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunize_ext.quantities import binomial_interval
from immunize_ext.storage import environment
from immunize_ext.text_to_image.attacks import Target
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.digits.judge import DigitJudge
from immunize_ext.text_to_image.metrics.generation import Sampling
from immunize_ext.text_to_image.model import TextToImage

from .mima_task import TARGETS, digit, mima_task
from .mima_tuning import tuned_attack, tuned_method

OUT = Path(__file__).with_suffix(".json")
BEGIN, END = "<!-- words:begin -->", "<!-- words:end -->"
STEPS, IMAGES = (0, 10, 20, 40), 32
# How the attacker asks, in training and afterwards.
WORDS = {
    "own name": "canonical",
    "rare word": "rare_token",
    "unrelated word": "unrelated_word",
}
SIDES = {"without": "erased", "with": "MIMA"}
SCORES = ("recognised", "second judge", "any digit")


class Judged:
    """Counts of images, by judge, at each step of one attack."""

    def __init__(self, judges: Sequence[DigitJudge], concept: Concept, prompt: str, seed: int):
        assert concept.label is not None
        self.judges, self.label, self.prompt = judges, concept.label, prompt
        self.sampling = Sampling(images=IMAGES).for_seed(seed)

    def __call__(self, model: TextToImage, step: int) -> dict[str, float]:
        """Of the images that the model draws after a step."""
        images: Tensor = self.sampling.generate(model, self.prompt)
        said = [judge.predict(images) for judge in self.judges]
        return {
            "recognised": float((said[0] == self.label).sum()),
            "second judge": float((said[1] == self.label).sum()),
            "any digit": float((said[0] >= 0).sum()),
        }


def attacked(
    models: Mapping[str, TextToImage], judges: Sequence[DigitJudge], seed: int
) -> dict[str, Any]:
    """Counts by word, side, concept and score."""
    attack = tuned_attack("lora")
    found: dict[str, Any] = {}
    for word, prompt in WORDS.items():
        for side, model in models.items():
            for name in TARGETS:
                concept = digit(name)
                asked = attack.prompts(Target([concept], prompt))[name]
                judged = Judged(judges, concept, asked, seed)
                target = Target([concept], prompt, judged, STEPS)
                curve = attack.run(model, target, steps=STEPS[-1], seed=seed)
                found.setdefault(word, {}).setdefault(side, {})[name] = curve.scores
    return found


def measure(seeds: int) -> dict[str, Any]:
    """Everything."""
    torch.set_num_threads(1)
    started = time.time()
    judges = DigitJudge(), DigitJudge("trees")
    task = mima_task()
    rows = []
    for seed in range(seeds):
        immunized = tuned_method("mima").with_seed(seed).fit(task.model, task.fitted)
        models = {"without": task.model, "with": immunized.model}
        rows.append(attacked(models, judges, seed))
        print(f"seed {seed}, {time.time() - started:.0f} s", flush=True)
    return {
        "command": f"python -m benchmarks.protection.mima_words --seeds {seeds}",
        "seeds": seeds,
        "images": IMAGES,
        "steps": list(STEPS),
        "targets": list(TARGETS),
        "judges": [
            {"family": judge.family, "bound": judge.bound, **judge.errors._asdict()}
            for judge in judges
        ],
        "counts": rows,
        "seconds": time.time() - started,
        "environment": environment(),
    }


def total(found: Mapping[str, Any], word: str, side: str, score: str, at: int) -> int:
    """Count over seeds and targets at one of the steps."""
    return sum(int(row[word][side][name][score][at]) for row in found["counts"] for name in TARGETS)


def tables(found: Mapping[str, Any]) -> str:
    """The counts in Markdown: shares with 95 % Clopper-Pearson intervals."""
    images = found["seeds"] * len(TARGETS) * found["images"]
    steps = ", ".join(map(str, found["steps"]))
    lines = [
        f"| LoRA asks by | model | recognised after {steps} steps | by the second judge "
        "| any digit |",
        "|---|---|---|---|---|",
    ]
    for word in WORDS:
        for side, model in SIDES.items():
            cells = []
            for score in SCORES:
                counts = [total(found, word, side, score, at) for at in range(len(found["steps"]))]
                shares = [f"{count / images:.2f}" for count in counts]
                if score == "recognised":
                    ends = [binomial_interval(count, images) for count in counts]
                    shares = [
                        f"{share} ({low:.2f} to {high:.2f})"
                        for share, (low, high) in zip(shares, ends, strict=True)
                    ]
                cells.append(", ".join(shares))
            lines.append("| " + " | ".join([word, model, *cells]) + " |")
    first, second = found["judges"]
    sensitivity = [sum(judge["sensitivity"]) / 10 for judge in (first, second)]
    lines += [
        "",
        f"{found['seeds']} seeds, an immunization of its own for each, three concepts, "
        f"{found['images']} images: {images} a cell. The intervals are those of the images and "
        "leave out the scatter between seeds. The judges accept and recognise "
        f"{sensitivity[0]:.1%} and {sensitivity[1]:.1%} of real images they have not seen. "
        f"`{found['command']}`, {found['seconds'] / 60:.0f} minutes on one core.",
    ]
    return "\n".join(lines)


def filled(page: str, found: Mapping[str, Any]) -> str:
    """The page with the tables between the marks."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must have the marks {BEGIN} and {END} once")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{tables(found)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Measure, or write or check the tables of the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--check", type=Path, metavar="PAGE")
    arguments = parser.parse_args()
    page = arguments.write or arguments.check
    if page is None:
        OUT.write_text(json.dumps(measure(arguments.seeds), indent=1) + "\n", encoding="utf-8")
        return 0
    text = page.read_text(encoding="utf-8")
    wanted = filled(text, json.loads(OUT.read_text(encoding="utf-8")))
    if arguments.write is not None:
        page.write_text(wanted, encoding="utf-8")
        return 0
    if text != wanted:
        print(f"{page} is not what {OUT.name} says", file=sys.stderr)
    return int(text != wanted)


if __name__ == "__main__":
    sys.exit(main())
