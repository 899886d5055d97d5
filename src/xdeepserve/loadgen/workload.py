"""What the load generator asks for: seeded prompts of a given token length, and output lengths.

Request i depends on (seed, i) only, so a workload is the same at any concurrency. Prompts are
random token ids (exact lengths, no tokenizer needed) or, for chat endpoints, plain English words.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from xdeepserve.errors import ConfigError

Endpoint = Literal["completions", "chat"]
PATHS: Final[dict[str, str]] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
}

DEFAULT_TOKEN_RANGE: Final = (256, 8192)
"""Above the special and byte tokens of the usual tokenizers, below any real vocabulary's end."""

MAX_LENGTH: Final = 10_000_000

# Short everyday words: nearly every tokenizer has each of them, with its space, as one token.
_WORD_LIST: Final = """
the of and to in is was for on that with as at by from this had not are but be have one all were
when we there can an your which their said if do will each about how up out them then she many some
so these would other into has more her two like him see time could no make than first been its who
now people my made over did down only way find use may water long
"""
_WORDS: Final = tuple(_WORD_LIST.split())


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """Token lengths drawn from `kind` with parameters `a` and `b`; always at least 1.

    fixed: a. uniform: integers a to b. lognormal: mean a tokens, sigma b of the logarithm.
    """

    kind: Literal["fixed", "uniform", "lognormal"]
    a: float
    b: float = 0.0

    @classmethod
    def parse(cls, text: str) -> LengthDistribution:
        """From `128`, `uniform:64:256` or `lognormal:200:0.5`.

        Raises:
            ConfigError: none of these forms, or lengths outside 1 to MAX_LENGTH.
        """
        match text.split(":"):
            case [length]:
                parsed = cls("fixed", _number(length, text))
            case ["uniform", low, high]:
                parsed = cls("uniform", _number(low, text), _number(high, text))
            case ["lognormal", mean, sigma]:
                parsed = cls("lognormal", _number(mean, text), _number(sigma, text))
            case _:
                raise ConfigError(f"length {text!r} must be N, uniform:LOW:HIGH or lognormal:M:S")
        parsed._check(text)
        return parsed

    def _check(self, text: str) -> None:
        limits = (self.a, self.b) if self.kind == "uniform" else (self.a,)
        if not all(1 <= limit <= MAX_LENGTH for limit in limits):
            raise ConfigError(f"length {text!r} must lie between 1 and {MAX_LENGTH}")
        if self.kind != "lognormal" and not all(limit.is_integer() for limit in limits):
            raise ConfigError(f"length {text!r} must be whole tokens")
        if self.kind == "uniform" and self.a > self.b:
            raise ConfigError(f"length {text!r}: LOW must not exceed HIGH")
        if self.kind == "lognormal" and not 0 <= self.b <= 4:
            raise ConfigError(f"length {text!r}: sigma must lie between 0 and 4")

    def __str__(self) -> str:
        """The form that `parse` reads."""
        if self.kind == "fixed":
            return f"{self.a:g}"
        return f"{self.kind}:{self.a:g}:{self.b:g}"

    def draw(self, rng: random.Random) -> int:
        """One length."""
        match self.kind:
            case "fixed":
                return int(self.a)
            case "uniform":
                return rng.randint(int(self.a), int(self.b))
            case "lognormal":
                mu = math.log(self.a) - self.b**2 / 2
                return max(1, min(MAX_LENGTH, round(rng.lognormvariate(mu, self.b))))


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as exc:
        raise ConfigError(f"length {whole!r}: {text!r} is not a number") from exc


class DatasetRow(msgspec.Struct, forbid_unknown_fields=True):
    """One line of a dataset file: lengths alone, or a prompt (text or token ids) of its own."""

    output_len: int
    input_len: int | None = None
    prompt: str | list[int] | None = None


def read_dataset(path: Path) -> list[DatasetRow]:
    """Rows of a JSONL file, in order; blank lines are skipped.

    Raises:
        ConfigError: unreadable, empty, or a row without usable lengths (the line is named).
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"dataset {path}: {exc}") from exc
    rows = [_parse_row(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"dataset {path} has no rows")
    return rows


def _parse_row(path: Path, line_number: int, line: str) -> DatasetRow:
    try:
        row = msgspec.json.decode(line, type=DatasetRow)
    except msgspec.MsgspecError as exc:
        raise ConfigError(f"dataset {path}, line {line_number}: {exc}") from exc
    lengths = (row.output_len, 1 if row.input_len is None else row.input_len)
    if not all(1 <= length <= MAX_LENGTH for length in lengths):
        raise ConfigError(
            f"dataset {path}, line {line_number}: lengths must lie between 1 and {MAX_LENGTH}"
        )
    if not row.prompt and row.input_len is None:
        raise ConfigError(f"dataset {path}, line {line_number}: needs input_len or prompt")
    return row


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """What every request of a benchmark looks like.

    Attributes:
        endpoint: completions (token ids) or chat (words).
        input_len, output_len: distributions; unused for what `dataset` rows state.
        shared_prefix_len: this many leading prompt tokens are the same in all requests.
        token_range: ids are drawn from [low, high).
        ignore_eos: ask the server to generate exactly the output length.
        extra_body: fields added to every request, winning over ours.
    """

    endpoint: Endpoint = "completions"
    input_len: LengthDistribution = LengthDistribution("fixed", 128)
    output_len: LengthDistribution = LengthDistribution("fixed", 128)
    dataset: tuple[DatasetRow, ...] = ()
    shared_prefix_len: int = 0
    token_range: tuple[int, int] = DEFAULT_TOKEN_RANGE
    ignore_eos: bool = True
    seed: int = 0
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        low, high = self.token_range
        if not 0 <= low < high:
            raise ConfigError(f"token range {low}:{high} must satisfy 0 <= LOW < HIGH")
        if self.shared_prefix_len < 0:
            raise ConfigError(f"shared prefix length {self.shared_prefix_len} must not be negative")


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request ready to be posted; `input_len` is None where a text prompt came from a file."""

    path: str
    body: dict[str, Any]
    input_len: int | None
    output_len: int


class Workload:
    """A reproducible, endless sequence of requests.

    Streams with different numbers share the prefix and nothing else: warm-up and measurement, or
    two probes of a search, never hit each other's prompts in the server's prefix cache.
    """

    def __init__(self, config: WorkloadConfig, model: str) -> None:
        self.config = config
        self._model = model
        prefix_rng = random.Random(config.seed)
        self._prefix: list[Any] = self._draw_units(prefix_rng, config.shared_prefix_len)

    def requests(self, *, stream: int = 0) -> Iterator[WorkloadRequest]:
        """Requests 0, 1, 2, ... of a stream."""
        rows = self.config.dataset
        index = 0
        while True:
            rng = random.Random(f"{self.config.seed}/{stream}/{index}")
            yield self._build(rng, rows[index % len(rows)] if rows else None)
            index += 1

    def _build(self, rng: random.Random, row: DatasetRow | None) -> WorkloadRequest:
        config = self.config
        if row is not None and row.prompt:
            prompt, output_len = row.prompt, row.output_len
            input_len = len(prompt) if isinstance(prompt, list) else None
            return self._request(prompt, input_len, output_len)
        if row is not None and row.input_len is not None:
            input_len, output_len = row.input_len, row.output_len
        else:
            input_len, output_len = config.input_len.draw(rng), config.output_len.draw(rng)
        shared = self._prefix[: input_len - 1]
        units = shared + self._draw_units(rng, input_len - len(shared))
        prompt = " ".join(units) if config.endpoint == "chat" else units
        return self._request(prompt, input_len, output_len)

    def _draw_units(self, rng: random.Random, count: int) -> list[Any]:
        """Words for chat, token ids for completions."""
        if self.config.endpoint == "chat":
            return rng.choices(_WORDS, k=count)
        return rng.choices(range(*self.config.token_range), k=count)

    def _request(
        self, prompt: str | list[int], input_len: int | None, output_len: int
    ) -> WorkloadRequest:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.config.endpoint == "chat":
            if not isinstance(prompt, str):
                raise ConfigError("a dataset prompt of token ids needs --endpoint completions")
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self.config.ignore_eos:
            body["ignore_eos"] = True
        body.update(self.config.extra_body)
        return WorkloadRequest(PATHS[self.config.endpoint], body, input_len, output_len)
