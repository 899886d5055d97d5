"""What `serve`, `generate` and `bench offline` share: a model by name, loaded into memory."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from xdeepserve import envs, store
from xdeepserve.config import EngineConfig, ModelConfig
from xdeepserve.launch.flags import add_config_flags, config_from_args
from xdeepserve.models.decoder import Model
from xdeepserve.models.loader import load_model
from xdeepserve.ops import WeightDtype, get_ops

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory and where its tokenizer lives."""

    name: str
    model: Model
    tokenizer_dir: Path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and the flags of ModelConfig and EngineConfig."""
    parser.add_argument(
        "model", metavar="MODEL", help="a name (`xds models list`), a folder or a .gguf file"
    )
    add_config_flags(parser, ModelConfig)
    add_config_flags(parser, EngineConfig)


def load(args: argparse.Namespace) -> LoadedModel:
    """Resolve (pulling or building if needed), pack or map, and build the model of `args`.

    Raises:
        ConfigError: unknown or damaged model, wrong flags.
    """
    config = config_from_args(ModelConfig, args)
    progress = store.terminal_progress(sys.stderr)
    path = store.resolve(args.model, progress=progress)
    ops = get_ops(config.backend, num_threads=config.num_threads)
    dtype = WeightDtype(config.weight_dtype)
    logger.info("loading %s in %s", path, dtype)
    model = load_model(path, dtype=dtype, ops=ops, progress=progress)
    return LoadedModel(path.name, model, store.tokenizer_folder(path))


def setup_logging() -> None:
    """Log to stderr at XDEEPSERVE_LOG_LEVEL."""
    logging.basicConfig(
        level=envs.LOG_LEVEL.get().upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # uvicorn announces its own start and stop at INFO; ours says more.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
