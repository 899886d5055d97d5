"""Incremental detokenizer: equal to decoding at once, never a split code point."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.text.byte_tokenizer import (
    IM_END,
    byte_tokenizer,
    sentencepiece_backend,
    trained_backend,
)
from xdeepserve.text.detokenizer import Detokenizer
from xdeepserve.text.tokenizer import Tokenizer

BYTES = byte_tokenizer()
TRAINED = Tokenizer(trained_backend())
SENTENCEPIECE = Tokenizer(sentencepiece_backend())


def _pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.feed(token_id) for token_id in token_ids), detokenizer.finish()]


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["bytes", "trained"])
@settings(deadline=None, derandomize=True)
@given(text=st.text(max_size=60))
def test_valid_text_comes_out_whole(tokenizer: Tokenizer, text: str) -> None:
    pieces = _pieces(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert all("�" not in piece for piece in pieces) or "�" in text


@settings(deadline=None, derandomize=True)
@given(data=st.data())
def test_any_token_sequence_equals_decoding_at_once(data: st.DataObject) -> None:
    ids = st.integers(0, TRAINED.vocab_size - 1)
    token_ids = data.draw(st.lists(ids, max_size=40))
    assert "".join(_pieces(TRAINED, token_ids)) == TRAINED.decode(token_ids)


@settings(deadline=None, derandomize=True)
@given(text=st.text(min_size=1, max_size=40))
def test_byte_fallback_text_comes_out_whole(text: str) -> None:
    token_ids = SENTENCEPIECE.encode(text)
    assert "".join(_pieces(SENTENCEPIECE, token_ids))[1:] == SENTENCEPIECE.decode(token_ids)


def test_emoji_of_many_tokens_appears_code_point_by_code_point() -> None:
    family = "👩‍👩‍👧"
    pieces = [piece for piece in _pieces(BYTES, BYTES.encode(family)) if piece]
    assert pieces == list(family)


def test_invalid_bytes_are_replaced_and_text_goes_on() -> None:
    assert "".join(_pieces(BYTES, [0xE2, 0x82, 0x61, 0xFF, 0x62])) == "�a�b"


def test_text_cut_inside_a_code_point_ends_in_one_replacement() -> None:
    assert _pieces(BYTES, [0xF0, 0x9F, 0x8E]) == ["", "", "", "�"]


def test_special_tokens_are_skipped_or_kept() -> None:
    skipping, keeping = Detokenizer(BYTES), Detokenizer(BYTES, skip_special_tokens=False)
    assert skipping.feed(IM_END) == ""
    assert keeping.feed(IM_END) == "<|im_end|>"


def test_a_skipped_token_does_not_disturb_a_code_point() -> None:
    assert "".join(_pieces(BYTES, [0xC3, IM_END, 0xA9])) == "é"
