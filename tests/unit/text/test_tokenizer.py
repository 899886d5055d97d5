"""Tokenizer: reading a folder, special tokens, bytes of tokens, damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from tests.unit.text.byte_tokenizer import (
    BOS,
    IM_END,
    IM_START,
    VOCAB_SIZE,
    byte_backend,
    byte_tokenizer,
    sentencepiece_backend,
    trained_backend,
)
from xdeepserve.errors import ModelFormatError
from xdeepserve.text.token_bytes import BYTE_ALPHABET
from xdeepserve.text.tokenizer import MAX_TEMPLATE_CHARS, Tokenizer

BYTES = byte_tokenizer()
TRAINED = Tokenizer(trained_backend())
SENTENCEPIECE = Tokenizer(sentencepiece_backend())


def _folder(path: Path, config: dict[str, Any] | None = None) -> Path:
    byte_backend().save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_from_folder_reads_special_tokens_and_template(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "chat_template": [
            {"name": "tool_use", "template": "T"},
            {"name": "default", "template": "D"},
        ],
    }
    tokenizer = Tokenizer.from_folder(_folder(tmp_path, config))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    assert tokenizer.chat_template == "D"
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.special_token_ids == {IM_START, IM_END, BOS}
    assert tokenizer.token_id("<|im_end|>") == IM_END
    assert tokenizer.token_id("nope") is None


def test_template_file_wins_over_config(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"chat_template": "from config"})
    assert Tokenizer.from_folder(folder).chat_template == "from config"
    (folder / "chat_template.jinja").write_text("from file é")
    assert Tokenizer.from_folder(folder).chat_template == "from file é"


def test_folder_without_config_has_no_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(_folder(tmp_path))
    assert tokenizer.chat_template is None
    assert tokenizer.special_tokens == {}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"", "damaged"),
        ("tokenizer.json", b"{}", "damaged"),
        ("tokenizer.json", b"\xff\xfe", "damaged"),
        ("tokenizer_config.json", b"[1]", "not a JSON object"),
        ("tokenizer_config.json", b'{"a": ', "not a JSON object"),
        ("tokenizer_config.json", b"[" * 100_000, "not a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "neither"),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": "x" * (MAX_TEMPLATE_CHARS + 1)}).encode(),
            str(MAX_TEMPLATE_CHARS),
        ),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    folder = _folder(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFormatError, match=words):
        Tokenizer.from_folder(folder)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_unsupported_decoder_is_refused() -> None:
    backend = byte_backend()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelFormatError, match="WordPiece"):
        Tokenizer(backend)


def test_truncation_and_padding_of_the_file_are_turned_off() -> None:
    backend = byte_backend()
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=10)
    assert len(Tokenizer(backend).encode("hello")) == 5


def test_special_tokens_in_text_become_ids() -> None:
    assert BYTES.encode("a<|im_end|>") == [ord("a"), IM_END]
    assert BYTES.decode([ord("a"), IM_END]) == "a"
    assert BYTES.decode([ord("a"), IM_END], skip_special_tokens=False) == "a<|im_end|>"


def test_token_bytes_of_parts_specials_and_strangers() -> None:
    assert BYTES.token_bytes(0xE2) == b"\xe2"
    assert BYTES.token_bytes(IM_END) == b"<|im_end|>"
    assert BYTES.token_bytes(VOCAB_SIZE + 7) == b""
    assert BYTES.token_bytes(-1) == b""
    byte_token = SENTENCEPIECE.token_id("<0x0A>")
    space = SENTENCEPIECE.token_id("▁")
    assert byte_token is not None
    assert space is not None
    assert SENTENCEPIECE.token_bytes(byte_token) == b"\n"
    assert SENTENCEPIECE.token_bytes(space) == b" "


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["bytes", "trained"])
@settings(deadline=None, derandomize=True)
@given(text=st.text(max_size=40))
def test_bytes_of_tokens_make_up_the_text(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()


@settings(deadline=None, derandomize=True)
@given(text=st.text(max_size=40))
def test_sentencepiece_bytes_keep_the_first_space(text: str) -> None:
    token_ids = SENTENCEPIECE.encode(text)
    if text and "▁" not in text:
        assert b"".join(map(SENTENCEPIECE.token_bytes, token_ids)) == f" {text}".encode()


def test_longest_token_is_measured_in_bytes_of_text() -> None:
    vocab = {**BYTE_ALPHABET, "Ġ" * 20: 256}  # a stand-in of two bytes for each space
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    assert Tokenizer(backend).max_token_bytes == 20
    backend.add_tokens(["é" * 11])
    assert Tokenizer(backend).max_token_bytes == 22
