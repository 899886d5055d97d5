"""The forbidden-things check fires on each kind and leaves the lookalikes alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tools.check_forbidden import TIPS, check_source, check_text, main

NOTE = "TODO"  # text-ok
HOME = "/home/someone"  # text-ok


def kinds(source: str) -> list[str]:
    return [kind for kind, _ in check_source(source, "src/x.py")]


def text_kinds(text: str) -> list[str]:
    return [kind for kind, _ in check_text(text, "README.md")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", ["module"]),
        ("from pickle import loads", ["module"]),
        ("import a, marshal as m", ["module"]),
        ("import pickletools_of_ours", []),
        ("eval('1')", ["call"]),
        ("exec('x = 1')", ["call"]),
        ("model.eval()", []),
        ("literal_eval('1')", []),
        ("try: pass\nexcept Exception: pass", ["except"]),
        ("try: pass\nexcept BaseException as e: pass", ["except"]),
        ("try: pass\nexcept (OSError, Exception): pass", ["except"]),
        ("try: pass\nexcept: pass", ["except"]),
        ("try: pass\nexcept OSError: pass", []),
        ("try: pass\nexcept Exception:  # loop top: one bad step must not end it\n    pass", []),
        ("try: pass\nexcept Exception:  # foreign: the library raises it\n    pass", []),
        ("try: pass\nexcept Exception:  # because\n    pass", ["except"]),
    ],
)
def test_source_rules(source: str, expected: list[str]) -> None:
    assert kinds(source) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"# {NOTE}: later", ["todo"]),
        (f"# {NOTE} later", ["todo"]),
        (f"# {NOTE}(#12): later", []),
        (f"# {NOTE}(sampling): later", []),
        ("a mastodon", []),
        (f"see {HOME}/x", ["path"]),
        (f"'{HOME}'", ["path"]),
        ("/tmp/x", ["path"]),  # text-ok
        ("/root/.cache", ["path"]),  # text-ok
        (f"https://example.com{HOME}", []),
        ("src/work/x", []),
        ("~/tmp/x", []),
        (f"{HOME}  # text-ok", []),
        ("/dev/shm and /proc/cpuinfo", []),
    ],
)
def test_text_rules(text: str, expected: list[str]) -> None:
    assert text_kinds(text) == expected


def test_message_names_file_and_line() -> None:
    ((_, message),) = check_text(f"fine\n{HOME}/x\n", "docs/a.md")
    assert message.startswith("docs/a.md:2: absolute path")


def make_tree(root: Path, source: str) -> None:
    (root / "src").mkdir()
    (root / "src" / "a.py").write_text(source)
    (root / "data.bin").write_bytes(b"\0" + HOME.encode())
    subprocess.run(["git", "init", "-q", str(root)], check=True, timeout=60)


def test_violation_fails_with_a_tip_and_binary_files_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path, "import pickle\n")
    assert main(tmp_path) == 1
    assert (
        capsys.readouterr().out == f"src/a.py:1: import of pickle\ntip (module): {TIPS['module']}\n"
    )


def test_ignored_files_are_left_alone(tmp_path: Path) -> None:
    make_tree(tmp_path, "x = 1\n")
    (tmp_path / ".gitignore").write_text("scratch.md\n")
    (tmp_path / "scratch.md").write_text(HOME)
    assert main(tmp_path) == 0
