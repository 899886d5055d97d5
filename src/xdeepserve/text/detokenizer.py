"""Incremental detokenizer: token ids in, whole code points out, O(1) amortised per token.

Bytes of each token go through one incremental UTF-8 decoder, so the history is never decoded again
and a code point spread over several tokens comes out when its last byte is there.
"""

from __future__ import annotations

import codecs

from xdeepserve.text.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Text of one growing sequence. The concatenation of all returned pieces is its text.

    Args:
        tokenizer: shared, read only.
        skip_special_tokens: leave special tokens (`<|im_end|>`, BOS, ...) out of the text.
    """

    __slots__ = ("_decoder", "_skipped", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._decoder = _UTF8("replace")

    def feed(self, token_id: int) -> str:
        """Text completed by one more token; empty while a code point is incomplete."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    @property
    def is_between_code_points(self) -> bool:
        """Whether no code point waits for its last bytes."""
        return not self._decoder.getstate()[0]

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a code point cut short, else nothing."""
        return self._decoder.decode(b"", final=True)
