"""Tokenizer files of a GGUF model: metadata -> tokenizer.json and tokenizer_config.json.

Two kinds: "gpt2", a byte-level BPE whose split pattern is named by tokenizer.ggml.pre; and
"llama", a SentencePiece BPE whose merges are implied by the scores of the pieces. Built as plain
dictionaries from untrusted metadata; nothing is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from xdeepserve.errors import ModelFormatError
from xdeepserve.models.files.gguf_file import GGUFFile

MAX_TEMPLATE_CHARS: Final = 1 << 20

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_TYPE_NAMES: Final = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}

_GPT2_SPLIT: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_BYTES_ONLY: Final = {**_GPT2_SPLIT, "use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def _words_and_digits(digits: str) -> str:
    """The GPT-4 style pattern; `digits` says how many digits stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + "|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_PRE_TOKENIZERS: Final[dict[str, list[dict[str, Any]]]] = {
    "gpt-2": [{**_GPT2_SPLIT, "use_regex": True}],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {**_GPT2_SPLIT, "use_regex": True},
    ],
    "llama-bpe": [_split(_words_and_digits(r"\p{N}{1,3}")), _BYTES_ONLY],
    "qwen2": [_split(_words_and_digits(r"\p{N}")), _BYTES_ONLY],
}
_ALIASES: Final = {
    "default": "gpt-2",
    "gpt2": "gpt-2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
}


def tokenizer_files(file: GGUFFile) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a GGUF file, as file name -> content.

    Raises:
        ModelFormatError: no tokenizer in the file, an unknown kind, or inconsistent tables.
    """
    fields = _Fields(file)
    kind = fields.text("model")
    builders: dict[str, Callable[[_Fields], dict[str, Any]]] = {
        "gpt2": _byte_level_bpe,
        "llama": _sentencepiece_bpe,
    }
    if kind not in builders:
        raise fields.wrong("model", kind, "'gpt2' or 'llama'")
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": fields.added_tokens(), **builders[kind](fields),
    }  # fmt: skip
    return {
        "tokenizer.json": _encode(tokenizer),
        "tokenizer_config.json": _encode(fields.tokenizer_config()),
    }


class _Fields:
    """Checked reads of the tokenizer.ggml.* metadata."""

    def __init__(self, file: GGUFFile) -> None:
        self._path: Path = file.path
        self._metadata = file.metadata
        self.tokens = self._list("tokens", str)
        if len(set(self.tokens)) != len(self.tokens):
            raise self.wrong("tokens", "a token twice", "a list of distinct tokens")
        self.types = self._list("token_type", int, optional=True) or [1] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise self.wrong("token_type", f"{len(self.types)} items", f"{len(self.tokens)} long")

    def text(self, name: str, default: str | None = None) -> str:
        value = self._metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._metadata.get(f"tokenizer.ggml.{name}", default))

    def vocabulary(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def scores(self) -> list[float]:
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens):
            raise self.wrong("scores", f"{len(scores)} items", f"{len(self.tokens)} long")
        return scores

    def merges(self) -> list[list[str]]:
        pairs = [merge.split(" ") for merge in self._list("merges", str)]
        vocabulary = set(self.tokens)
        for pair in pairs:
            if len(pair) != 2 or not vocabulary.issuperset((*pair, "".join(pair))):
                raise self.wrong("merges", " ".join(pair), "pairs of tokens that join to a token")
        return pairs

    def special_token(self, role: str) -> str | None:
        """The text of the bos, eos, unknown or padding token, if the model has one."""
        token_id = self._metadata.get(f"tokenizer.ggml.{role}_token_id")
        if token_id is None:
            return None
        if type(token_id) is not int or not 0 <= token_id < len(self.tokens):
            raise self.wrong(f"{role}_token_id", token_id, f"below {len(self.tokens)}")
        token: str = self.tokens[token_id]
        return token

    def added_tokens(self) -> list[dict[str, Any]]:
        """Control and user-defined tokens: matched in text before everything else."""
        added = []
        for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
                added.append(
                    {
                        "id": index, "content": token, "single_word": False, "lstrip": False,
                        "rstrip": False, "normalized": False, "special": kind != _USER_DEFINED,
                    }
                )  # fmt: skip
        return added

    def tokenizer_config(self) -> dict[str, Any]:
        template = self._metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise ModelFormatError(f"{self._path}: tokenizer.chat_template must be a string")
        if template is not None and len(template) > MAX_TEMPLATE_CHARS:
            raise ModelFormatError(
                f"{self._path}: tokenizer.chat_template has {len(template)} characters; "
                f"the limit is {MAX_TEMPLATE_CHARS}"
            )
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._metadata.get("llama.context_length"),
            "add_bos_token": self.flag("add_bos_token", False),
            "add_eos_token": self.flag("add_eos_token", False),
        }
        for role, short in _TYPE_NAMES.items():
            token = self.special_token(role)
            if token is not None:
                config[f"{short}_token"] = token
        if template is not None:
            config["chat_template"] = template
        return config

    def wrong(self, name: str, value: Any, expected: str) -> ModelFormatError:
        shown = repr(value)[:80]
        return ModelFormatError(f"{self._path}: tokenizer.ggml.{name}={shown} must be {expected}")

    def _list(self, name: str, item: type, *, optional: bool = False) -> list[Any]:
        values = self._metadata.get(f"tokenizer.ggml.{name}")
        if values is None and optional:
            return []
        if not isinstance(values, list) or not all(type(value) is item for value in values):
            raise self.wrong(name, type(values).__name__, f"a list of {item.__name__}")
        return values


def _byte_level_bpe(fields: _Fields) -> dict[str, Any]:
    named = fields.text("pre", "default")
    pre = _ALIASES.get(named, named)
    if pre not in _PRE_TOKENIZERS:
        raise fields.wrong("pre", named, f"one of {', '.join([*_PRE_TOKENIZERS, *_ALIASES])}")
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": _add_bos(fields, default=False),
        "decoder": {**_GPT2_SPLIT, "use_regex": True},
        "model": _bpe(
            fields.vocabulary(), fields.merges(), ignore_merges=pre == "llama-bpe"
        ),
    }  # fmt: skip


def _sentencepiece_bpe(fields: _Fields) -> dict[str, Any]:
    """SentencePiece writes spaces as U+2581 and falls back to <0x..> byte pieces."""
    vocabulary = fields.vocabulary()
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    ]
    strip: list[dict[str, Any]] = []
    if fields.flag("add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": "\u2581"})
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": _add_bos(fields, default=True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocabulary,
            _implied_merges(vocabulary, fields.scores()),
            unk_token=fields.special_token("unknown"),
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _bpe(
    vocabulary: dict[str, int],
    merges: list[list[str]],
    *,
    ignore_merges: bool = False,
    unk_token: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": unk_token, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": fuse_unk, "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges, "vocab": vocabulary, "merges": merges,
    }  # fmt: skip


def _implied_merges(vocabulary: dict[str, int], scores: list[float]) -> list[list[str]]:
    """SentencePiece merges the adjacent pair whose joined piece scores best; earlier id wins."""
    ranked = sorted(vocabulary.items(), key=lambda item: (-scores[item[1]], item[1]))
    return [
        [piece[:cut], piece[cut:]]
        for piece, _ in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]


def _add_bos(fields: _Fields, *, default: bool) -> dict[str, Any] | None:
    """The post-processor that puts the BOS token first where the model asks for it."""
    bos = fields.special_token("bos")
    if bos is None or not fields.flag("add_bos_token", default):
        return None
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {
            bos: {"id": bos, "ids": [fields.vocabulary()[bos]], "tokens": [bos]},
        },
    }


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8")
