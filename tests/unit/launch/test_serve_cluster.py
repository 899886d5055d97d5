"""serve with workers: what no worker could work with is found before anything is started."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tests.multiproc.cluster_harness import run_folder
from tests.toys import toy_model
from xdeepserve.config import EngineConfig
from xdeepserve.errors import ConfigError
from xdeepserve.launch.compose import LoadedModel
from xdeepserve.launch.deployment import Deployment
from xdeepserve.launch.serve_cluster import serve_cluster
from xdeepserve.maas.access import OPEN


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (EngineConfig(kv_cache_bytes=1), "kv_cache_bytes=1 holds no KV block"),
        (EngineConfig(num_kv_blocks=1 << 40), "exceed this machine's memory"),
        (EngineConfig(max_model_len=1 << 30), "positions; lower it"),
    ],
)
def test_a_kv_cache_that_cannot_be(limits: EngineConfig, message: str) -> None:
    loaded = LoadedModel(Path("none"), toy_model("qwen3_moe"), Path("none"))
    deployment = replace(Deployment(model="none"), limits=limits)
    with run_folder() as folder, socket.socket() as listener:
        with pytest.raises(ConfigError, match=message):
            serve_cluster(
                deployment, loaded, names=["none"], listener=listener, access=OPEN, access_log=False
            )
        assert list(folder.iterdir()) == []
