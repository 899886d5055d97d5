"""Make the golden vectors: logits and greedy tokens of every toy model, by `transformers`.

Run once with the `oracle` extra installed (`pip install -e .[oracle]`):

    python tests/golden/make_golden.py

The toys' weights are made by `xdeepserve.testing.toy_models` and loaded into the Hugging Face model
through a model folder, so the vectors also pin tensor names and config fields. Only logits,
tokens and the config.json that `transformers` writes are stored.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from xdeepserve.testing.toy_models import TOY_MODELS, ToyCheckpoint, toy_checkpoint

DATA = Path(__file__).parent / "data"
NUM_PROMPT_TOKENS = 40
NUM_GREEDY_TOKENS = 64


def load_oracle(checkpoint: ToyCheckpoint) -> Any:
    """The `transformers` model with the toy's weights, float32, all of them used."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(checkpoint.tensors(), f"{folder}/model.safetensors", metadata={"format": "pt"})
        Path(folder, "config.json").write_text(json.dumps(checkpoint.config))
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    problems = {name: keys for name, keys in info.items() if keys}
    if problems:
        raise SystemExit(f"{checkpoint.config['model_type']}: weights do not fit: {problems}")
    return model.eval()


def written_config(oracle: Any, checkpoint: ToyCheckpoint) -> str:
    """The config.json that `transformers` writes; its tensor names must be those of the toy."""
    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "np") as file:
            if set(file.keys()) != checkpoint.names():
                raise SystemExit(f"{checkpoint.config['model_type']}: other tensor names on disk")
        return Path(folder, "config.json").read_text()


@torch.no_grad()
def golden_vectors(oracle: Any, prompt: list[int]) -> dict[str, np.ndarray]:
    """Logits after every prompt token, and the greedy continuation, recomputed at every step."""
    logits = oracle(torch.tensor([prompt]), use_cache=False).logits[0].numpy()
    tokens = list(prompt)
    while len(tokens) < len(prompt) + NUM_GREEDY_TOKENS:
        step = oracle(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(step.argmax()))
    return {
        "prompt": np.array(prompt, np.int32),
        "logits": logits.astype(np.float32),
        "greedy": np.array(tokens[len(prompt) :], np.int32),
    }


def main() -> None:
    torch.manual_seed(0)
    DATA.mkdir(exist_ok=True)
    for idx, name in enumerate(TOY_MODELS):
        checkpoint = toy_checkpoint(name)
        rng = np.random.Generator(np.random.PCG64(idx))
        prompt = rng.integers(0, checkpoint.config["vocab_size"], NUM_PROMPT_TOKENS).tolist()
        oracle = load_oracle(checkpoint)
        np.savez_compressed(DATA / f"{name}.npz", **golden_vectors(oracle, prompt))
        (DATA / f"{name}.config.json").write_text(written_config(oracle, checkpoint))


if __name__ == "__main__":
    main()
