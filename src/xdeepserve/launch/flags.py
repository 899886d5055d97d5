"""Command-line flags generated from the config dataclasses: name, type, default and help text."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import Field, fields, replace
from typing import Any, TypeVar

C = TypeVar("C")

_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}


def positive_seconds(text: str) -> float:
    """Value of a flag that says how long to wait, in seconds.

    Raises:
        ArgumentTypeError: it is not a number above 0.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def add_config_flags(
    parser: argparse.ArgumentParser, config: type[Any], *, only: Iterable[str] = ()
) -> None:
    """Add one `--kebab-case` flag per field of a config dataclass.

    A flag that is not given leaves no trace in the parsed arguments, so that a deployment file can
    tell it from one that is given with the default value.

    Args:
        parser: receives an argument group named after the class's docstring.
        config: a dataclass whose fields were declared with `config.option`.
        only: restrict to these field names; empty = all.
    """
    group = parser.add_argument_group((config.__doc__ or config.__name__).rstrip("."))
    wanted = set(only)
    for field in fields(config):
        if not wanted or field.name in wanted:
            _add_flag(group, field)


def _add_flag(group: argparse._ArgumentGroup, field: Field[Any]) -> None:
    flag = "--" + field.name.replace("_", "-")
    text = f"{field.metadata['doc']} (default: {field.default})".replace("%", "%%")
    if field.type == "bool":
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
        return
    parse = _TYPES[str(field.type)]
    metavar = str(field.type).upper()
    group.add_argument(flag, type=parse, default=argparse.SUPPRESS, metavar=metavar, help=text)


def config_from_args(config: type[C], args: argparse.Namespace) -> C:
    """Build the frozen config from the flags that were given; other fields keep their default.

    Raises:
        ConfigError: a value is out of its range.
    """
    return config(**_given(config, args))


def override(base: C, args: argparse.Namespace) -> C:
    """`base` with the fields whose flags were given.

    Raises:
        ConfigError: a value is out of its range.
    """
    changed: C = replace(base, **_given(type(base), args))  # type: ignore[type-var]
    return changed


def _given(config: type[Any], args: argparse.Namespace) -> dict[str, Any]:
    names = {field.name for field in fields(config)}
    return {name: value for name, value in vars(args).items() if name in names}
