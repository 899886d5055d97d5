"""A GGUF file as a Hugging Face folder, and the tokenizer folder of any model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from xdeepserve import envs
from xdeepserve.models.checkpoint import GGUFCheckpoint, open_checkpoint
from xdeepserve.models.files.checkpoint_writer import make_home_folder, new_folder, write_hf_folder
from xdeepserve.models.files.file_lock import file_lock
from xdeepserve.models.files.gguf_file import GGUFFile
from xdeepserve.models.files.safetensors_file import TensorPlan
from xdeepserve.models.files.source_digest import Progress, source_digest
from xdeepserve.store.gguf_tokenizer import tokenizer_files

LOCK_TIMEOUT_S: Final = 600.0

TORCH_NAMES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def convert_gguf(
    src: Path,
    dst: Path,
    *,
    dtype: str = "BF16",
    progress: Progress | None = None,
    sampling: Mapping[str, float] | None = None,
) -> None:
    """Write the GGUF file `src` as the Hugging Face folder `dst`.

    Args:
        dtype: "F32", "F16" or "BF16" on disk. BF16 by default: its rounding (2^-9) is far below
            the error of 4-bit blocks (about 2^-5), serving in bf16 then loses nothing more, and
            the folder is half as big as float32.
        sampling: recommended sampling parameters, for generation_config.json.

    Raises:
        ModelFormatError: `src` is damaged or unsupported.
        ConfigError: `dst` exists or cannot be written.
    """
    checkpoint = GGUFCheckpoint(src)
    plans = [
        TensorPlan(name, checkpoint.shape(name), _loader(checkpoint, name), dtype)
        for name in sorted(checkpoint.names())
    ]
    config = {**checkpoint.config, "torch_dtype": TORCH_NAMES[dtype]}

    def on_progress(done: int, total: int) -> None:
        if progress is not None:
            progress("write", done, total)

    write_hf_folder(
        dst,
        config=config,
        tensors=plans,
        files=_companion_files(GGUFFile(src), config, sampling or {}),
        on_progress=on_progress,
    )


def tokenizer_folder(path: Path) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json for the model at `path`.

    A Hugging Face folder is its own; for a GGUF file the two are written once into
    XDEEPSERVE_HOME/tokenizers.

    Raises:
        ModelFormatError: the GGUF file is damaged or its tokenizer is not supported.
    """
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint, GGUFCheckpoint):
        return path
    parent = make_home_folder(envs.HOME.get() / "tokenizers")
    folder = parent / source_digest(checkpoint.files, memo_dir=parent)[:32]
    with file_lock(parent / "lock", timeout_s=LOCK_TIMEOUT_S):
        if not folder.is_dir():
            with new_folder(folder) as temporary:
                files = _companion_files(GGUFFile(checkpoint.files[0]), checkpoint.config, {})
                for name, content in files.items():
                    (temporary / name).write_bytes(content)
    return folder


def _loader(checkpoint: GGUFCheckpoint, name: str) -> Any:
    return lambda: checkpoint.tensor(name)


def _companion_files(
    file: GGUFFile, config: dict[str, Any], sampling: Mapping[str, float]
) -> dict[str, bytes]:
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    generation = {**ends, **sampling}
    return {
        **tokenizer_files(file),
        "generation_config.json": json.dumps(generation).encode(),
    }
