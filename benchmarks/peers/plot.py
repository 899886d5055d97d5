"""The table as a picture: one bar per cell, our ratio to the best peer of the class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot(cells: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Write a PNG; False when matplotlib is not installed or there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [cell for cell in cells if cell["ratio"] is not None]
    if not shown:
        return False
    names = [
        f"{c['model']} {c['precision']} {c['workload']} {c['metric'].split()[0]}" for c in shown
    ]
    figure = Figure(figsize=(8, 1 + 0.22 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    ratios = [cell["ratio"] for cell in shown]
    colors = ["tab:green" if ratio >= 1.0 else "tab:red" for ratio in ratios]
    axes.barh(names, ratios, color=colors)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("ours / best peer of the class")
    axes.tick_params(axis="y", labelsize=6)
    figure.savefig(path, dpi=150)
    return True
