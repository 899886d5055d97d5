"""Text of one choice: token outputs in, deltas out (detokenizer, stop strings, logprobs)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from xdeepserve.messages import FinishReason, TokenLogprobs, TokenOutput
from xdeepserve.text.detokenizer import Detokenizer
from xdeepserve.text.stop_strings import StopAutomaton, StopMatcher
from xdeepserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How a request wants its text; shared by all its choices.

    Attributes:
        stops: automaton over the stop strings, or None without any.
        include_stop: keep the stop string that was found in the text.
        skip_special_tokens: leave special tokens out of the text.
        min_tokens: stop strings are looked for from this token on.
    """

    stops: StopAutomaton | None = None
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """Logprobs of one output token and where its text starts in the choice (characters)."""

    token_id: int
    logprobs: TokenLogprobs
    text_offset: int


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What is new in one choice; deltas add up.

    Attributes:
        finish_reason: `stop` or `length`, on the last delta only.
    """

    index: int
    text: str = ""
    entries: tuple[TokenEntry, ...] = ()
    finish_reason: str | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.entries or self.finish_reason)


def merge_deltas(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """One delta for consecutive ones of the same choice (at least one)."""
    if len(deltas) == 1:
        return deltas[0]
    return ChoiceDelta(
        deltas[0].index,
        "".join(delta.text for delta in deltas),
        tuple(entry for delta in deltas for entry in delta.entries),
        deltas[-1].finish_reason,
    )


class ChoiceText:
    """Turns one sequence's tokens into text; never emits a split code point or a stop string.

    A token's logprobs come out once its text does; those of tokens that only hold the stop string
    or what follows it never do, nor those of the EOS or stop token.

    Attributes:
        num_unread: ids behind the one that completed a stop string, in the same output. They are
            nobody's: without speculation they would not have been made.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._index = index
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=options.skip_special_tokens)
        self._matcher = (
            None
            if options.stops is None
            else StopMatcher(options.stops, include_stop=options.include_stop)
        )
        self._num_unstoppable = options.min_tokens - 1
        self._num_decoded = 0
        self._num_emitted = 0
        self._pending: deque[TokenEntry] = deque()
        self.num_unread = 0

    @property
    def is_stopped(self) -> bool:
        """A stop string was found; the engine need not go on."""
        return self._matcher is not None and self._matcher.is_stopped

    def feed(self, output: TokenOutput) -> ChoiceDelta:
        """Text and logprobs that this output completes; the last one carries finish_reason."""
        token_ids, logprobs = output.token_ids, output.logprobs
        if output.stop_token_id is not None:
            token_ids = token_ids[:-1]
        text = self._feed_tokens(token_ids, logprobs)
        finish: str | None = None
        if self.is_stopped:
            finish = FinishReason.STOP.value
            self.num_unread += len(output.token_ids) - len(token_ids)
        elif output.finish_reason is not None:
            text += self._finish()
            finish = FinishReason.STOP.value if self.is_stopped else output.finish_reason.value
        self._num_emitted += len(text)
        entries = self._release(is_last=finish is not None)
        return ChoiceDelta(self._index, text, tuple(entries), finish)

    def _feed_tokens(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> str:
        emitted: list[str] = []
        for i, token_id in enumerate(token_ids):
            if logprobs is not None:
                self._pending.append(TokenEntry(token_id, logprobs[i], self._num_decoded))
            piece = self._detokenizer.feed(token_id)
            self._num_decoded += len(piece)
            emitted.append(self._match(piece))
            self._num_unstoppable -= 1
            if self.is_stopped:
                self.num_unread = len(token_ids) - i - 1
                break
        return "".join(emitted)

    def _match(self, piece: str) -> str:
        if self._matcher is None or self._num_unstoppable > 0:
            return piece
        return self._matcher.feed(piece)

    def _finish(self) -> str:
        """The rest of an unfinished code point, then what the matcher held back."""
        text = self._match(self._detokenizer.finish())
        if self._matcher is not None:
            text += self._matcher.finish()
        return text

    def _release(self, *, is_last: bool) -> list[TokenEntry]:
        """Entries whose text begins in what was emitted; all when nothing is held back."""
        is_all = self._num_emitted == self._num_decoded and (
            self._detokenizer.is_between_code_points
        )
        is_all = is_all or (is_last and not self.is_stopped)
        released: list[TokenEntry] = []
        while self._pending and (is_all or self._pending[0].text_offset < self._num_emitted):
            released.append(self._pending.popleft())
        return released
