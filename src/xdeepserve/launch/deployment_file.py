"""Deployment files: YAML -> `Deployment`, strictly.

Unknown, repeated and ill-typed keys are errors that name the key's path. The file is small, plain
data: no aliases (which can blow up), no tags that make objects.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, get_type_hints

import msgspec
import yaml

from xdeepserve.errors import ConfigError
from xdeepserve.launch.deployment import Deployment

MAX_FILE_BYTES: Final = 64 << 10

T = TypeVar("T")


def load_deployment(path: Path) -> Deployment:
    """Read and check the file.

    Raises:
        ConfigError: it cannot be read, is not YAML, or says something wrong; the message starts
            with the file's name and the path of the key.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"deployment file {path}: {exc.strerror or exc}") from exc
    try:
        return parse_deployment(data)
    except ConfigError as exc:
        raise ConfigError(f"deployment file {path}: {exc.message}") from exc


def parse_deployment(data: bytes) -> Deployment:
    """A deployment out of the bytes of a file.

    Raises:
        ConfigError: see load_deployment.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"it has more than {MAX_FILE_BYTES} bytes; that is no deployment")
    return _decode(Deployment, _parse_yaml(data), path="")


_BOOL_TAG: Final = "tag:yaml.org,2002:bool"
_BOOL: Final = re.compile("(?:true|True|TRUE|false|False|FALSE)$")
"""Of YAML 1.2, which has no other words for it."""


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases and without repeated keys; truth values are true and false alone.

    YAML 1.1 takes on, off, yes and no for some too, and some of our settings are named so.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"{name!r} is repeated", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != _BOOL_TAG]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_BOOL_TAG, _BOOL, list("tTfF"))


def _parse_yaml(data: bytes) -> object:
    try:
        return yaml.load(data, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise ConfigError(f"not valid YAML: {reason[:300]}") from exc


def _decode(kind: type[T], value: object, *, path: str) -> T:
    """`value` as `kind`: dataclasses from mappings, all else by msgspec without coercion."""
    if not is_dataclass(kind):
        return _convert(kind, value, path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path or 'the file'} must be a mapping, not {_describe(value)}")
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    members: dict[str, Any] = {}
    for key, member in value.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise ConfigError(f"{where} is not a known key{_hint(str(key), known)}")
        members[key] = _decode(hints[key], member, path=where)
    try:
        return kind(**members)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc.message}" if path else exc.message) from exc


def _convert(kind: type[T], value: object, path: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        reason, _, inner = str(exc).partition(" - at `$")
        raise ConfigError(f"{path}{inner.rstrip('`')}: {reason[0].lower()}{reason[1:]}") from exc


def _hint(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"


_YAML_NAMES: Final = {
    list: "a list",
    str: "text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
}


def _describe(value: object) -> str:
    if value is None:
        return "empty"
    return f"{_YAML_NAMES.get(type(value), type(value).__name__)}: {str(value)[:60]}"
