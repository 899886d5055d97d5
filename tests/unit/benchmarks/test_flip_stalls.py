"""flip_stalls: a gap that spans a moment, against the gaps around it."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.flip_stalls import Moment, quiet_moments, stall_ms, stall_summary, stalls_ms

from xdeepserve.testing.watched_streams import StreamRecord

# A chunk each 100 ms, but for one gap of 350 ms that begins at 1.0 s.
ARRIVALS_S = np.cumsum([0.0, *[0.1] * 10, 0.35, *[0.1] * 10])


def test_the_gap_at_the_moment_counts_beyond_the_median_around() -> None:
    assert stall_ms(Moment(1.1, 1.12), ARRIVALS_S) == pytest.approx(250.0)
    assert stall_ms(Moment(0.52, 0.54), ARRIVALS_S) == pytest.approx(0.0)


@pytest.mark.parametrize("moment", [Moment(-0.1, 0.05), Moment(2.3, 2.4), Moment(5.0, 5.1)])
def test_an_answer_that_does_not_span_the_moment_is_left_out(moment: Moment) -> None:
    assert stall_ms(moment, ARRIVALS_S) is None
    assert stall_ms(moment, ARRIVALS_S[:1]) is None


def test_quiet_moments_are_like_those_they_stand_beside() -> None:
    quiet = quiet_moments(10.0, 14.0, [Moment(0.0, 0.1), Moment(3.0, 3.1)])
    assert [moment.begin_s for moment in quiet] == [11.0, 13.0]
    assert [moment.end_s - moment.begin_s for moment in quiet] == pytest.approx([0.1, 0.1])
    assert quiet_moments(10.0, 14.0, []) == []


def test_every_stream_counts_at_every_moment() -> None:
    records = [StreamRecord(arrivals_s=ARRIVALS_S.tolist()) for _ in range(3)]
    stalls = stalls_ms([Moment(1.1, 1.12), Moment(0.52, 0.54)], records)
    found = stall_summary(stalls)
    assert found["count"] == 6
    assert found["longest_ms"] == pytest.approx(250.0)
    assert stall_summary([]) == {"count": 0}
