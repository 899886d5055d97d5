"""The size gate fires on what it should, and markers silence it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tools import check_sizes
from tools.check_sizes import check_cpp, check_python, main, num_parameters, room_of


def function(num_lines: int, marker: str = "", parameters: str = "") -> str:
    body = "    pass\n" * (num_lines - 1)
    return f"def f({parameters}):{marker}\n{body}"


def python_problems(source: str) -> list[str]:
    return list(check_python(source, "x.py"))


@pytest.mark.parametrize(
    ("num_lines", "is_marked", "num_problems"),
    [(350, False, 0), (351, False, 1), (351, True, 0), (500, True, 0), (501, True, 1)],
)
def test_file_lines(num_lines: int, is_marked: bool, num_problems: int) -> None:
    first = "# size: a table\n" if is_marked else "x = 0\n"
    assert len(python_problems(first + "x = 1\n" * (num_lines - 1))) == num_problems


@pytest.mark.parametrize(("num_lines", "num_problems"), [(60, 0), (61, 1)])
def test_function_lines(num_lines: int, num_problems: int) -> None:
    assert len(python_problems(function(num_lines))) == num_problems


def test_docstring_does_not_count() -> None:
    docstring = '    """One.\n' + "    more\n" * 20 + '    """\n'
    source = function(60).replace(":\n", ":\n" + docstring, 1)
    assert python_problems(source) == []


@pytest.mark.parametrize(
    "source",
    [
        function(61, marker="  # size: a table of cases"),
        "# size: a table of cases\n" + function(61),
        "# size: a table\n@decorator(\n    1,\n)\n" + function(61),
        "async " + function(61, marker="  # size: a table"),
    ],
)
def test_marker_beside_the_def_silences(source: str) -> None:
    assert python_problems(source) == []


def test_marker_inside_the_body_does_not_silence() -> None:
    source = function(61) + "    # size: too late\n    pass\n"
    assert len(python_problems(source)) == 1


@pytest.mark.parametrize(
    ("signature", "count"),
    [
        ("self, a, b", 2),
        ("cls, a", 1),
        ("a, /, b, *, c", 3),
        ("a, *args, **kwargs", 3),
        ("", 0),
        ("a, self", 2),
    ],
)
def test_parameters_are_counted_without_self(signature: str, count: int) -> None:
    (node,) = ast.parse(f"def f({signature}): pass").body
    assert isinstance(node, ast.FunctionDef)
    assert num_parameters(node) == count


def test_eight_parameters_are_too_many() -> None:
    assert python_problems(function(2, parameters="a, b, c, d, e, f, g")) == []
    (problem,) = python_problems(function(2, parameters="a, b, c, d, e, f, g, h"))
    assert problem == "x.py:1: f has 8 parameters, limit 7"


def test_cpp_lines() -> None:
    assert list(check_cpp("x\n" * 600, "a.cc")) == []
    assert list(check_cpp("x\n" * 601, "a.cc")) == ["a.cc:1: 601 lines, the limit is 600"]


def test_rooms() -> None:
    assert room_of(Path("src/xdeepserve/ops/cpu.py")) == "xdeepserve/ops"
    assert room_of(Path("src/xdeepserve/errors.py")) == "xdeepserve (floor)"
    assert room_of(Path("native/ops/gemm.cc")) == "native"


def test_tree_with_a_violation_fails_with_a_tip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "big.py").write_text("x = 1\n" * 501)
    assert main(tmp_path) == 1
    out = capsys.readouterr().out
    assert "src/big.py:1: 501 lines" in out
    assert check_sizes.TIP in out


def test_small_tree_passes_and_prints_totals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "a.cc").write_text("int x;\n")
    assert main(tmp_path) == 0
    assert "native" in capsys.readouterr().out
