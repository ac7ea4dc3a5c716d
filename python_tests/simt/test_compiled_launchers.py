"""What only the host code that nvcc compiled does: run by ``make ptx``."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def compiled(simt: ModuleType) -> Any:
    if not hasattr(simt, "shared_limits"):
        pytest.skip("needs the launchers that nvcc compiles (make ptx)")
    return simt


def test_the_shared_memory_of_a_kernel_is_allowed_once(compiled: Any) -> None:
    """A limit that followed the shapes could be lowered between another thread's two calls."""

    def solve(side: int) -> None:
        compiled.precondition.small_float64(np.ones((2, side)), np.eye(side))

    def limits() -> Any:
        found = compiled.shared_limits().items()
        return {name: set_ for name, set_ in found if "small_precondition" in name and "Id" in name}

    for side in (64, 128, 100, 128):
        solve(side)
    (of_kernel,) = limits().values()
    assert of_kernel == [227 * 1024]


def test_a_kernel_without_much_shared_memory_asks_for_nothing(compiled: Any) -> None:
    compiled.precondition.small_float32(np.ones((2, 64), np.float32), np.eye(64))
    names = [name for name in compiled.shared_limits() if "small_precondition" in name]
    assert not [name for name in names if "IfE" in name]
