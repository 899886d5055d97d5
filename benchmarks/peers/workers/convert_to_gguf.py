"""llama.cpp's converter, for checkpoints whose tokenizer is not the one of their family.

Runs in an environment with torch and transformers; arguments: folder of llama.cpp, then those of
its `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Convert."""
    source = Path(sys.argv[1])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel
    from conversion.glm import Glm4MoeModel

    # Its own looks for GLM's special tokens; our mixture has the tokenizer it was upcycled with.
    Glm4MoeModel.set_vocab = TextModel._set_vocab_gpt2  # noqa: SLF001
    script = source / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
