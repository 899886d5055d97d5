"""What must not appear: unsafe calls, broad excepts, stray paths, bare notes (prints: ruff's T20).

In `src/`: no pickle and its relatives, no eval/exec, no `except Exception` unless the line says
`# loop top: REASON` or, where a library raises bare `Exception`, `# foreign: REASON`. In every
tracked text file: no absolute path into somebody's home or scratch folder, no to-do note without a
reference; a line that must break these two ends in `# text-ok`. Exit status 1 on a violation.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec"}
BROAD_EXCEPT_MARKERS = ("# loop top", "# foreign: ")
TEXT_OK = "# text-ok"

_TODO = re.compile(r"\b(?:TODO|FIXME)\b(?!\([#\w./:-]+\):)")  # text-ok
_PATH = re.compile(r"(?<![\w.~$})*-])/(?:home|Users|root|tmp|var/tmp|work|workspace)/[\w.@]")

TIPS = {
    "module": "untrusted bytes are never unpickled: use msgspec",
    "call": "parse the input instead",
    "except": "name the exceptions; write `# loop top: REASON` at the top of a loop, and "
    "`# foreign: REASON` where a library raises bare Exception",
    "todo": "say where it is tracked: TODO(#12): what",  # text-ok
    "path": f"use a relative path, or end the line in `{TEXT_OK}` where it is meant",
}


def check_source(source: str, name: str) -> Iterator[tuple[str, str]]:
    """(kind, `name:line: what`) for each violation in one Python file of the package."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        for module in _imported(node):
            if module.partition(".")[0] in FORBIDDEN_MODULES:
                yield "module", f"{name}:{line}: import of {module}"
        called = _called_name(node)
        if called in FORBIDDEN_CALLS:
            yield "call", f"{name}:{line}: call of {called}"
        is_broad = isinstance(node, ast.ExceptHandler) and _is_broad(node)
        if is_broad and not any(mark in lines[line - 1] for mark in BROAD_EXCEPT_MARKERS):
            yield "except", f"{name}:{line}: broad except"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []


def _called_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id
    return None


def _is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type
    if caught is None:
        return True
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(isinstance(n, ast.Name) and n.id in ("Exception", "BaseException") for n in names)


def check_text(text: str, name: str) -> Iterator[tuple[str, str]]:
    """(kind, `name:line: what`) for each violation in any text file."""
    for number, line in enumerate(text.splitlines(), 1):
        if TEXT_OK in line:
            continue
        if _TODO.search(line):
            yield "todo", f"{name}:{number}: TODO without a reference"  # text-ok
        if found := _PATH.search(line):
            yield "path", f"{name}:{number}: absolute path {found.group()}..."


def tracked_files(root: Path) -> list[Path]:
    """Files that git tracks or would track; all of `src` and `tools` where git is not at work."""
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return sorted(p for folder in ("src", "tools") for p in (root / folder).rglob("*.py"))
    names = done.stdout.decode().split("\0")
    return [root / name for name in names if name and (root / name).is_file()]


def check_tree(root: Path) -> list[tuple[str, str]]:
    """All violations under `root`."""
    violations: list[tuple[str, str]] = []
    for path in tracked_files(root):
        data = path.read_bytes()
        if b"\0" in data:
            continue
        text, name = data.decode("utf-8", "replace"), path.relative_to(root).as_posix()
        violations += check_text(text, name)
        if name.startswith("src/") and name.endswith(".py"):
            violations += check_source(text, name)
    return violations


def main(root: Path) -> int:
    """Print the violations and a tip for each kind; returns the exit status."""
    violations = check_tree(root)
    for _, message in violations:
        print(message)
    for kind in sorted({kind for kind, _ in violations}):
        print(f"tip ({kind}): {TIPS[kind]}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
