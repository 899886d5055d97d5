"""What each kind of tokenizer decoder turns one token into, as bytes.

Byte-level BPE (GPT-2's alphabet) and SentencePiece-style BPE with byte fallback are context-free:
the bytes of a text are the bytes of its tokens, one after the other. That is what makes incremental
detokenization exact and cheap, and it gives the `bytes` field of logprobs. Other decoders
(WordPiece, CTC) are refused when the model is opened.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from xdeepserve.errors import ModelFormatError

TokenToBytes = Callable[[str], bytes]

METASPACE = "▁"


class DecoderSpec(msgspec.Struct, frozen=True):
    """The `decoder` object of tokenizer.json, as far as we need it."""

    type: str
    decoders: list[DecoderSpec] = []
    replacement: str = METASPACE
    pattern: dict[str, str] = {}
    content: str = ""

    def replacements(self) -> list[tuple[str, str]]:
        """Literal (old, new) pairs that this step applies to a token."""
        if self.type == "Metaspace":
            return [(self.replacement, " ")]
        if self.type == "Replace" and self.pattern.get("String"):
            return [(self.pattern["String"], self.content)]
        return []


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: itself where printable, else 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if chr(byte) not in alphabet]
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
    return alphabet


BYTE_ALPHABET = _byte_alphabet()


def byte_level(token: str) -> bytes:
    """Bytes of a byte-level BPE token; one with a foreign character is literal text."""
    try:
        return bytes([BYTE_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()


def _parse_byte_token(token: str) -> bytes | None:
    """`<0x0A>` -> the byte 10; None for anything else."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None


def _sentencepiece(pairs: list[tuple[str, str]], *, byte_fallback: bool) -> TokenToBytes:
    def convert(token: str) -> bytes:
        if byte_fallback and (byte := _parse_byte_token(token)) is not None:
            return byte
        for old, new in pairs:
            token = token.replace(old, new)
        return token.encode()

    return convert


def converter_of(decoder: DecoderSpec | None) -> TokenToBytes:
    """The function that turns a token string into its bytes.

    A leading space that SentencePiece decoders strip from the start of a text is kept: generated
    text continues a prompt, so its first space is real.

    Raises:
        ModelFormatError: the decoder is not context-free (WordPiece, CTC, ...) or unknown.
    """
    steps = [] if decoder is None else [decoder, *decoder.decoders]
    names = {step.type for step in steps} - {"Sequence", "Fuse", "Strip"}
    pairs = [pair for step in steps for pair in step.replacements()]
    if names == {"ByteLevel"}:
        return byte_level
    if names and pairs and names <= {"ByteFallback", "Metaspace", "Replace"}:
        return _sentencepiece(pairs, byte_fallback="ByteFallback" in names)
    found = ", ".join(sorted(names)) or "none"
    raise ModelFormatError(
        f"tokenizer decoder ({found}) is not supported; "
        "byte-level BPE and SentencePiece-style BPE with byte fallback are"
    )
