"""UCE erasure equals its published formula, and does what erasure is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from immunize_ext.ops.erasure import uce

D = 12


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def published(
    w0: Tensor,
    erase: Tensor,
    replace: Tensor,
    preserve: Tensor | None,
    ridge: float,
    erase_scale: float,
    preserve_scale: float,
) -> np.ndarray:
    """(lambda W0 + sum mu v c^T)(lambda I + sum mu c c^T)^-1 by numpy, term by term."""
    w = w0.numpy()
    left = ridge * w
    right = ridge * np.eye(w.shape[1])
    pairs = [(c, w @ r, erase_scale) for c, r in zip(erase.numpy(), replace.numpy(), strict=True)]
    if preserve is not None:
        pairs += [(c, w @ c, preserve_scale) for c in preserve.numpy()]
    for c, v, mu in pairs:
        left = left + mu * np.outer(v, c)
        right = right + mu * np.outer(c, c)
    result: np.ndarray = np.linalg.solve(right.T, left.T).T
    return result


@pytest.mark.parametrize("preserved", [0, 3, 20])
def test_equals_the_published_formula(preserved: int) -> None:
    base = [random(5, D, seed=1), random(7, D, seed=2)]
    erase, replace = random(2, D, seed=3), random(2, D, seed=4)
    preserve = random(preserved, D, seed=5) if preserved else None
    edited = uce(
        base, erase, replace, preserve=preserve, ridge=0.2, erase_scale=1.5, preserve_scale=0.3
    )
    for w0, w in zip(base, edited, strict=True):
        expected = published(w0, erase, replace, preserve, 0.2, 1.5, 0.3)
        # Two s x s or d x d solves with condition numbers below 1e4.
        np.testing.assert_allclose(w.numpy(), expected, rtol=1e-10, atol=1e-10)


def test_a_small_ridge_sends_the_token_where_its_replacement_goes() -> None:
    w0, erase, replace = random(5, D, seed=1), random(1, D, seed=3), random(1, D, seed=4)
    edited = uce([w0], erase, replace, ridge=1e-8)[0]
    torch.testing.assert_close(edited @ erase[0], w0 @ replace[0], rtol=1e-6, atol=1e-6)


def test_preserved_tokens_move_less() -> None:
    w0, erase, replace = random(5, D, seed=1), random(1, D, seed=3), random(1, D, seed=4)
    other = erase + 0.3 * random(1, D, seed=6)  # a neighbour, which erasing alone would drag along

    def moved(preserve: Tensor | None) -> float:
        edited = uce([w0], erase, replace, preserve=preserve, preserve_scale=10.0)[0]
        return float(((edited - w0) @ other[0]).norm())

    assert moved(other) < 0.3 * moved(None)


def test_replacing_a_token_by_itself_changes_no_bit() -> None:
    w0, erase = random(5, D, seed=1), random(2, D, seed=3)
    assert torch.equal(uce([w0], erase, erase)[0], w0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_the_weights_is_kept(dtype: torch.dtype) -> None:
    w0, erase, replace = random(5, D, seed=1), random(1, D, seed=3), random(1, D, seed=4)
    edited = uce([w0.to(dtype)], erase.to(dtype), replace.to(dtype))[0]
    assert edited.dtype == dtype
    expected = uce([w0.to(dtype).double()], erase.to(dtype).double(), replace.to(dtype).double())[0]
    bound = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert (edited.double() - expected).abs().max() <= bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replace": torch.ones(3, D)}, "must have the shape of erase"),
        ({"erase": torch.ones(2, D + 1)}, "erase must have shape"),
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"erase_scale": float("inf")}, "erase_scale must be positive"),
        ({"base": []}, "at least one layer"),
        ({"erase": torch.full((2, D), float("nan"))}, "finite"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "base": [torch.ones(4, D)],
        "erase": torch.eye(D)[:2],
        "replace": torch.eye(D)[2:4],
    }
    with pytest.raises(ValueError, match=message):
        uce(**(arguments | change))  # type: ignore[arg-type]
