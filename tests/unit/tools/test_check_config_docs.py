"""The configuration check accepts documented declarations and names the others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from tools.check_config_docs import check_config, check_envs, main

from xdeepserve.config import option


def module_of(**members: Any) -> ModuleType:
    module = ModuleType("fake")
    for name, member in members.items():
        if isinstance(member, type):
            member.__module__ = "fake"
        setattr(module, name, member)
    return module


@dataclass(frozen=True)
class Good:
    """Documented."""

    size: int = option(3, "How big.")


@dataclass(frozen=True)
class Undocumented:
    """Its field has no doc."""

    size: int = 3


@dataclass(frozen=True)
class Required:
    """Its field has no default."""

    size: int = dataclasses.field(metadata={"doc": "How big."})


@dataclass(frozen=True)
class Nameless:
    size: int = option(3, "How big.")


@pytest.mark.parametrize(
    ("declared", "problems"),
    [
        (Good, []),
        (Undocumented, ["C.size: no doc; declare it with option(default, doc)"]),
        (Required, ["C.size: no default"]),
        (Nameless, ["C: no docstring"]),
    ],
)
def test_fields(declared: type, problems: list[str]) -> None:
    assert list(check_config(module_of(C=declared))) == problems


class Env:
    """Shape of the registry's entries."""

    def __init__(self, name: str, doc: str) -> None:
        self.name = name
        self.doc = doc


def test_envs() -> None:
    good, mute, other, hidden = (
        Env("XDEEPSERVE_GOOD", "Good."),
        Env("XDEEPSERVE_MUTE", " "),
        Env("OTHER", "Reads another name."),
        Env("XDEEPSERVE_HIDDEN", "Not listed."),
    )
    module = module_of(Env=Env, GOOD=good, MUTE=mute, OTHER=other, HIDDEN=hidden)
    module.ALL = (good, mute, other)  # type: ignore[attr-defined]
    assert list(check_envs(module)) == [
        "MUTE: no doc",
        "OTHER: reads OTHER, should read XDEEPSERVE_OTHER",
        "HIDDEN: not listed in ALL",
    ]


def test_violation_fails_with_a_tip(capsys: pytest.CaptureFixture[str]) -> None:
    envs = module_of(Env=Env)
    envs.ALL = ()  # type: ignore[attr-defined]
    assert main(module_of(Good=Good), envs) == 0
    assert main(module_of(Undocumented=Undocumented), envs) == 1
    assert "tip: " in capsys.readouterr().out
