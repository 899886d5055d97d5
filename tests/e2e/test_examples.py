"""Every example runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WITH_WEIGHTS = {"04_disaggregated"}


def _params() -> list[Any]:
    paths = sorted(EXAMPLES.glob("*.py"))
    marks = [pytest.mark.weights, pytest.mark.slow]
    return [
        pytest.param(path, id=path.stem, marks=marks if path.stem in WITH_WEIGHTS else [])
        for path in paths
    ]


@pytest.mark.parametrize("path", _params())
def test_example(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
