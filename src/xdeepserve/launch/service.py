"""ServiceConfig: what one run serves. The gateway writes it, supervisor and workers read it."""

from __future__ import annotations

import msgspec

from xdeepserve.errors import ConfigError
from xdeepserve.launch.deployment import Deployment
from xdeepserve.launch.plan import ModelShape
from xdeepserve.launch.run_dir import RunDirectory


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of service.json; fixed for the life of the run.

    Attributes:
        model_path: folder or file of the model, resolved.
        model_name: what `EngineInfo` reports.
        shape: of the model.
        deployment: as asked for at the start; later counts are in the membership.
        bodies: role -> "module:function" that makes the WorkerBody of a WorkerContext.
    """

    model_path: str
    model_name: str
    shape: ModelShape
    deployment: Deployment
    bodies: dict[str, str]

    def save(self, run: RunDirectory) -> None:
        """Write it into the run directory."""
        run.write(run.service_path, self)


def load_service(run: RunDirectory) -> ServiceConfig:
    """Read the run's service.json.

    Raises:
        ConfigError: it is missing or not what the gateway of this version writes.
    """
    try:
        return msgspec.json.decode(run.service_path.read_bytes(), type=ServiceConfig)
    except (OSError, msgspec.DecodeError) as exc:
        raise ConfigError(f"{run.service_path} cannot be read: {exc}") from exc
