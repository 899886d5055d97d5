"""Names, paths and what is listed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.models.file_toys import llama_folder
from xdeepserve import envs
from xdeepserve.errors import ConfigError
from xdeepserve.store import (
    CATALOG,
    BrokenModel,
    ModelInfo,
    installed_names,
    list_models,
    models_folder,
    pull,
    resolve,
    terminal_progress,
)
from xdeepserve.store.progress import progress_line


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> Iterator[Path]:
    with envs.HOME.override(str(tmp_path / "home")):
        yield tmp_path / "home"


def test_installed_model_by_name(home: Path) -> None:
    folder = llama_folder(home / "models" / "toy")
    assert resolve("toy") == folder
    assert installed_names() == ["toy"]


def test_catalog_model_that_is_there_is_not_pulled() -> None:
    folder = llama_folder(models_folder() / "smollm2-135m")
    assert pull("smollm2-135m") == folder


def test_catalog_model_is_built_from_one_that_is_there() -> None:
    llama_folder(models_folder() / "smollm2-135m")
    stages: set[str] = set()
    folder = resolve("smollm2-135m-moe8", progress=lambda stage, done, total: stages.add(stage))
    assert stages == {"write"}
    found = {model.name: model for model in list_models()}
    assert found.keys() == CATALOG.keys()
    moe = found["smollm2-135m-moe8"]
    assert isinstance(moe, ModelInfo)
    assert (moe.path, moe.num_experts, moe.top_k) == (folder, 8, 2)


def test_existing_path_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "somewhere")
    assert resolve(str(folder)) == folder


@pytest.mark.parametrize(
    "name", ["nonsense", "", "../x", "/no/such/folder", "a" * 5000, "a\0b", "~nobody/x"]
)
def test_unknown_names(name: str, home: Path) -> None:
    with pytest.raises(ConfigError, match="known names: smollm2-135m") as caught:
        resolve(name)
    assert len(caught.value.message) < 500
    assert not (home / "models").exists()


def test_damaged_models_are_listed_with_their_problem(home: Path) -> None:
    llama_folder(home / "models" / "good")
    bad = llama_folder(home / "models" / "bad")
    (bad / "model.safetensors").write_bytes(b"short")
    (home / "models" / ".hidden.tmp").mkdir()
    listed = list_models()
    assert [model.name for model in listed] == ["bad", "good"]
    assert isinstance(listed[0], BrokenModel)
    assert "too few" in listed[0].problem


def test_nothing_installed() -> None:
    assert list_models() == []


def test_home_that_cannot_be_written(home: Path) -> None:
    home.write_text("a file")
    with pytest.raises(ConfigError, match="XDEEPSERVE_HOME"):
        pull("smollm2-135m")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_only() -> None:
    assert terminal_progress(io.StringIO()) is None
    stream = Terminal()
    show = terminal_progress(stream)
    assert show is not None
    show("write", 1, 4)
    show("write", 4, 4)
    assert stream.getvalue().count("\r") == 2
    assert stream.getvalue().endswith("100%  0.0/0.0 MB\n")


def test_progress_line() -> None:
    assert progress_line("pack", 135_000_000, 270_000_000) == (
        "packing     [###############...............]  50%  135.0/270.0 MB"
    )
    assert "100%" in progress_line("hash", 0, 0)
