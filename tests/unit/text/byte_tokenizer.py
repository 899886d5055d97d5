"""Tiny tokenizers made on the spot: bytes, trained byte-level BPE, SentencePiece-style BPE."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from xdeepserve.text.token_bytes import BYTE_ALPHABET
from xdeepserve.text.tokenizer import Tokenizer

IM_START, IM_END, BOS = 256, 257, 258
VOCAB_SIZE = 259
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Grüße aus 北京! 🎉👩‍👩‍👧 naïve café",
    "the cat sat on the mat; 한국어 текст",
    "ΑΒΓ €uro",
] * 4


def byte_backend() -> Backend:
    """One token per byte, id = byte, then three special tokens."""
    backend = Backend(models.BPE(vocab=dict(BYTE_ALPHABET), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<s>")]
    )
    return backend


def byte_tokenizer(*, chat_template: str | None = CHATML) -> Tokenizer:
    """The tokenizer of most tests of this project's HTTP edge."""
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    return Tokenizer(byte_backend(), special_tokens=names, chat_template=chat_template)


def trained_backend() -> Backend:
    """Byte-level BPE with merges, so that tokens cut code points at many places."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(BYTE_ALPHABET),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_backend() -> Backend:
    """Llama-2's arrangement: metaspace, a few characters, byte fallback for all others."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefé北"]
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>"])
    return backend
