"""From runs to cells: medians, pairwise ratios, the best peer of each class; JSON and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from benchmarks.peers.xdeepserve import OURS

METRICS: Final = ("output tok/s", "prefill tok/s", "decode tok/s")
"""What cells compare; all better when higher. Other values of a run are kept beside them."""


@dataclass(slots=True)
class Row:
    """One variant of an engine in one workload of one model and class.

    Attributes:
        runs: one record of values per repeat.
        reason: why there are none, or fewer; empty when there is nothing to say.
        commit: of this project when they were made; empty outside a git tree.
    """

    model: str
    precision: str
    workload: str
    peer: str
    variant: str
    runs: list[dict[str, float]] = field(default_factory=list)
    reason: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What rows are compared within."""
        return self.model, self.precision, self.workload

    def median(self, metric: str) -> float | None:
        """Over the runs; None without any."""
        values = self.values(metric)
        return median(values) if values else None

    def values(self, metric: str) -> list[float]:
        """One per repeat."""
        return [run[metric] for run in self.runs if metric in run]


def cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One record per model, class, workload and metric, with its `ratio` field."""
    found = []
    for key in dict.fromkeys(row.key for row in rows):
        group = [row for row in rows if row.key == key]
        others = [row for row in rows if (row.model, row.workload) == (key[0], key[2])]
        for metric in METRICS:
            if any(row.values(metric) for row in group):
                found.append(_cell(group, others, metric))
    return found


def _cell(group: Sequence[Row], any_class: Sequence[Row], metric: str) -> dict[str, Any]:
    model, precision, workload = group[0].key
    ours = _best((row for row in group if row.peer == OURS), metric)
    peer = _best((row for row in group if row.peer != OURS), metric)
    every = _best((row for row in any_class if row.peer != OURS), metric)
    return {
        "model": model,
        "precision": precision,
        "workload": workload,
        "metric": metric,
        "ours": ours and ours.median(metric),
        "best_peer": peer and f"{peer.peer} {peer.variant}",
        "best": peer and peer.median(metric),
        "ratio": _ratio(ours, peer, metric),
        "best_peer_of_any_class": every and f"{every.peer} {every.variant}",
        "ratio_any_class": _ratio(ours, every, metric),
        "rows": [
            {
                "peer": row.peer,
                "variant": row.variant,
                "median": row.median(metric),
                "runs": row.values(metric),
                "reason": row.reason,
            }
            for row in group
        ],
    }


def _best(rows: Iterable[Row], metric: str) -> Row | None:
    measured = [row for row in rows if row.values(metric)]
    return max(measured, key=lambda row: median(row.values(metric)), default=None)


def _ratio(ours: Row | None, peer: Row | None, metric: str) -> float | None:
    """Median of the ratios of runs that took turns; of medians where they did not."""
    if ours is None or peer is None:
        return None
    mine, theirs = ours.values(metric), peer.values(metric)
    took_turns = len(mine) == len(theirs) and ours.commit == peer.commit
    if not took_turns or not all(theirs):
        bar = median(theirs)
        return median(mine) / bar if bar else None
    return median(a / b for a, b in zip(mine, theirs, strict=True))


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """One line per cell: ours, the ratio, and what each engine reached."""
    lines = ["| model | class | workload | metric | ours | best peer | ratio | all peers |"]
    lines.append("| --- | --- | --- | --- | ---: | --- | ---: | --- |")
    for cell in found:
        best = f"{cell['best_peer']} {_number(cell['best'])}" if cell["best_peer"] else "-"
        peers = "; ".join(_row_text(row) for row in cell["rows"] if row["peer"] != OURS)
        values = [cell["model"], cell["precision"], cell["workload"], cell["metric"]]
        values += [_ours_text(cell), best, _number(cell["ratio"], 2), peers]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def _ours_text(cell: Mapping[str, Any]) -> str:
    if cell["ours"] is not None:
        return _number(cell["ours"])
    return "; ".join(row["reason"] for row in cell["rows"] if row["peer"] == OURS) or "-"


def _row_text(row: Mapping[str, Any]) -> str:
    name = f"{row['peer']} {row['variant']}".strip()
    if row["median"] is None:
        return f"{name} {row['reason']}"
    return f"{name} {_number(row['median'])} (n={len(row['runs'])})"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
