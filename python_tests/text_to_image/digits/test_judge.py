"""The judge of digits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from immunize_ext.text_to_image.digits.images import digit_images
from immunize_ext.text_to_image.digits.judge import DigitJudge


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return DigitJudge()


def test_real_images_it_has_never_seen(judge):
    # 240 images: the standard error of a share near 0.97 is 0.011, so 0.94 is three of them off.
    assert judge.accuracy > 0.94
    for split in ("attack", "immunize"):
        images, labels = digit_images(split)
        assert (judge.predict((images + 1) / 2) == labels.numpy()).mean() > 0.94


def test_score_is_a_share(judge):
    images, _ = digit_images("attack", 4)
    right = judge.predict((images + 1) / 2) == 4
    assert judge.score((images + 1) / 2, 4) == right.mean()
    assert judge.score((images + 1) / 2, 5) < 0.1


def test_two_judges_agree_bit_for_bit(judge):
    images = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (judge.predict(images) == DigitJudge().predict(images)).all()


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
def test_wrong_images_are_refused(judge, images, message):
    with pytest.raises(ValueError, match=message):
        judge.predict(images)


def test_no_image_has_no_share(judge):
    assert judge.predict(torch.zeros(0, 1, 8, 8)).shape == (0,)
    with pytest.raises(ValueError, match="at least one"):
        judge.score(torch.zeros(0, 1, 8, 8), 3)
