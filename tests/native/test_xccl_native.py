"""Builds the native stress programs plain and with address and thread sanitizers, and runs them.

The default run takes a small one of each under both sanitizers, `-m soak` all of them.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BUILD_LIMIT_S = 240
RUN_LIMIT_S = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake and a C++ compiler"),
]

# The least that meets every protocol: messages and rows between two ranks, and lives that end.
SMALL = (("xccl_stress", "threads", "2", "100"), ("xccl_lives", "2", "3000"))


def run(*command: str, limit_s: int) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def build(preset: str, folder: Path) -> str:
    made = str(folder / preset)
    run("cmake", "-S", ".", "--preset", preset, "-B", made, limit_s=BUILD_LIMIT_S)
    run("cmake", "--build", made, "-j2", limit_s=BUILD_LIMIT_S)
    return made


@pytest.mark.parametrize("preset", ["asan", "tsan"])
def test_small_stress_under_a_sanitizer(preset: str, tmp_path: Path) -> None:
    made = build(preset, tmp_path)
    for program, *arguments in SMALL:
        run(f"{made}/{program}", *arguments, limit_s=RUN_LIMIT_S)


@pytest.mark.soak
@pytest.mark.parametrize("preset", ["plain", "asan", "tsan"])
def test_stress(preset: str, tmp_path: Path) -> None:
    made = build(preset, tmp_path)
    run("ctest", "--test-dir", made, "--output-on-failure", limit_s=RUN_LIMIT_S)
