"""Shares and means with intervals that say what they do not know."""

from __future__ import annotations

import math

from scipy import stats
from torch.testing import assert_close

from tiltmeter.lm.measurement import Measurement, mean, share


def test_share_has_wilsons_interval() -> None:
    measured = share(9, 12, 3)
    z = stats.norm.ppf(0.95)
    p, n = 9 / 12, 12
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert_close((measured.low, measured.high), ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)))
    assert (measured.value, measured.n, measured.unscored, measured.unit) == (0.75, 12, 3, "share")
    wider = share(9, 12, level=0.99)
    assert wider.low < measured.low < measured.high < wider.high


def test_no_share_is_certain_and_none_of_nothing_is_known() -> None:
    assert share(0, 5).low == 0 < share(0, 5).high
    assert share(5, 5).low < share(5, 5).high == 1
    assert share(0, 0, 4) == Measurement(None, None, None, 0, 4, "share", "no item could be scored")


def test_mean_counts_what_is_not_finite_apart() -> None:
    measured = mean([1.0, float("nan"), 3.0, 2.0, float("inf")], "nats")
    assert (measured.value, measured.n, measured.unscored) == (2.0, 3, 2)
    assert measured.low < 2 < measured.high
    assert mean([4.0], "nats") == Measurement(4.0, None, None, 1, 0, "nats", "one item gives no interval")
    assert mean([float("nan")], "nats") == Measurement(None, None, None, 0, 1, "nats", "no item could be scored")
    assert measured.as_dict()["unit"] == "nats"


def test_an_interval_ends_where_the_quantity_does():
    values = [0.001, 0.002, 3.0]
    assert mean(values, "nats").low < 0
    bounded = mean(values, "nats", floor=0.0)
    assert bounded.low == 0.0
    assert (bounded.value, bounded.high) == (mean(values, "nats").value, mean(values, "nats").high)
