"""Sampling defaults come from the model's folder, checked like request fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from xdeepserve.errors import ModelFormatError
from xdeepserve.text.generation_config import SamplingDefaults


def test_without_a_file_sampling_is_plain(tmp_path: Path) -> None:
    assert SamplingDefaults.from_folder(tmp_path) == SamplingDefaults()


def test_reads_what_it_knows(tmp_path: Path) -> None:
    content = '{"eos_token_id": [1, 2], "do_sample": true, "temperature": 0.6, "top_k": 20}'
    (tmp_path / "generation_config.json").write_text(content)
    assert SamplingDefaults.from_folder(tmp_path) == SamplingDefaults(temperature=0.6, top_k=20)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"temperature": "hot"}', '{"temperature": -1}', '{"top_p": 0}', '{"top_k": 1.5}'],
)
def test_a_damaged_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelFormatError, match=r"generation_config\.json"):
        SamplingDefaults.from_folder(tmp_path)
