"""Size gate: files and functions stay small enough to read, and the totals are printed.

Python: at most 500 lines a file; above 350 a line `# size: REASON` is required. At most 60 lines
(docstring not counted) and 7 parameters a function, unless `# size: REASON` stands beside its
`def`. C++: at most 600 lines a file. Exit status 1 on a violation.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 500
REASON_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7
MAX_CPP_LINES = 600
MARKER = "# size: "

PYTHON_FOLDERS = ("src", "tests", "tools", "benchmarks", "examples")
CPP_FOLDERS = ("native",)
CPP_SUFFIXES = (".cc", ".cpp", ".h", ".hpp")
NUM_BIGGEST = 10

TIP = (
    "tip: cut a long function by phase and name the phases; make a record of parameters that "
    f"travel together; split a file by noun. If it must stay: `{MARKER}REASON` beside the `def`, "
    "or on a line of its own for a file."
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def check_python(source: str, name: str) -> Iterator[str]:
    """Violations in one Python file, each as `name:line: what`."""
    lines = source.splitlines()
    if len(lines) > MAX_FILE_LINES:
        yield f"{name}:1: {len(lines)} lines, the limit is {MAX_FILE_LINES}"
    elif len(lines) > REASON_FILE_LINES and not any(line.startswith(MARKER) for line in lines):
        yield f"{name}:1: {len(lines)} lines; above {REASON_FILE_LINES} it needs a reason"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function) and not _is_marked(node, lines):
            yield from _check_function(node, name)


def _check_function(node: Function, name: str) -> Iterator[str]:
    length = function_lines(node)
    if length > MAX_FUNCTION_LINES:
        yield f"{name}:{node.lineno}: {node.name} has {length} lines, limit {MAX_FUNCTION_LINES}"
    count = num_parameters(node)
    if count > MAX_PARAMETERS:
        yield f"{name}:{node.lineno}: {node.name} has {count} parameters, limit {MAX_PARAMETERS}"


def function_lines(node: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node, clean=False) is None:
        return total
    docstring = node.body[0]
    return total - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def num_parameters(node: Function) -> int:
    """Parameters without self and cls."""
    arguments = node.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    count = len(named) + (arguments.vararg is not None) + (arguments.kwarg is not None)
    return count - (bool(named) and named[0] in ("self", "cls"))


def _is_marked(node: Function, lines: list[str]) -> bool:
    """Whether a marker stands above the `def` (or its decorators) or in the signature."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    signature = lines[max(0, first - 2) : max(node.lineno, node.body[0].lineno - 1)]
    return any(MARKER in line for line in signature)


def check_cpp(source: str, name: str) -> Iterator[str]:
    """Violations in one C++ file."""
    count = len(source.splitlines())
    if count > MAX_CPP_LINES:
        yield f"{name}:1: {count} lines, the limit is {MAX_CPP_LINES}"


def source_files(root: Path) -> Iterator[Path]:
    """Python and C++ files under the checked folders, sorted."""
    for folder in PYTHON_FOLDERS:
        yield from sorted((root / folder).rglob("*.py"))
    for folder in CPP_FOLDERS:
        files = (root / folder).rglob("*")
        yield from sorted(path for path in files if path.suffix in CPP_SUFFIXES)


def room_of(relative: Path) -> str:
    """`src/xdeepserve/ROOM`, the floor for files directly in the package, else the top folder."""
    parts = relative.parts
    if parts[:2] != ("src", "xdeepserve"):
        return parts[0]
    return f"xdeepserve/{parts[2]}" if len(parts) > 3 else "xdeepserve (floor)"


def report(sizes: dict[Path, int]) -> str:
    """Totals per room and the biggest files."""
    rooms: dict[str, list[int]] = defaultdict(list)
    for path, count in sizes.items():
        rooms[room_of(path)].append(count)
    lines = [f"{'room':<28}{'files':>6}{'lines':>8}"]
    lines += [f"{room:<28}{len(n):>6}{sum(n):>8}" for room, n in sorted(rooms.items())]
    lines.append(f"{'total':<28}{len(sizes):>6}{sum(sizes.values()):>8}")
    biggest = sorted(sizes.items(), key=lambda item: -item[1])[:NUM_BIGGEST]
    lines += ["", "biggest files", *(f"{count:>6} {path}" for path, count in biggest)]
    return "\n".join(lines)


def check_tree(root: Path) -> tuple[list[str], dict[Path, int]]:
    """All violations under `root`, and the number of lines of every file."""
    violations: list[str] = []
    sizes: dict[Path, int] = {}
    for path in source_files(root):
        relative = path.relative_to(root)
        source = path.read_text("utf-8")
        sizes[relative] = len(source.splitlines())
        check = check_python if path.suffix == ".py" else check_cpp
        violations += check(source, str(relative))
    return violations, sizes


def main(root: Path) -> int:
    """Print the totals and the violations; returns the exit status."""
    violations, sizes = check_tree(root)
    print(report(sizes))
    if not violations:
        return 0
    print("\n" + "\n".join(violations) + "\n" + TIP)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
