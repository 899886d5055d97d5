"""What `models list` and `models info` show of a model: read from config and table, not weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xdeepserve.errors import ConfigError
from xdeepserve.models.checkpoint import open_checkpoint
from xdeepserve.models.families import parse_spec
from xdeepserve.store.catalog import installed_names, models_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts of one model on disk.

    Attributes:
        name: folder or file name.
        path: where it is.
        family: for example "glm4_moe".
        num_parameters: all weights.
        num_active_parameters: weights one token passes through.
        num_layers: decoder layers.
        num_moe_layers: those of them that route to experts.
        num_experts: routed experts per MoE layer; 0 = dense model.
        top_k: routed experts per token.
        dtype: number format that most weights are stored in.
        size_bytes: of its weight and config files.
        max_position_embeddings: longest context.
    """

    name: str
    path: Path
    family: str
    num_parameters: int
    num_active_parameters: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    dtype: str
    size_bytes: int
    max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class BrokenModel:
    """A model folder that cannot be read, and why."""

    name: str
    path: Path
    problem: str


def model_info(path: Path) -> ModelInfo:
    """Facts of the model at `path`; reads configuration and tensor tables only.

    Raises:
        ConfigError: there is no model, or it is damaged or unsupported (ModelFormatError).
    """
    checkpoint = open_checkpoint(path)
    spec = parse_spec(checkpoint.config)
    gate = None if spec.moe is None else spec.moe.gate
    return ModelInfo(
        name=path.name,
        path=path,
        family=spec.family,
        num_parameters=spec.num_parameters(),
        num_active_parameters=spec.num_active_parameters(),
        num_layers=spec.num_layers,
        num_moe_layers=sum(spec.moe_layers),
        num_experts=0 if gate is None else gate.num_experts,
        top_k=0 if gate is None else gate.top_k,
        dtype=checkpoint.main_dtype(),
        size_bytes=sum(file.stat().st_size for file in checkpoint.files),
        max_position_embeddings=spec.max_position_embeddings,
    )


def list_models() -> list[ModelInfo | BrokenModel]:
    """All models by name that are there, sorted; a damaged one is listed with its problem."""
    found: list[ModelInfo | BrokenModel] = []
    for name in installed_names():
        path = models_folder() / name
        try:
            found.append(model_info(path))
        except ConfigError as exc:
            found.append(BrokenModel(name, path, exc.message))
    return found
