"""The log of a process: text or JSON lines, the same choice in every process of a run."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.multiproc.cluster_harness import running_cluster
from xdeepserve import envs
from xdeepserve.errors import ConfigError
from xdeepserve.launch.cli import main
from xdeepserve.launch.logs import HIDDEN, MAX_CHARS, JsonFormatter, setup_logging


def line_of(message: str = "hello", *args: object, **fields: Any) -> dict[str, Any]:
    """What the formatter makes of a record; `exc_info` is the record's, the rest its extra."""
    exc_info = fields.pop("exc_info", None)
    record = logging.getLogger("a.b").makeRecord(
        "a.b", logging.WARNING, "f.py", 1, message, args, exc_info, extra=fields
    )
    record.created = 1_700_000_000.25
    text = JsonFormatter("xds:dp0", "ab" * 4).format(record)
    assert "\n" not in text
    line: dict[str, Any] = json.loads(text)
    return line


def test_a_line() -> None:
    line = line_of("moved %d of\n%s", 3, "ä\u2028")
    assert line.pop("pid") > 0
    assert line == {
        "ts": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "process": "xds:dp0",
        "run_id": "abababab",
        "logger": "a.b",
        "message": "moved 3 of\nä\u2028",
    }


def test_extra_fields_are_added_and_replace_nothing() -> None:
    line = line_of(
        worker="dp1", num_moves=3, ratio=0.5, ok=True, none=None, ts="now", nan=float("nan")
    )
    assert line["ts"] == "2023-11-14T22:13:20.250Z"
    del line["ts"]
    assert {key: line[key] for key in ("worker", "num_moves", "ratio", "ok", "none", "nan")} == {
        "worker": "dp1",
        "num_moves": 3,
        "ratio": 0.5,
        "ok": True,
        "none": None,
        "nan": "nan",
    }


@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_what_clients_wrote_is_left_out(name: str) -> None:
    assert "sk-1" not in json.dumps(line_of(**{name: "sk-1"}))


def test_an_exception_and_the_limit_of_a_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        line = line_of("x" * (MAX_CHARS + 1), exc_info=sys.exc_info(), more=["y" * MAX_CHARS])
    assert line["exception"].endswith("ValueError: broken")
    assert len(line["message"]) == len(line["more"]) == MAX_CHARS


def test_origin_is_absent_where_there_is_none() -> None:
    record = logging.makeLogRecord({"msg": "hello"})
    assert {"process", "run_id"}.isdisjoint(json.loads(JsonFormatter("", "").format(record)))


@contextmanager
def bare_root() -> Iterator[logging.Logger]:
    """The root logger without pytest's handlers, as in a process of its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        yield root
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@pytest.mark.parametrize(("name", "begin"), [("json", "{"), ("text", "2")])
def test_the_last_setup_holds(name: str, begin: str, capsys: pytest.CaptureFixture[str]) -> None:
    with envs.LOG_FORMAT.override(name), bare_root():
        setup_logging()
        setup_logging("xds:gateway", run_id="cd" * 4)
        logging.getLogger("a").info("once")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(begin)
    assert "xds:gateway" in line
    assert ("cdcdcdcd" in line) == (name == "json")


def test_other_handlers_are_left_alone() -> None:
    with bare_root() as root:
        root.handlers[:] = [own := logging.NullHandler()]
        setup_logging()
        assert root.handlers == [own]


def test_an_unknown_format() -> None:
    with envs.LOG_FORMAT.override("xml"), pytest.raises(ConfigError, match="text, json"):
        setup_logging()


def test_the_flag_is_for_this_process_and_its_children() -> None:
    with envs.LOG_FORMAT.override(None), bare_root():
        assert main(["serve", "--log-format", "json"]) == 2  # no model is named
        assert os.environ[envs.LOG_FORMAT.name] == "json"


async def test_all_processes_of_a_run_log_alike(capfd: pytest.CaptureFixture[str]) -> None:
    with envs.LOG_FORMAT.override("json"):
        async with running_cluster(attention=1, expert=1) as running:
            run_id = running.cluster.run.run_id
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert {line["process"] for line in lines} >= {"xds:dp0", "xds:expert0"}
    assert {line["run_id"] for line in lines} == {run_id}
