"""The digits in four parts that share no image."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from immunize_ext.text_to_image.digits.images import IMAGES_PER_DIGIT, SPLITS, digit_images


def test_parts_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    rows = [digit_images(split)[0].flatten(1) for split in SPLITS]
    assert sum(map(len, rows)) == 1797
    # The data set itself holds no image twice, so distinct rows are distinct images.
    together = torch.cat(rows)
    assert len(together.unique(dim=0)) == len({tuple(row) for row in load_digits().data})
    assert len(together.unique(dim=0)) == 1797


@pytest.mark.parametrize("split", ["attack", "immunize", "judge"])
def test_sizes_labels_and_range(split):
    images, labels = digit_images(split)
    assert images.dtype == torch.float32
    assert images.shape[1:] == (1, 8, 8)
    assert (images.min(), images.max()) == (-1.0, 1.0)
    assert torch.bincount(labels).tolist() == [IMAGES_PER_DIGIT[split]] * 10
    for digit in (0, 7):
        ours, their = digit_images(split, digit)
        assert torch.equal(ours, images[labels == digit])
        assert set(their.tolist()) == {digit}


def test_the_caller_owns_what_it_gets():
    images, labels = digit_images("attack", 3)
    images.zero_()
    labels.zero_()
    again = digit_images("attack", 3)
    assert bool(again[0].any())
    assert set(again[1].tolist()) == {3}


@pytest.mark.parametrize(("split", "digit"), [("test", None), ("attack", 10), ("attack", -1)])
def test_bad_arguments_are_named(split, digit):
    with pytest.raises(ValueError, match=r"digit_images: (split|digit) must be"):
        digit_images(split, digit)
