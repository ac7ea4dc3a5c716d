"""Samples from tensors and from data sets."""

import pytest
import torch
from torch.utils.data import TensorDataset

from immunize_ext.probing.data import Samples


def test_tensors_and_data_sets_agree() -> None:
    x, y = torch.randn(7, 2, 3), torch.arange(7)
    pair, dataset = Samples((x, y)), Samples(TensorDataset(x, y))
    assert len(pair) == len(dataset) == 7
    for samples in (pair, dataset, Samples(pair)):
        inputs, labels = samples.batch([6, 0])
        assert torch.equal(inputs, x[[6, 0]])
        assert labels.tolist() == [6, 0]
        assert torch.equal(torch.cat(list(samples.batches(3))), x)


def test_labels_of_a_data_set_may_be_numbers() -> None:
    inputs, labels = Samples([(torch.ones(2), 1), (torch.zeros(2), 0), (torch.ones(2), 2)]).batch(
        [2, 1]
    )
    assert inputs.shape == (2, 2)
    assert labels.tolist() == [2, 0]


def test_refusals() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"primary must be inputs \(n, \.\.\.\)"):
        Samples((x, torch.zeros(2)), name="primary")
    with pytest.raises(ValueError, match="must be a pair of tensors or a data set"):
        Samples(iter([x]))
    with pytest.raises(ValueError, match="must be a pair of tensors or a data set"):
        Samples((x, [0, 1, 2]))
    with pytest.raises(ValueError, match="at least one sample"):
        Samples((x[:0], torch.zeros(0)))
