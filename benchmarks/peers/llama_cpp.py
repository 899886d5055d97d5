"""llama.cpp, built for this machine from the sources inside the llama-cpp-python sdist."""

from __future__ import annotations

import os
import sys
import tarfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.peers.environment import (
    Command,
    Unavailable,
    build,
    is_built,
    mark_built,
    peers_folder,
)
from benchmarks.peers.models import checkpoint, converted, converter_python
from benchmarks.peers.peer import WORKERS, Server, Settings, worker_command

VERSION: Final = "0.3.36"
REQUIREMENT: Final = f"llama-cpp-python=={VERSION}"
FLAGS: Final = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DGGML_OPENMP=ON", "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip
AMX_SOURCE: Final = Path("ggml", "src", "ggml-cpu", "amx", "mmq.cpp")
TILE_CONFIG: Final = "_tile_loadconfig(&tc);"
BARRIER: Final = 'asm volatile("" ::: "memory"); '
"""Without it GCC 12 drops the stores to the configuration, and the first tile instruction traps."""

TOOLS: Final = ("llama-batched-bench", "llama-quantize", "llama-server")
CONVERTED: Final = ("bf16", "f16")
"""Written by the converter; the other types are quantized from bf16."""


class LlamaCpp:
    """llama.cpp: `llama-batched-bench` and `llama-server`."""

    name = "llama.cpp"
    variants: Final = {"16-bit": ("bf16", "f16"), "8-bit": ("q8_0",), "4-bit": ("q4_0",)}

    def worker(self, model: str, variant: str, settings: Settings) -> Command:
        """Runs the batched benchmark for each order."""
        order = asdict(settings) | {
            "tool": str(binaries() / "llama-batched-bench"),
            "model": str(gguf(model, variant)),
        }
        return worker_command(sys.executable, "llama_cpp_worker.py", order)

    def server(self, model: str, variant: str, settings: Settings, port: int) -> Server:
        """`llama-server` with a slot and a KV cache of its own for each client."""
        slots = min(settings.max_seqs, 32)
        argv = [str(binaries() / "llama-server"), "-m", str(gguf(model, variant))]
        argv += ["-t", str(settings.threads), "-np", str(slots), "-c", str(512 * slots)]
        argv += ["-cb", "-fa", "on", "--no-kv-unified", "-b", "2048", "-ub", "512"]
        argv += ["--port", str(port), "--no-webui", "-lv", "0"]
        return Server(Command(tuple(argv), {}), port, model)


def _folder() -> Path:
    return peers_folder() / "llama_cpp"


def sources() -> Path:
    """The unpacked llama.cpp tree."""
    folder = _folder()
    tree = folder / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    if tree.is_dir():
        return tree
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    build([*pip, "--no-binary", "llama-cpp-python", "-d", str(folder), REQUIREMENT])
    archive = folder / f"llama_cpp_python-{VERSION}.tar.gz"
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    source = tree / AMX_SOURCE
    source.write_text(with_barrier(source.read_text()))
    return tree


def with_barrier(source: str) -> str:
    """The AMX source so that GCC 12, too, stores a tile configuration before it is loaded.

    Raises:
        Unavailable: the source has no such place.
    """
    if TILE_CONFIG not in source:
        raise Unavailable(f"{AMX_SOURCE} does not load a tile configuration any more")
    return source.replace(TILE_CONFIG, BARRIER + TILE_CONFIG)


def binaries() -> Path:
    """The folder of the tools, compiled when they are not there.

    Raises:
        Unavailable: the compilation failed.
    """
    folder = _folder() / "build"
    recipe = "\n".join((REQUIREMENT, *FLAGS, *TOOLS, BARRIER))
    if not is_built(folder, recipe):
        print(f"compiling llama.cpp in {folder}", flush=True)
        build(["cmake", "-S", str(sources()), "-B", str(folder), *FLAGS])
        jobs = str(len(os.sched_getaffinity(0)))
        build(["cmake", "--build", str(folder), "-j", jobs, "--target", *TOOLS])
        mark_built(folder, recipe)
    return folder / "bin"


def gguf(model: str, variant: str) -> Path:
    """The model as a GGUF file, made when it is not there."""
    make = _convert if variant in CONVERTED else _quantize
    return converted(f"{model}-{variant}.gguf", partial(make, model, variant))


def _convert(model: str, variant: str, target: Path) -> None:
    program = [str(converter_python()), str(WORKERS / "convert_to_gguf.py"), str(sources())]
    build([*program, str(checkpoint(model)), "--outtype", variant, "--outfile", str(target)])
    if not target.is_file():
        raise Unavailable(f"the converter wrote no GGUF file for {model}")


def _quantize(model: str, variant: str, target: Path) -> None:
    tool = str(binaries() / "llama-quantize")
    build([tool, str(gguf(model, "bf16")), str(target), variant.upper()])
