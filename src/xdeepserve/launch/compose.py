"""What `serve`, its workers, `generate` and `bench offline` share: a model, loaded into memory."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from xdeepserve import store
from xdeepserve.config import EngineConfig, ModelConfig
from xdeepserve.launch.flags import add_config_flags, config_from_args
from xdeepserve.launch.plan import ModelShape
from xdeepserve.models.decoder import Model
from xdeepserve.models.files.source_digest import Progress
from xdeepserve.models.loader import load_model
from xdeepserve.ops import WeightDtype, get_ops

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, where it came from and where its tokenizer lives."""

    path: Path
    model: Model
    tokenizer_dir: Path

    @property
    def name(self) -> str:
        """Name of its folder or file."""
        return self.path.name


def add_model_arguments(parser: argparse.ArgumentParser, *, is_optional: bool = False) -> None:
    """MODEL and the flags of ModelConfig and EngineConfig."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if is_optional else None,
        help="a name (`xds models list`), a folder or a .gguf file",
    )
    add_config_flags(parser, ModelConfig)
    add_config_flags(parser, EngineConfig)


def load(args: argparse.Namespace) -> LoadedModel:
    """The model that the flags of `add_model_arguments` name; errors as `load_named`."""
    return load_named(args.model, config_from_args(ModelConfig, args))


def load_named(name: str, config: ModelConfig) -> LoadedModel:
    """Resolve (pulling or building if needed), pack or map, and build a model.

    Raises:
        ConfigError: unknown or damaged model, wrong configuration.
    """
    progress = store.terminal_progress(sys.stderr)
    path = store.resolve(name, progress=progress)
    model = load_model_at(path, config, progress=progress)
    return LoadedModel(path, model, store.tokenizer_folder(path))


def load_model_at(
    path: Path, config: ModelConfig, *, progress: Progress | None = None, verify: bool = True
) -> Model:
    """Pack or map, and build the model at `path`; processes share the mapped weights.

    Args:
        path: folder or file.
        config: precision, operators.
        progress: called while weights are read or packed.
        verify: checksum the packed weights. A worker leaves that to its gateway, which has mapped
            the same pages: it would cost the better part of a restart.

    Raises:
        ConfigError: damaged model, wrong configuration.
    """
    ops = get_ops(config.backend, num_threads=config.num_threads)
    dtype = WeightDtype(config.weight_dtype)
    logger.info("loading %s in %s", path, dtype)
    model = load_model(path, dtype=dtype, ops=ops, progress=progress, verify=verify)
    return model.with_kv_cache(config.kv_cache_dtype)


def shape_of(loaded: LoadedModel) -> ModelShape:
    """What a deployment must know of the model."""
    spec = loaded.model.spec
    has_dense = not all(spec.moe_layers)
    return ModelShape(
        name=loaded.name,
        num_experts=0 if spec.moe is None else spec.moe.gate.num_experts,
        has_ffn=has_dense or (spec.moe is not None and spec.moe.shared_intermediate_size > 0),
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        top_k=0 if spec.moe is None else spec.moe.gate.top_k,
        has_mtp=spec.has_mtp,
    )
