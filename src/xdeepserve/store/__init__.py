"""Models by name: pulling, converting, upcycling and listing. Writes XDEEPSERVE_HOME/models.

Imported by `launch`; knows model files, not engines and not HTTP.
"""

from __future__ import annotations

from xdeepserve.store.catalog import CATALOG, installed_names, models_folder, pull, resolve
from xdeepserve.store.convert import convert_gguf, tokenizer_folder
from xdeepserve.store.info import BrokenModel, ModelInfo, list_models, model_info
from xdeepserve.store.progress import terminal_progress
from xdeepserve.store.upcycle import UpcycleOptions, upcycle

__all__ = [
    "CATALOG",
    "BrokenModel",
    "ModelInfo",
    "UpcycleOptions",
    "convert_gguf",
    "installed_names",
    "list_models",
    "model_info",
    "models_folder",
    "pull",
    "resolve",
    "terminal_progress",
    "tokenizer_folder",
    "upcycle",
]
