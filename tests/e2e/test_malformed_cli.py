"""Bad files, flags and environments: one clear line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.unit.text.byte_tokenizer import byte_backend
from xdeepserve.launch.cli import main
from xdeepserve.testing.toy_models import toy_checkpoint

Breakage = Callable[[Path], None]


def _toy_folder(folder: Path) -> Path:
    toy = toy_checkpoint("llama")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(toy.config))
    tensors = {name: np.ascontiguousarray(array) for name, array in toy.tensors().items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def _edit_config(**fields: object) -> Breakage:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def _truncate(keep: float) -> Breakage:
    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return cut


def _header_length(value: int) -> Breakage:
    def lie(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", value) + path.read_bytes()[8:])

    return lie


def _without_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    safetensors.numpy.save_file(tensors, path)


def _wrong_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.norm.weight"] = np.ones(7, np.float32)
    safetensors.numpy.save_file(tensors, path)


def _not_finite(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    safetensors.numpy.save_file(tensors, path)


def _write(name: str, content: bytes) -> Breakage:
    return lambda folder: (folder / name).write_bytes(content) and None


def _remove(name: str) -> Breakage:
    return lambda folder: (folder / name).unlink()


BROKEN_FOLDERS: dict[str, tuple[Breakage, str]] = {
    "no config": (_remove("config.json"), "config.json"),
    "config is cut short": (_write("config.json", b'{"model_type": "lla'), "config.json"),
    "config is not an object": (_write("config.json", b"[]"), "config.json"),
    "unknown architecture": (_edit_config(model_type="mamba9"), "mamba9"),
    "negative hidden size": (_edit_config(hidden_size=-64), "hidden_size"),
    "absurd layer count": (_edit_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "head count is text": (_edit_config(num_attention_heads="four"), "num_attention_heads"),
    "no weights": (_remove("model.safetensors"), "safetensors"),
    "empty weights": (_write("model.safetensors", b""), "model.safetensors"),
    "weights cut in the header": (_truncate(0.001), "model.safetensors"),
    "weights cut in the data": (_truncate(0.7), "model.safetensors"),
    "header longer than the file": (_header_length(1 << 60), "model.safetensors"),
    "header length zero": (_header_length(0), "model.safetensors"),
    "a tensor is missing": (_without_tensor, "down_proj"),
    "a tensor has the wrong shape": (_wrong_shape, "model.norm.weight"),
    "a tensor is not finite": (_not_finite, "model.norm.weight"),
}


def _expect_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str], part: str) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("xdeepserve: error: ")
    assert part in lines[0]
    assert "Traceback" not in captured.err


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDEEPSERVE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("name", BROKEN_FOLDERS)
def test_broken_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _toy_folder(tmp_path / "model")
    breakage, part = BROKEN_FOLDERS[name]
    breakage(folder)
    _expect_one_line(["serve", str(folder), "--port", "0"], capsys, part)


def _gguf(tensor_count: int = 0, kv_count: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, kv_count) + body


BROKEN_GGUF: dict[str, bytes] = {
    "empty": b"",
    "only the magic": b"GGUF",
    "wrong magic": b"GGML" + bytes(60),
    "more tensors than bytes": _gguf(tensor_count=1 << 40),
    "more fields than bytes": _gguf(kv_count=1 << 40),
    "string longer than the file": _gguf(kv_count=1, body=struct.pack("<Q", 1 << 50) + b"x"),
    "no metadata": _gguf() + bytes(64),
}


@pytest.mark.parametrize("name", BROKEN_GGUF)
def test_broken_gguf(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(BROKEN_GGUF[name])
    _expect_one_line(["serve", str(path), "--port", "0"], capsys, "model.gguf")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["serve", "no-such-model"], "no-such-model"),
        (["serve", "../../etc/passwd-not-here"], "passwd-not-here"),
        (["serve", "x", "--dtype", "int3"], "int3"),
        (["serve", "x", "--port", "99999"], "99999"),
        (["serve", "x", "--max-num-seqs", "0"], "max_num_seqs"),
        (["serve", "x", "--max-num-seqs", "64", "--max-num-batched-tokens", "8"], "starve"),
        (["serve", "x", "--num-threads", "5000"], "num_threads"),
        (["generate", "x", "--prompt", "\udcff"], "UTF-8"),
        (["models", "convert", ".", "y"], ".gguf"),
        (["models", "info", "no-such-model"], "no-such-model"),
        (["models", "pull", "no-such-model"], "no-such-model"),
        (["generate", "x", "--max-tokens", "0", "--prompt", "hi"], "max-tokens"),
        (["bench", "offline", "x", "--input-len", "0"], "input_len"),
        (["bench", "step", "x", "--steps", "0"], "--steps"),
        (["bench", "step", "x", "--batch", "100000"], "max_num_seqs"),
    ],
)
def test_bad_flags(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[0] == "serve" and "--port" not in arguments:
        arguments = [*arguments, "--port", "0"]
    _expect_one_line(arguments, capsys, part)


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--expert", "2"], "--expert"),
        (["--no-pin"], "--pin"),
        (["--replicas", "1"], "--replicas"),
        (["--rebalance-interval-s", "5"], "--rebalance-interval-s"),
    ],
)
def test_flags_of_workers_that_there_are_none_of(
    arguments: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _expect_one_line(["serve", "m", "--colocated", *arguments], capsys, f"--colocated and {flag} ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("XDEEPSERVE_ISA", "mmx"),
        ("XDEEPSERVE_NUM_THREADS", "-2"),
        ("XDEEPSERVE_NUM_THREADS", "9999"),
        ("XDEEPSERVE_LOG_LEVEL", "loud"),
        ("XDEEPSERVE_LOG_FORMAT", "xml"),
    ],
)
def test_bad_environment(
    name: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    _expect_one_line(["serve", str(_toy_folder(tmp_path / "m")), "--port", "0"], capsys, name)


def test_kv_pool_larger_than_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(_toy_folder(tmp_path / "m"))
    arguments = ["generate", folder, "--prompt", "hi", "--num-kv-blocks", str(10**11)]
    byte_backend().save(f"{folder}/tokenizer.json")
    _expect_one_line(arguments, capsys, "num_kv_blocks")


def test_steps_that_workers_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("xdeepserve.launch.serve_cluster.setproctitle", lambda title: None)
    monkeypatch.setenv("XDEEPSERVE_RUN_DIR", str(tmp_path))
    arguments = ["serve", str(_toy_folder(tmp_path / "m")), "--port", "0", "--ffn", "1"]
    arguments += ["--max-num-batched-tokens", str(10**9)]
    _expect_one_line(arguments, capsys, "lower limits.max_num_batched_tokens=1000000000")
    assert [path.name for path in tmp_path.glob("*xds-*")] == [], "no run was begun"


@pytest.mark.parametrize("command", [["scale", "expert=2"], ["rebalance"]])
@pytest.mark.parametrize("seconds", ["-1", "0", "soon", "nan"])
def test_a_timeout_is_a_time(
    command: list[str], seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command, f"--timeout={seconds}"])
    assert f"{seconds!r} is not a number of seconds above 0" in capsys.readouterr().err


def test_no_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDEEPSERVE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    folder = str(_toy_folder(tmp_path / "m"))
    _expect_one_line(["serve", folder, "--port", "0"], capsys, "XDEEPSERVE_HOME")


def test_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        _expect_one_line(["serve", str(tmp_path), "--port", str(port)], capsys, str(port))


def test_home_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocker = tmp_path / "a-file"
    blocker.write_text("")
    monkeypatch.setenv("XDEEPSERVE_HOME", str(blocker))
    folder = _toy_folder(tmp_path / "m")
    _expect_one_line(["serve", str(folder), "--port", "0"], capsys, "XDEEPSERVE_HOME")


def test_upcycle_refuses_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(_toy_folder(tmp_path / "m"))
    target = str(tmp_path / "out")
    rows = [
        (["--experts", "1"], "experts"),
        (["--top-k", "9"], "top_k"),
        (["--shared", "2"], "shared"),
        (["--dense-layers", "99"], "dense_layers"),
    ]
    for flags, part in rows:
        _expect_one_line(["models", "upcycle", source, target, *flags], capsys, part)
    assert not Path(target).exists()
