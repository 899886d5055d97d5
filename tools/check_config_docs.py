"""Every configuration field and environment variable is documented and has a default.

Fields: declared by `option(default, doc)` in `xdeepserve.config`. Variables: declared by `Env` in
`xdeepserve.envs` and listed in its `ALL`. Exit status 1 on a violation.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PREFIX = "XDEEPSERVE_"
TIP = (
    'tip: declare a field as `name: type = option(default, "One line of help.")`, a variable as '
    '`NAME: Env[T] = Env("XDEEPSERVE_NAME", parse, default, "One line.")`, and list it in ALL.'
)


def check_config(module: ModuleType) -> Iterator[str]:
    """Violations in the dataclasses that `module` defines."""
    for name, declared in inspect.getmembers(module, inspect.isclass):
        if declared.__module__ != module.__name__ or not dataclasses.is_dataclass(declared):
            continue
        for field in dataclasses.fields(declared):
            where = f"{name}.{field.name}"
            if not str(field.metadata.get("doc", "")).strip():
                yield f"{where}: no doc; declare it with option(default, doc)"
            if field.default is dataclasses.MISSING:
                yield f"{where}: no default"
        docstring = (declared.__doc__ or "").strip()
        if not docstring or docstring.startswith(
            f"{declared.__name__}("
        ):  # the latter is generated
            yield f"{name}: no docstring"


def check_envs(module: ModuleType) -> Iterator[str]:
    """Violations in the `Env` entries of `module`."""
    entries = {name: value for name, value in vars(module).items() if isinstance(value, module.Env)}
    for name, entry in entries.items():
        if not entry.doc.strip():
            yield f"{name}: no doc"
        if entry.name != PREFIX + name:
            yield f"{name}: reads {entry.name}, should read {PREFIX + name}"
        if not any(listed is entry for listed in module.ALL):
            yield f"{name}: not listed in ALL"


def main(config: ModuleType, envs: ModuleType) -> int:
    """Print the violations; returns the exit status."""
    violations = [*check_config(config), *check_envs(envs)]
    if not violations:
        return 0
    print("\n".join(violations) + "\n" + TIP)
    return 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    from xdeepserve import config, envs

    sys.exit(main(config, envs))
