"""Raw merge operators with lists and shapes that do not fit: refused by name, never read past."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sample_inputs import gaussian, sample_inputs, taking_route

NAMES = {
    "merge_apply": ("base", "targets", "rows", "targets_are_values", "c", "b"),
    "merge_apply_backward": (
        "grad", "base", "targets", "rows", "targets_are_values", "c", "b", "residual",
    ),
}  # fmt: skip


def arguments(operator: str, **changes: Any) -> list[Any]:
    """Of a good call, two layers and two concepts, with some replaced."""
    found = list(sample_inputs(operator)[0].arguments)
    for name, change in changes.items():
        place = NAMES[operator].index(name)
        found[place] = change(found[place])
    return found


def drop(tensors: list[Any]) -> list[Any]:
    return tensors[:-1]


def more(tensors: list[Any]) -> list[Any]:
    return [*tensors, tensors[0]]


def nothing(tensors: list[Any]) -> list[Any]:
    return []


def shorter(tensors: list[Any]) -> list[Any]:
    return [tensors[0][..., :1, :], *tensors[1:]]


def narrower(tensors: list[Any]) -> list[Any]:
    return [tensors[0][..., :-1], *tensors[1:]]


SHARED = [
    ({"base": nothing}, "base must hold at least one layer"),
    ({"targets": drop}, "targets must hold 4 tensors, got 3"),
    ({"targets": more}, "targets must hold 4 tensors, got 5"),
    ({"targets": nothing}, "targets must hold 4 tensors, got 0"),
    ({"targets": shorter}, "targets must have shape"),
    ({"targets": narrower}, "targets must have shape"),
    ({"rows": lambda _: [-1, 4]}, "rows must"),
    ({"rows": lambda _: [2, 2]}, "rows must"),
    ({"rows": lambda _: []}, "rows must"),
    ({"rows": lambda _: [2**62, 2**62]}, "rows must"),
    ({"b": lambda b: b[:1]}, "b must have shape"),
    ({"c": lambda c: c[:, :-1]}, "must have shape"),
    ({"c": lambda c: c[0]}, "c must have shape"),
]
BACKWARD = [
    ({"grad": drop}, "grad must hold .*, got 1"),
    ({"grad": nothing}, "grad must hold .*, got 0"),
    ({"grad": more}, "grad must hold .*, got 3"),
    ({"grad": shorter}, "grad must have shape"),
    ({"grad": narrower}, "grad must have shape"),
    ({"residual": drop}, "residual must hold .*, got 1"),
    ({"residual": shorter}, "residual must have shape"),
    ({"residual": narrower}, "residual must have shape"),
    ({"residual": lambda r: [x.float() for x in r]}, "residual must have dtype"),
    ({"grad": lambda g: [x.float() for x in g]}, "grad must have dtype"),
]


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        *(("merge_apply", *case) for case in SHARED),
        *(("merge_apply_backward", *case) for case in (*SHARED, *BACKWARD)),
    ],
)
def test_lists_that_do_not_fit_are_named(
    route: str, operator: str, changes: dict[str, Any], message: str
) -> None:
    with (
        taking_route(route),
        pytest.raises(ValueError, match=f"^{operator}: (?s:.*){message}"),
    ):
        getattr(torch.ops.immunize_ext, operator)(*arguments(operator, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: lambda chol: chol[:-1]}, "chol must have shape"),
        ({0: lambda chol: chol[:, :-1]}, "chol must have shape"),
        ({1: lambda c: c[:, :-1]}, "must have shape"),
        ({2: lambda h: h[:-1]}, "inverse_hardness must have shape"),
        ({2: lambda h: h[:, None]}, "inverse_hardness must have shape"),
        ({1: lambda c: c.float()}, "c must have .*dtype"),
    ],
)
def test_solve_refuses_shapes_that_do_not_fit(
    route: str, changes: dict[int, Any], message: str
) -> None:
    given = list(sample_inputs("merge_solve")[0].arguments)
    for place, change in changes.items():
        given[place] = change(given[place])
    with (
        taking_route(route),
        pytest.raises(ValueError, match=f"^merge_solve: (?s:.*){message}"),
    ):
        torch.ops.immunize_ext.merge_solve(*given)


@pytest.mark.parametrize("shape", [(3,), (3, 0), (2, 3, 4)])
def test_gram_refuses_what_is_no_matrix(route: str, shape: tuple[int, ...]) -> None:
    with taking_route(route), pytest.raises(ValueError, match="merge_gram: c_reg must have shape"):
        torch.ops.immunize_ext.merge_gram(gaussian(*shape))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_solve_says_that_its_input_is_not_finite(route: str, place: int, bad: float) -> None:
    """A status for each problem of the batch, and no error: the others are solved."""
    chol, c, hardness, *rest = sample_inputs("merge_solve")[5].arguments
    assert c.shape[0] == 2
    given = [chol.clone(), c.clone(), hardness, *rest]
    given[place][1, -1, 0] = bad
    with taking_route(route):
        b, *_, rank = torch.ops.immunize_ext.merge_solve(*given)
        right, *_ = torch.ops.immunize_ext.merge_solve(chol, c, hardness, *rest)
    assert rank.tolist() == [c.shape[1], -1]
    torch.testing.assert_close(b[0], right[0])


def test_apply_says_which_layer_failed_and_how(route: str) -> None:
    base, targets, *rest = sample_inputs("merge_apply")[6].arguments
    assert base[0].dtype == torch.float32
    base = [w.clone() for w in base]
    with taking_route(route):
        *_, status = torch.ops.immunize_ext.merge_apply(base, targets, *rest)
        assert status.tolist() == [0, 0]
        base[1][0, 0] = float("nan")
        *_, status = torch.ops.immunize_ext.merge_apply(base, targets, *rest)
        assert (status & 1).tolist() == [0, 1]
        large = [w * 1e30 for w in rest[-1:]]
        *_, status = torch.ops.immunize_ext.merge_apply(
            [w * 0 + 1e20 for w in targets[:2]], targets, *rest[:-1], *large
        )
        assert status.tolist() == [2, 2]
