"""FFN and expert workers of a running service: they freeze and thaw, share work, come and go."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multiproc.exactness import Topology
from tests.multiproc.toy_service import check_texts_during, toy_service
from xdeepserve.launch.run_dir import RunDirectory
from xdeepserve.testing.fault_drill import thaw_worker
from xdeepserve.testing.live_service import LiveRun

pytestmark = pytest.mark.slow

FROZEN_S = 1.5
"""Longer than groups wait for a silent worker, shorter than the supervisor does."""


@pytest.mark.parametrize("worker", ["expert1", "ffn0"])
async def test_a_worker_that_was_frozen_serves_again_and_its_late_answers_are_dropped(
    worker: str, tmp_path: Path
) -> None:
    async def freeze(run: RunDirectory) -> None:
        await thaw_worker(worker, FROZEN_S)(LiveRun(run))

    async with toy_service(tmp_path, Topology(attention=1, ffn=1, expert=2)) as service:
        await check_texts_during(service, freeze)
