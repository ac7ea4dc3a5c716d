"""Data sets, as tasks that immunizers, attackers and metrics take.

Only the digits come along (with scikit-learn); the others read local files, which
:func:`fetch_mnist` and :func:`fetch_house_prices` download where there is a network.
"""

from __future__ import annotations

from immunize_ext.probing.data.digits import digits_task, load_digits, parse_digits
from immunize_ext.probing.data.download import fetch_house_prices, fetch_mnist
from immunize_ext.probing.data.features import features_task
from immunize_ext.probing.data.gram_equivalent import gram_equivalent, gram_rows
from immunize_ext.probing.data.house_prices import house_prices_task
from immunize_ext.probing.data.image_folder import ImageFolder, folder_features, image_folder_task
from immunize_ext.probing.data.mnist import load_mnist, mnist_task, read_idx
from immunize_ext.probing.data.problem import Problem, check_names, load_problem, other_pairs
from immunize_ext.probing.data.samples import Samples
from immunize_ext.probing.data.task import Task, TaskLike

__all__ = [
    "ImageFolder",
    "Problem",
    "Samples",
    "Task",
    "TaskLike",
    "check_names",
    "digits_task",
    "features_task",
    "fetch_house_prices",
    "fetch_mnist",
    "folder_features",
    "gram_equivalent",
    "gram_rows",
    "house_prices_task",
    "image_folder_task",
    "load_digits",
    "load_mnist",
    "load_problem",
    "mnist_task",
    "other_pairs",
    "parse_digits",
    "read_idx",
]
