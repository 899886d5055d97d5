"""The sampling parameters that a model's authors recommend: generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from xdeepserve.errors import ModelFormatError

MAX_FILE_BYTES = 1 << 20


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request gets where it says nothing; without a file, plain sampling.

    Ranges are those of the request fields of the same names. Other fields of the file are ignored.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=10)] | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> SamplingDefaults:
        """Read `folder`/generation_config.json; plain sampling when there is none.

        Raises:
            ModelFormatError: the file is damaged, or a value is of the wrong type or range.
        """
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls()
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ModelFormatError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as exc:
            raise ModelFormatError(f"cannot read {path}: {exc.strerror}") from exc
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise ModelFormatError(f"{path}: {exc}") from exc
