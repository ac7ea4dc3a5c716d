"""Data sets, as tasks that immunizers, attackers and metrics take.

Only the digits come along (with scikit-learn); the others read local files.
"""

from immunize_ext.data._labels import parse_digits
from immunize_ext.data.digits import digits_task, load_digits
from immunize_ext.data.features import features_task
from immunize_ext.data.house_prices import house_prices_task
from immunize_ext.data.mnist import load_mnist, mnist_task, read_idx
from immunize_ext.data.task import Task

__all__ = [
    "Task",
    "digits_task",
    "features_task",
    "house_prices_task",
    "load_digits",
    "load_mnist",
    "mnist_task",
    "parse_digits",
    "read_idx",
]
