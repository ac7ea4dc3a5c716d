"""RIR from features: policies, groups, full data."""

import math

import pytest
import torch

from immunize_ext.errors import NumericalWarning
from immunize_ext.probing.metrics import deep_rir, grouped_rir
from immunize_ext.probing.metrics.rir import computed_rank_rtol, feature_ratio


def features(n: int, scales: list[float], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(scales), dtype=torch.float64, generator=generator)
    # Orthogonal columns, so that the condition number of all rows is known.
    return torch.linalg.qr(x).Q * torch.tensor(scales, dtype=torch.float64)


def test_full_data_is_the_ratio_of_known_condition_numbers() -> None:
    base_p, new_p = features(400, [2.0, 1.0]), features(400, [3.0, 2.0])
    base_h, new_h = features(400, [2.0, 1.0], 1), features(400, [9.0, 3.0], 1)
    ratio = deep_rir(new_p, base_p, new_h, base_h)
    for policy in ("official", "rank_aware"):
        log_i, log_ii = ratio.full[policy]  # type: ignore[index]
        assert log_i == pytest.approx(math.log(9.0 / 4.0), abs=1e-5)
        assert log_ii == pytest.approx(math.log(2.25 / 4.0), abs=1e-5)
    assert ratio.mean_rir("rank_aware") == pytest.approx(4.0, rel=0.5)
    assert abs(ratio.log_bias("rank_aware")) < 0.5
    assert ratio.log_spread() > 0.0


def test_ridge_is_that_of_the_original_model() -> None:
    base, new = features(50, [2.0, 0.0]), features(50, [4.0, 0.0])
    # lambda_max 4 and 16, ridge 1e-2 * 4 for both: (16.04 / 0.04) / (4.04 / 0.04).
    found = feature_ratio(new, base, policy="ridge", ridge=1e-2, rank_rtol=None).log
    assert float(found) == pytest.approx(math.log(16.04 / 4.04), abs=1e-9)
    # Its own ridge for each would have made it 0.
    same = feature_ratio(2.0 * base, base, policy="rank_aware", ridge=0.0, rank_rtol=None).log
    assert float(same) == pytest.approx(0.0, abs=1e-9)


def test_identical_models_give_exactly_one() -> None:
    x, h = features(120, [1.0, 2.0, 3.0]), features(120, [3.0, 2.0, 1.0], 1)
    ratio = deep_rir(x, x, h, h)
    for policy in ("official", "ridge", "rank_aware"):
        assert torch.equal(ratio.groups[policy].rir, torch.ones(20, dtype=torch.float64))  # type: ignore[index]
        assert ratio.full[policy] == (0.0, 0.0)  # type: ignore[index]
        assert ratio.log_bias(policy) == 0.0  # type: ignore[arg-type]


def test_small_groups_are_warned_of_once_and_count_largest_eigenvalues_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200, 30, dtype=torch.float64, generator=generator)
    new = base.clone()
    new[:, 0] *= 5.0
    with pytest.warns(NumericalWarning, match="rank-deficient") as caught:
        ratio = deep_rir(base, base, new, base, groups=3, group_size=20)
    assert len(caught) == 1
    chosen = torch.Generator().manual_seed(0)
    index = torch.randperm(200, generator=chosen)[:20]
    top = [torch.linalg.matrix_norm(x[index], 2) ** 2 for x in (new, base)]
    expected = float(top[0] / top[1])
    assert float(ratio.groups["official"].i[0]) == pytest.approx(expected, rel=1e-5)
    assert float(ratio.groups["ridge"].i[0]) == pytest.approx(expected, rel=1e-2)
    # Full data sees that the smallest eigenvalue is as it was and the largest is not.
    assert math.exp(ratio.full["rank_aware"][0]) > expected


def test_same_groups_as_grouped_rir() -> None:
    x, h = features(90, [1.0, 2.0]), features(90, [2.0, 1.0], 1)
    ratio = deep_rir(x, h, h, x, groups=4, group_size=30, ridge=1e-3, seed=5)
    for policy in ("official", "ridge", "rank_aware"):
        alone = grouped_rir(
            x,
            h,
            h,
            x,
            groups=4,
            group_size=30,
            ridge=1e-3,
            seed=5,
            policy=policy,  # type: ignore[arg-type]
        )
        assert torch.equal(alone.rir, ratio.groups[policy].rir)  # type: ignore[index]


def test_refusals() -> None:
    x = features(50, [1.0, 2.0])
    with pytest.raises(ValueError, match="policy must be"):
        grouped_rir(x, x, x, x, group_size=10, policy="plain")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups and group_size must be at least 1"):
        deep_rir(x, x, x, x, groups=0, group_size=10)
    with pytest.raises(ValueError, match="at least group_size=100"):
        deep_rir(x, x, x, x)
    with pytest.raises(ValueError, match="ridge must be finite"):
        deep_rir(x, x, x, x, group_size=10, ridge=-1.0)


@pytest.mark.parametrize("held", [torch.float32, torch.float64])
def test_rank_is_cut_at_the_precision_that_features_were_computed_in(held: torch.dtype) -> None:
    """Two networks with the same features to rounding: RIR is 1 under every policy."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 6, generator=generator).relu()
    last = torch.randn(6, 24, generator=generator)  # 24 features of rank 6
    order = torch.randperm(6, generator=generator)
    base, new = hidden @ last, hidden[:, order] @ last[order]  # another order of summation
    assert not torch.equal(base, new)
    base, new = base.to(held), new.to(held)
    rtol = None if held == torch.float32 else computed_rank_rtol(base, torch.float32)
    ratio = deep_rir(base, base, new, base, groups=5, group_size=50, rank_rtol=rtol)
    for policy in ("rank_aware", "ridge"):
        assert ratio.full[policy][0] == pytest.approx(0.0, abs=1e-4)  # type: ignore[index]
        assert ratio.mean_rir(policy) == pytest.approx(1.0, abs=1e-3)  # type: ignore[arg-type]
    assert ratio.ranks["rank_aware"] == (6, 6, 6, 6)
    assert ratio.groups["rank_aware"].rank_harmful.tolist() == [6] * 5
    # Cut at float64's own tolerance, rounding errors of float32 are counted as directions.
    fine = deep_rir(base, base, new, base, groups=5, group_size=50, rank_rtol=1e-14)
    assert fine.ranks["rank_aware"][0] > 6
    assert abs(fine.full["rank_aware"][0]) > 1e-2
