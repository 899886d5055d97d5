"""Writes a checkpoint in the compressed-tensors format: `FROM TO w8a8|w4a16`. Needs torch.

w8a8: int8 weights with a scale per output, activations quantized per token when they are used.
w4a16: signed 4-bit weights, a scale for every 32 of a row, eight of them in an int32.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

GROUP_SIZE: Final = 32
LINEAR: Final = ("_proj.weight", "_a_proj_with_mqa.weight")
IGNORED: Final = ["lm_head", "re:.*mlp.gate$", "re:.*kv_b_proj"]
"""vLLM multiplies the last of them into others itself, so it must stay as it is."""

_INT8: Final = {"num_bits": 8, "type": "int", "symmetric": True}
SCHEMES: Final[dict[str, dict[str, Any]]] = {
    "w8a8": {
        "format": "int-quantized",
        "weights": _INT8 | {"strategy": "channel", "dynamic": False},
        "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
    },
    "w4a16": {
        "format": "pack-quantized",
        "weights": _INT8 | {"num_bits": 4, "strategy": "group", "group_size": GROUP_SIZE},
        "input_activations": None,
    },
}


def w8a8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """[N, K] -> int8 values and [N, 1] scales."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
    values = (weight / scale).round().clamp(-127, 127).to(torch.int8)
    return {"weight": values, "weight_scale": scale.to(torch.bfloat16)}


def w4a16(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """[N, K] -> [N, K / 8] int32 of 4-bit values + 8, first lowest, and [N, K / 32] scales."""
    rows, inner = weight.shape
    groups = weight.reshape(rows, inner // GROUP_SIZE, GROUP_SIZE)
    scale = groups.abs().amax(dim=2).clamp(min=1e-8) / 7
    values = (groups / scale[..., None]).round().clamp(-8, 7).reshape(rows, -1, 8) + 8
    packed = (values.to(torch.int64) << (4 * torch.arange(8))).sum(dim=2)
    return {
        "weight_packed": (packed - ((packed >> 31) << 32)).to(torch.int32),
        "weight_scale": scale.to(torch.bfloat16),
        "weight_shape": torch.tensor([rows, inner], dtype=torch.int64),
    }


def main(source: Path, target: Path, scheme: str) -> None:
    """Convert one folder."""
    quantize = {"w8a8": w8a8, "w4a16": w4a16}[scheme]
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if not name.endswith(LINEAR) or "kv_b_proj" in name:
                tensors[name] = tensor.contiguous()
                continue
            stem = name.removesuffix("weight")
            parts = quantize(tensor.float())
            tensors |= {stem + part: value.contiguous() for part, value in parts.items()}
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    group = SCHEMES[scheme]
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": group["format"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": IGNORED,
    }
    (target / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
