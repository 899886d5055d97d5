"""`xdeepserve doctor`: what this machine can do, which instruction set is used, leftovers."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

from xdeepserve import __version__, envs
from xdeepserve.errors import ConfigError
from xdeepserve.launch.cores import Topology
from xdeepserve.launch.machine_memory import THP_FOLDER, memory_facts
from xdeepserve.launch.run_dir import clean_dead_runs, dead_runs, living_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--measure", action="store_true", help="also measure bandwidth and GEMM")
    parser.add_argument(
        "--clean", action="store_true", help="remove what dead runs left: processes, files, memory"
    )
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print one `name: value` line per fact; returns 1 when serving would not work."""
    _show("xdeepserve", __version__)
    _show("python", f"{platform.python_version()} ({sys.executable})")
    _show("machine", f"{platform.machine()}, {_cpu_name()}")
    _show("cores usable", str(len(os.sched_getaffinity(0))))
    _show("memory", f"{_memory_bytes() / 2**30:.1f} GiB")
    for name, value in memory_facts(THP_FOLDER, Topology.of_this_machine()):
        _show(name, value)
    healthy = _show_native()
    for env in envs.ALL:
        _show(env.name, f"{env.get()}  ({env.doc})")
    _show_storage(envs.HOME.get())
    _show_runs(clean=args.clean)
    if args.measure and healthy:
        _show_ceilings()
    return 0 if healthy else 1


def _show(name: str, value: str) -> None:
    print(f"{name + ':':24} {value}")


def _show_native() -> bool:
    try:
        from xdeepserve import _native
        from xdeepserve.ops.cpu import CpuOps

        ops = CpuOps()
    except ConfigError as exc:
        _show("native core", f"NOT USABLE: {exc.message}")
        return False
    _show("native core", _native.COMPILER)
    _show("instruction sets", f"{', '.join(_native.available_isas())} (in use: {ops.isa})")
    _show("operator threads", str(ops.num_threads))
    return True


def _show_storage(home: Path) -> None:
    from xdeepserve.xccl import segments

    for name in ("models", "packed"):
        folder = home / name
        files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
        size = sum(path.stat().st_size for path in files)
        _show(f"{name} on disk", f"{len(files)} files, {size / 2**20:.0f} MiB in {folder}")
    leftovers: list[Path] = [info.path for info in segments.leftovers()]
    leftovers += [path for name in ("models", "packed") for path in (home / name).glob("*.tmp")]
    leftovers += (home / "models").glob(".*.tmp")
    _show("leftovers", ", ".join(map(str, sorted(set(leftovers)))) or "none")


def _show_runs(*, clean: bool) -> None:
    _show("living runs", ", ".join(run.run_id for run in living_runs()) or "none")
    dead = clean_dead_runs() if clean else dead_runs()
    verb = "removed" if clean else "left; --clean removes it"
    for run in dead:
        _show(f"dead run {run.run_id}", f"{run.path} {verb}")
    if not dead:
        _show("dead runs", "none")


def _show_ceilings() -> None:
    from xdeepserve.ops.machine import measure_ceilings

    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        ceilings = measure_ceilings(threads)
        gemm = ", ".join(f"{name} {value:.0f}" for name, value in ceilings.gemm_gflop_per_s.items())
        _show(f"{threads} thread(s)", f"read {ceilings.read_gb_per_s:.1f} GB/s; GEMM GOP/s: {gemm}")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
