"""What does speculation bring, and what does it cost where it cannot bring anything?

The same requests through two engines in turn, without drafts and with: texts that are quoted back,
code that is edited, and continuations of texts, greedy and sampled. Ratios are medians over pairs
of runs. Both engines must give the same ids, or the benchmark fails. The ceiling is what one step
could give at most, 1 + the number of drafts. The last line is JSON.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from statistics import median

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.config import EngineConfig, ModelConfig
from xdeepserve.errors import IntegrityError
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.launch.compose import LoadedModel, load_named
from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.messages import GenerateRequest, LoadReport, SamplingParams
from xdeepserve.ops.machine import measure_ceilings
from xdeepserve.text.tokenizer import Tokenizer

PASSAGE = (
    "The harbour of {name} lies behind two breakwaters, and the older of them was built of basalt "
    "by prisoners. On market days the ferries leave every quarter of an hour; the first carries "
    "fishermen with their crates, the second schoolchildren, and after that come the buyers from "
    "the hills, who pay in coin and count it twice. In winter the lamp on the mole burns from four "
    "o'clock, and keeper {name} writes down each ship, her cargo and the weather."
)
CODE = '''def summarize_{name}(orders, rates):
    """Total of the orders by currency, converted with the given rates."""
    totals = {{}}
    for order in orders:
        if order.cancelled:
            continue
        rate = rates[order.currency]
        totals[order.currency] = totals.get(order.currency, 0.0) + rate * order.amount
    return dict(sorted(totals.items()))
'''
OPENINGS = (
    "The three most important rivers of Europe are",
    "Photosynthesis is the process by which",
    "My grandmother kept bees, and every autumn she",
    "In order to bake a good loaf of bread you need",
    "The history of the printing press begins with",
    "When the captain saw the storm he decided to",
    "A prime number is a natural number that",
    "The committee met on Tuesday and discussed whether",
)
NAMES = ("Alder", "Birch", "Cedar", "Doveton", "Elmira", "Fairlie", "Grange", "Hazel")


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of one kind; sampled at `temperature`."""

    name: str
    prompts: tuple[str, ...]
    temperature: float = 0.0


def workloads() -> list[Workload]:
    """The kinds of text, eight prompts of each."""
    quoted, edited = [], []
    for name in NAMES:
        passage, code = PASSAGE.format(name=name), CODE.format(name=name.lower())
        quoted.append(f"{passage}\n\nThe same text once more:\n\n{passage[:40]}")
        renamed = f"def summarize_{name.lower()}_open(orders, rates):"
        edited.append(f"{code}\n\n# The same under another name:\n{renamed}\n")
    return [
        Workload("quote", tuple(quoted)),
        Workload("edit", tuple(edited)),
        Workload("plain", OPENINGS),
        Workload("plain-sampled", OPENINGS, temperature=1.0),
    ]


@dataclass(frozen=True, slots=True)
class Cell:
    """One workload at one batch size; medians over the repeats.

    Attributes:
        ratio: tokens per second with speculation over those without.
        acceptance: accepted over checked drafts.
        drafted: checked drafts per output token.
        accepted_per_position: by place among the drafts.
    """

    workload: str
    batch: int
    off_tokens_per_s: float
    on_tokens_per_s: float
    ratio: float
    acceptance: float
    drafted: float
    accepted_per_position: tuple[int, ...]


def requests_of(
    workload: Workload, tokenizer: Tokenizer, *, batch: int, output_len: int, salt: str
) -> list[GenerateRequest]:
    """`batch` requests; equal prompts differ by seed."""
    prompts = workload.prompts
    return [
        GenerateRequest(
            request_id=f"{salt}-{idx}",
            prompt_token_ids=tokenizer.encode(prompts[idx % len(prompts)], add_special_tokens=True),
            params=SamplingParams(
                max_tokens=output_len,
                temperature=workload.temperature,
                ignore_eos=True,
                seed=idx,
            ),
            cache_salt=salt,
        )
        for idx in range(batch)
    ]


def run(group: DPGroup, requests: list[GenerateRequest]) -> tuple[float, dict[str, list[int]]]:
    """Seconds from the first output token on, and each request's ids."""
    for request in requests:
        group.submit(request)
    ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
    num_left, begun_s = len(requests), None
    while num_left:
        for output in group.step():
            ids[output.request_id] += output.token_ids
            num_left -= output.finish_reason is not None
        if begun_s is None and all(ids.values()):
            begun_s = SYSTEM_CLOCK.monotonic()
    assert begun_s is not None, "every request has output"
    return SYSTEM_CLOCK.monotonic() - begun_s, ids


def measure(
    groups: tuple[DPGroup, DPGroup],
    tokenizer: Tokenizer,
    workload: Workload,
    batch: int,
    args: argparse.Namespace,
) -> Cell:
    """Both engines in turn, the first one changing with every repeat."""
    seconds: tuple[list[float], list[float]] = ([], [])
    before = groups[1].load()
    for repeat in range(args.repeats):
        answers = []
        for engine in (0, 1) if repeat % 2 == 0 else (1, 0):
            requests = requests_of(
                workload, tokenizer, batch=batch, output_len=args.output_len, salt=str(repeat)
            )
            duration_s, ids = run(groups[engine], requests)
            seconds[engine].append(duration_s)
            answers.append(ids)
        if answers[0] != answers[1]:
            raise IntegrityError(f"{workload.name}: speculation changed the output")
    return _cell(workload.name, batch, args, seconds, _since(before, groups[1].load()))


def _since(before: LoadReport, after: LoadReport) -> tuple[int, int, tuple[int, ...]]:
    """Drafts checked, accepted, and accepted by position."""
    old = (*before.accepted_per_position, *[0] * len(after.accepted_per_position))
    positions = zip(after.accepted_per_position, old, strict=False)
    return (
        after.num_draft_tokens - before.num_draft_tokens,
        after.num_accepted_tokens - before.num_accepted_tokens,
        tuple(new - past for new, past in positions),
    )


def _cell(
    name: str,
    batch: int,
    args: argparse.Namespace,
    seconds: tuple[list[float], list[float]],
    drafts: tuple[int, int, tuple[int, ...]],
) -> Cell:
    num_tokens = batch * (args.output_len - 1)
    num_drafts, num_accepted, by_position = drafts
    return Cell(
        workload=name,
        batch=batch,
        off_tokens_per_s=num_tokens / median(seconds[0]),
        on_tokens_per_s=num_tokens / median(seconds[1]),
        ratio=median(off / on for off, on in zip(*seconds, strict=True)),
        acceptance=num_accepted / num_drafts if num_drafts else 0.0,
        drafted=num_drafts / (num_tokens * args.repeats),
        accepted_per_position=by_position,
    )


def build(loaded: LoadedModel, speculation: str, num_drafts: int) -> DPGroup:
    """An engine that is stepped by hand."""
    config = EngineConfig(speculation=speculation, num_speculative_tokens=num_drafts)
    return build_dp_group(model=loaded.model, model_name=loaded.name, config=config)


def main() -> int:
    """Measure every workload and batch size; prints a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="name or folder")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--speculation", default="ngram")
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    loaded = load_named(args.model, ModelConfig(dtype=args.dtype))
    tokenizer = Tokenizer.from_folder(loaded.tokenizer_dir)
    number = args.num_speculative_tokens
    groups = build(loaded, "off", number), build(loaded, args.speculation, number)
    print(
        f"{'workload':>14}{'batch':>6}{'off':>9}{'on':>9}{'ratio':>8}{'accepted':>10}{'drafts':>8}"
    )
    cells = []
    for workload in workloads():
        for batch in args.batch:
            cell = measure(groups, tokenizer, workload, batch, args)
            cells.append(cell)
            print(
                f"{cell.workload:>14}{batch:>6}{cell.off_tokens_per_s:>9.1f}"
                f"{cell.on_tokens_per_s:>9.1f}{cell.ratio:>8.2f}{cell.acceptance:>10.0%}"
                f"{cell.drafted:>8.2f}",
                flush=True,
            )
    document = {
        "benchmark": "speculation",
        "config": vars(args),
        "results": [asdict(cell) for cell in cells],
        "ceiling": {"tokens_per_step": 1 + number} | asdict(measure_ceilings(0)),
        "machine": machine_fingerprint(),
    }
    print(json_line(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
