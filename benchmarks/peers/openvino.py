"""OpenVINO GenAI: its continuous batching pipeline on models exported by optimum-intel."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.peers.environment import Command, Unavailable, build, virtual_environment
from benchmarks.peers.models import checkpoint, converted
from benchmarks.peers.peer import Server, Settings, worker_command

REQUIREMENTS: Final = (
    "openvino-genai==2026.4.1.0",
    "openvino==2026.4.1",
    "nncf==3.4.0",
    "torch==2.13.0",
    "transformers==5.5.4",
    "optimum==2.3.0",
    "requests",
    "setuptools",
)
NO_DEPS: Final = ("optimum-intel==2.2.0",)
"""It asks for torchvision, which may come built for another torch; text needs none."""

EXPORT_FLAGS: Final = {
    "fp16": ("--weight-format", "fp16"),
    "int8": ("--weight-format", "int8"),
    "int4": ("--weight-format", "int4", "--group-size", "32", "--ratio", "1.0"),
}


class OpenVino:
    """OpenVINO GenAI."""

    name = "OpenVINO"
    variants: Final = {"16-bit": ("fp16",), "8-bit": ("int8",), "4-bit": ("int4",)}

    def worker(self, model: str, variant: str, settings: Settings) -> Command:
        """The continuous batching pipeline, stepped by hand."""
        python = _python()
        order = asdict(settings) | {
            "model": str(exported(model, variant)),
            "hint": "THROUGHPUT",
            "batched_tokens": 2048,
        }
        return worker_command(python, "openvino_worker.py", order)

    def server(self, model: str, variant: str, settings: Settings, port: int) -> Server:
        """None: the package has no server."""
        raise Unavailable("the package has no server")


def _python() -> Path:
    return virtual_environment("openvino", REQUIREMENTS, no_deps=NO_DEPS)


def exported(model: str, variant: str) -> Path:
    """The model in OpenVINO's format, made when it is not there."""
    return converted(f"{model}-openvino-{variant}", partial(_export, model, variant))


def _export(model: str, variant: str, target: Path) -> None:
    program = str(_python().parent / "optimum-cli")
    flags = ["--task", "text-generation-with-past", *EXPORT_FLAGS[variant]]
    build([program, "export", "openvino", "--model", str(checkpoint(model)), *flags, str(target)])
