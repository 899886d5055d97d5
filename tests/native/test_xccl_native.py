"""Builds the native stress test plain and with address and thread sanitizers, and runs it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BUILD_LIMIT_S = 240
RUN_LIMIT_S = 120

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake and a C++ compiler"),
]


def run(*command: str, limit_s: int) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


@pytest.mark.parametrize("preset", ["plain", "asan", "tsan"])
def test_stress(preset: str, tmp_path: Path) -> None:
    build = str(tmp_path / preset)
    run("cmake", "-S", ".", "--preset", preset, "-B", build, limit_s=BUILD_LIMIT_S)
    run("cmake", "--build", build, "-j2", limit_s=BUILD_LIMIT_S)
    run("ctest", "--test-dir", build, "--output-on-failure", limit_s=RUN_LIMIT_S)
