"""Tokenizer files built from GGUF metadata, loaded by the `tokenizers` library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.unit.models.file_toys import llama_gguf
from xdeepserve import envs
from xdeepserve.errors import ModelFormatError
from xdeepserve.models.files.gguf_file import GGUFFile
from xdeepserve.store import tokenizer_folder
from xdeepserve.store.gguf_tokenizer import tokenizer_files

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in order of the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "2 3", "' s", "1 23"]
TOKENS = [*SPECIALS, *byte_alphabet(), *[merge.replace(" ", "") for merge in MERGES[:-1]]]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

BPE: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [CONTROL] * 3 + [USER_DEFINED] + [NORMAL] * (len(TOKENS) - 4),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
}

TEXTS = [
    "hello world, hello's 12345",
    "héllo 日本語 \U0001f642\U0001f468‍\U0001f469‍\U0001f467 \n\n\ttabs  and   spaces ",
    "<|im_start|>user\nhello<|im_end|>",
    "",
    "\x00\x7f",
]


def files(path: Path, **changes: Any) -> dict[str, bytes]:
    fields = {**BPE, **{f"tokenizer.{name}": value for name, value in changes.items()}}
    kept = {name: value for name, value in fields.items() if value is not None}
    return tokenizer_files(GGUFFile(llama_gguf(path / "m.gguf", tokenizer=kept)))


def tokenizer(path: Path, **changes: Any) -> Tokenizer:
    return Tokenizer.from_str(files(path, **changes)["tokenizer.json"].decode())


@pytest.mark.parametrize("pre", ["smollm", "default", "gpt-2", "llama-bpe", "qwen2"])
def test_text_comes_back(pre: str, tmp_path: Path) -> None:
    made = tokenizer(tmp_path, **{"ggml.pre": pre})
    for text in TEXTS:
        assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["hello", "'s", "Ġ", "1", "2", "3", "1"]),
        ("gpt-2", ["hello", "'s", "Ġ", "123", "1"]),
        ("llama-bpe", ["hello", "'s", "Ġ", "123", "1"]),
        ("qwen2", ["hello", "'s", "Ġ", "1", "2", "3", "1"]),
    ],
)
def test_split_patterns(pre: str, expected: list[str], tmp_path: Path) -> None:
    assert tokenizer(tmp_path, **{"ggml.pre": pre}).encode("hello's 1231").tokens == expected


def test_special_tokens(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    encoded = made.encode("<|im_start|>hello<tool>hello<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "hello", "<tool>", "hello", "<|im_end|>"]
    assert encoded.ids[0] == 1
    assert made.decode(encoded.ids) == "hello<tool>hello"


def test_config(tmp_path: Path) -> None:
    config = json.loads(files(tmp_path)["tokenizer_config.json"])
    assert config["chat_template"] == TEMPLATE
    assert config["bos_token"] == "<|im_start|>"
    assert config["eos_token"] == "<|im_end|>"
    assert config["unk_token"] == "<|endoftext|>"
    assert config["model_max_length"] == 64


def test_bos_is_added_where_asked(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, **{"ggml.add_bos_token": True})
    assert made.encode("hello").tokens == ["<|im_start|>", "hello"]
    assert made.encode("hello", add_special_tokens=False).tokens == ["hello"]


PIECES = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
PIECES += ["\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello", "lo"]
SENTENCEPIECE: dict[str, Any] = {
    "ggml.model": "llama",
    "ggml.pre": "default",
    "ggml.tokens": PIECES,
    "ggml.token_type": [2, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(PIECES) - 259),
    "ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES) - 259)],
    "ggml.merges": None,
    "ggml.bos_token_id": 1,
    "ggml.unknown_token_id": 0,
    "ggml.add_bos_token": True,
}


def test_sentencepiece(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, **SENTENCEPIECE)
    assert made.encode("hello hello").tokens == ["<s>", "\u2581hello", "\u2581hello"]
    assert made.encode("é").tokens == ["<s>", "\u2581", "<0xC3>", "<0xA9>"]
    for text in ("hello  hello", "é日本\U0001f642", " hello"):
        assert made.decode(made.encode(text).ids) == text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"ggml.model": None}, "model=None"),
    "unknown kind": ({"ggml.model": "bert"}, "bert"),
    "unknown split": ({"ggml.pre": "hieroglyphs"}, "hieroglyphs"),
    "no tokens": ({"ggml.tokens": None}, "tokens"),
    "token twice": ({"ggml.tokens": ["a", "a"], "ggml.token_type": [1, 1]}, "distinct"),
    "types too short": ({"ggml.token_type": [1]}, "token_type"),
    "merge of unknown tokens": ({"ggml.merges": ["he xx"]}, "merges"),
    "merge of one token": ({"ggml.merges": ["he"]}, "merges"),
    "merge of three": ({"ggml.merges": ["h e l"]}, "merges"),
    "bos out of range": ({"ggml.bos_token_id": 10_000}, "bos_token_id"),
    "template too long": ({"chat_template": "x" * ((1 << 20) + 1)}, "limit"),
    "template a number": ({"chat_template": 3}, "string"),
    "no scores": ({**SENTENCEPIECE, "ggml.scores": None}, "scores"),
    "scores too short": ({**SENTENCEPIECE, "ggml.scores": [0.0]}, "scores"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inconsistent_tables_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ModelFormatError, match=message) as caught:
        files(tmp_path, **changes)
    assert len(caught.value.message) < 500


def test_tokenizer_folder_is_written_once(tmp_path: Path) -> None:
    gguf = llama_gguf(tmp_path / "m.gguf", tokenizer=BPE)
    with envs.HOME.override(str(tmp_path / "home")):
        folder = tokenizer_folder(gguf)
        before = (folder / "tokenizer.json").stat().st_mtime_ns
        assert tokenizer_folder(gguf) == folder
        assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.iterdir()) == [
        "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((folder / "generation_config.json").read_bytes())["eos_token_id"] == 2
