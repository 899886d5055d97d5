"""Tokenizer of a model folder: text <-> token ids, special tokens, bytes of single tokens.

A thin owner of a `tokenizers.Tokenizer`. Reads tokenizer.json, tokenizer_config.json and the chat
template's source; all of them are untrusted input. Safe to share between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from xdeepserve.errors import ModelFormatError
from xdeepserve.text.token_bytes import DecoderSpec, converter_of

MAX_FILE_BYTES = 256 << 20
MAX_TEMPLATE_CHARS = 1 << 20
NAMED_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
)  # fmt: skip


class _TokenizerFile(msgspec.Struct):
    decoder: DecoderSpec | None = None


class Tokenizer:
    """Text to token ids and back, for one model.

    Attributes:
        special_tokens: name (`bos_token`, `eos_token`, ...) -> string, as the model names them.
        special_token_ids: ids that are left out of text when special tokens are skipped.
        vocab_size: one more than the highest id.
        chat_template: source of the model's chat template, or None.
        max_token_bytes: no token stands for more bytes of text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
        decoder: DecoderSpec | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._to_bytes = converter_of(decoder or _decoder_of(backend))
        self._bytes_of: dict[int, bytes] = {}
        self.special_tokens = special_tokens or {}
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        # Added tokens are found in a text as they are spelled, whatever the decoder.
        lengths = [len(token.content.encode()) for token in added.values()]
        lengths += [len(self._to_bytes(token)) for token in backend.get_vocab()]
        self.max_token_bytes = max([1, *lengths])
        count = backend.get_vocab_size(with_added_tokens=True)
        self.vocab_size = max([count, *(i + 1 for i in added)])

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer of a Hugging Face model folder.

        Raises:
            ModelFormatError: a file is missing, damaged, too large or of an unsupported kind.
        """
        folder = Path(path)
        raw = _read(folder / "tokenizer.json")
        config = _read_object(folder / "tokenizer_config.json")
        try:
            parsed = msgspec.json.decode(raw, type=_TokenizerFile)
            backend = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as exc:  # foreign: tokenizers raises bare Exception
            raise ModelFormatError(f"{folder / 'tokenizer.json'} is damaged: {exc}") from exc
        return cls(
            backend,
            special_tokens=_special_tokens(config),
            chat_template=_template_source(folder, config),
            decoder=parsed.decoder,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; the GIL is released while it runs.

        Special tokens written out in `text` become their ids, as chat templates need.

        Args:
            text: without lone surrogates.
            add_special_tokens: put BOS (or what the model's post-processor adds) around.
        """
        # The batch call is the one that releases the GIL and computes no offsets.
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token adds to a text; a part of a code point for many tokens.

        An id that the model has but the tokenizer does not (padded vocabularies) is empty.
        """
        cached = self._bytes_of.get(token_id)
        if cached is None:
            token = self._backend.id_to_token(token_id) if token_id >= 0 else None
            cached = b"" if token is None else self._to_bytes(token)
            self._bytes_of[token_id] = cached
        return cached

    def token_id(self, token: str) -> int | None:
        """Id of one token by its exact string, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found


def _decoder_of(backend: tokenizers.Tokenizer) -> DecoderSpec | None:
    return msgspec.json.decode(backend.to_str(), type=_TokenizerFile).decoder


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ModelFormatError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as exc:
        raise ModelFormatError(f"cannot read {path}: {exc.strerror}") from exc


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file."""
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(_read(path), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ModelFormatError(f"{path} is not a JSON object: {exc}") from exc


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens; each is a string or an object with `content`."""
    found: dict[str, str] = {}
    for name in NAMED_SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json; of a named list, `default` counts."""
    file = folder / "chat_template.jinja"
    source = config.get("chat_template")
    if file.exists():
        try:
            source = _read(file).decode()
        except UnicodeDecodeError as exc:
            raise ModelFormatError(f"{file} is not UTF-8: {exc}") from exc
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ModelFormatError(f"chat_template in {folder} is neither a string nor a named list")
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ModelFormatError(
            f"chat_template in {folder} has {len(source)} characters; "
            f"the limit is {MAX_TEMPLATE_CHARS}"
        )
    return source
