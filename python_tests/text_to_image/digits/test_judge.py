"""The judges of digits: what they recognise, and what they refuse to call a digit."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")

from immunize_ext.text_to_image.digits.images import digit_images
from immunize_ext.text_to_image.digits.judge import (
    NONE,
    REJECTED,
    DigitJudge,
    Family,
    agreement,
)

FAMILIES: tuple[Family, ...] = ("kernel", "trees")


@pytest.fixture(scope="module", params=FAMILIES)
def judge(request: pytest.FixtureRequest) -> DigitJudge:
    return DigitJudge(request.param)


def real(split: str) -> tuple[Tensor, np.ndarray]:
    images, labels = digit_images(split)  # type: ignore[arg-type]
    return (images + 1) / 2, labels.numpy()


def border_strokes(count: int, generator: torch.Generator) -> Tensor:
    """Bright rows and columns at the border, as immunized models draw them for other words."""
    images = torch.zeros(count, 1, 8, 8)
    sides = [np.s_[0, 0, :], np.s_[0, 7, :], np.s_[0, :, 0], np.s_[0, :, 7]]
    for image in images:
        for side in torch.randperm(4, generator=generator)[: 1 + count % 2].tolist():
            image[sides[side]] = torch.rand(8, generator=generator) * 0.5 + 0.5
    return images


def test_real_images_it_has_never_seen(judge: DigitJudge) -> None:
    # 400 images: the standard error of a share near 0.95 is 0.011, so 0.91 is four of them off.
    assert judge.accuracy > 0.91
    for split in ("attack", "immunize", "train"):
        images, labels = real(split)
        assert (judge.predict(images) == labels).mean() > 0.93


def test_at_most_two_in_a_hundred_real_images_are_rejected(judge: DigitJudge) -> None:
    images = torch.cat([real(split)[0] for split in ("attack", "immunize", "train")])
    rejected = (judge.predict(images) == NONE).sum()
    # The bound holds on average over draws of the judge's images; three standard errors of 1397
    # Bernoulli trials on top.
    assert rejected <= REJECTED * len(images) + 3 * np.sqrt(REJECTED * len(images))


@pytest.mark.parametrize(
    "kind", ["uniform", "normal", "blank", "white", "grey", "border", "shuffled"]
)
def test_what_is_no_digit_is_rejected(judge: DigitJudge, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images, _ = real("train")
    shuffled = images[:200].flatten(1)
    order = torch.rand(shuffled.shape, generator=generator).argsort(1)
    garbage = {
        "uniform": torch.rand(200, 1, 8, 8, generator=generator),
        "normal": torch.randn(200, 1, 8, 8, generator=generator).clamp(-1, 1).add(1).div(2),
        "blank": torch.zeros(1, 1, 8, 8),
        "white": torch.ones(1, 1, 8, 8),
        "grey": torch.full((1, 1, 8, 8), 0.5),
        "border": border_strokes(200, generator),
        "shuffled": shuffled.gather(1, order).view(-1, 1, 8, 8),
    }[kind]
    assert (judge.predict(garbage) == NONE).all()
    assert judge.accepted(garbage) == 0.0
    assert all(judge.score(garbage, digit) == 0.0 for digit in range(10))


def test_the_distance_is_what_decides(judge: DigitJudge) -> None:
    images, _ = real("attack")
    faded = images * torch.linspace(1.0, 0.0, len(images)).view(-1, 1, 1, 1)
    distance, said = judge.distance(faded), judge.predict(faded)
    assert ((distance > judge.bound) == (said == NONE)).all()
    assert 0 < (said == NONE).sum() < len(said)


def test_the_bound_does_not_depend_on_the_family() -> None:
    bounds = {DigitJudge(family).bound for family in FAMILIES}
    assert len(bounds) == 1


def test_errors_are_those_of_a_confusion_table(judge: DigitJudge) -> None:
    errors = judge.errors
    assert errors.images == 40
    assert len(errors.sensitivity) == len(errors.false_positives) == 10
    # Whatever is not recognised is missed or taken for another digit.
    taken = sum(errors.false_positives) * 9 / 10
    assert taken <= 1.0 - judge.accuracy + 1e-12


def test_score_is_a_share(judge: DigitJudge) -> None:
    images = (digit_images("attack", 4)[0] + 1) / 2
    assert judge.score(images, 4) == (judge.predict(images) == 4).mean()
    assert judge.score(images, 5) < 0.1


def test_two_judges_of_a_family_agree_bit_for_bit(judge: DigitJudge) -> None:
    images, _ = real("attack")
    blurred = (images + images.flip(0)) / 2
    again = pickle.loads(pickle.dumps(judge))
    assert (judge.predict(blurred) == again.predict(blurred)).all()


def test_agreement_of_families() -> None:
    images, _ = real("attack")
    first, second = (DigitJudge(family) for family in FAMILIES)
    assert agreement(first, first, images) == (1.0, 1.0)
    found = agreement(first, second, images)
    assert 0.9 < found.kappa <= found.share < 1.0
    assert agreement(first, second, torch.zeros(3, 1, 8, 8)) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 8, 8), r"shape \(n, 1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), r"shape \(n, 1, 8, 8\)"),
        (-torch.ones(1, 1, 8, 8), r"in \[0, 1\], got \[-1, -1\]"),
        (torch.full((1, 1, 8, 8), 16.0), r"in \[0, 1\]"),
        (torch.full((1, 1, 8, 8), torch.nan), "finite"),
    ],
)
def test_wrong_images_are_refused(judge: DigitJudge, images: Tensor, message: str) -> None:
    for judged in (judge.predict, judge.distance):
        with pytest.raises(ValueError, match=message):
            judged(images)


def test_no_image_has_no_share(judge: DigitJudge) -> None:
    assert judge.predict(torch.zeros(0, 1, 8, 8)).shape == (0,)
    assert judge.distance(torch.zeros(0, 1, 8, 8)).shape == (0,)
    for share in (judge.accepted, lambda images: judge.score(images, 3)):
        with pytest.raises(ValueError, match="at least one"):
            share(torch.zeros(0, 1, 8, 8))


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="family must be one of kernel, trees, got 'forest'"):
        DigitJudge("forest")  # type: ignore[arg-type]
