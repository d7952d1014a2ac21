"""Intervals solve their own equation, and cover as often as they say."""

from __future__ import annotations

import math

import pytest

from safelora.rates import Z95, Mean, Rate, wilson


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # From the roots of (p - k/n)^2 = z^2 p (1 - p) / n, worked out separately in decimal arithmetic.
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (15, 50, 0.191036, 0.437504), (1, 2, 0.094531, 0.905469)],
)
def test_wilson(hits, total, low, high):
    assert wilson(hits, total) == pytest.approx((low, high), abs=2e-6)


def test_wilson_ends_solve_its_equation():
    z = 1.959964
    for hits, total in [(3, 72), (36, 72), (70, 72), (20, 40)]:
        for end in wilson(hits, total):
            assert (hits / total - end) ** 2 == pytest.approx(z * z * end * (1 - end) / total, rel=1e-9)


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_rejects_impossible_counts(hits, total):
    with pytest.raises(ValueError, match=f"found {hits} of {total}"):
        wilson(hits, total)


def test_wilson_covers_as_often_as_it_says():
    """Exact coverage over all outcomes of n trials, averaged over p: near 95 %, and nowhere far below."""
    n = 40
    coverage = []
    for step in range(1, 100):
        p = step / 100
        masses = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        coverage.append(sum(m for k, m in enumerate(masses) if wilson(k, n)[0] <= p <= wilson(k, n)[1]))
    assert 0.945 < sum(coverage) / len(coverage) < 0.965
    assert min(coverage) > 0.83


def test_rates_add_overlap_and_print():
    few, many = Rate.of([True, False, False, False]), Rate(90, 100)
    assert few + many == Rate(91, 104)
    assert not few.overlaps(many) and few.overlaps(Rate(1, 2))
    assert str(Rate(15, 50)) == "30% [19%, 44%]"
    assert Rate(15, 50).to_dict() == {
        "value": 0.3, "interval": pytest.approx([0.191036, 0.437504], abs=1e-6), "hits": 15, "total": 50,
    }  # fmt: skip


def test_means():
    mean = Mean.of([1.0, 2.0, 3.0, 6.0])
    assert mean.value == 3.0
    assert mean.error == pytest.approx((14 / 3 / 4) ** 0.5)
    assert mean.interval == pytest.approx((3 - Z95 * mean.error, 3 + Z95 * mean.error))
    assert Mean.of([4.0]).interval == (4.0, 4.0)
    with pytest.raises(ValueError, match="no outcome"):
        Mean.of([])
