"""`xdeepserve serve`: a model behind an OpenAI-compatible API, in one process or taken apart."""

from __future__ import annotations

import argparse
import logging
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xdeepserve import envs, garbage
from xdeepserve.config import GatewayConfig, SloConfig
from xdeepserve.errors import ConfigError
from xdeepserve.launch.compose import LoadedModel, add_model_arguments, load_named
from xdeepserve.launch.deployment import ROLES, Deployment, ExpertRoleSpec, naming_role
from xdeepserve.launch.deployment_file import load_deployment
from xdeepserve.launch.flags import add_config_flags, override
from xdeepserve.launch.logs import setup_logging

if TYPE_CHECKING:
    from xdeepserve.maas.access import Access

logger = logging.getLogger(__name__)

_WORKER_FLAGS: Final = (*ROLES, "pin", "replicas", "rebalance_interval_s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, is_optional=True)
    _add_worker_flags(parser)
    add_config_flags(parser, GatewayConfig)
    parser.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name clients use for the model; may be given several times (default: MODEL's own)",
    )
    parser.add_argument("--access-log", action="store_true", help="log every HTTP request")
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        help=f"log lines as text or as JSON, in all processes (default: {envs.LOG_FORMAT.name})",
    )
    parser.set_defaults(handler=run)


def _add_worker_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Workers in processes of their own")
    group.add_argument(
        "--deployment", type=Path, metavar="FILE", help="deployment file (YAML); flags override it"
    )
    group.add_argument(
        "--colocated",
        action="store_true",
        help="run attention, FFN and experts in one process (the default without worker flags)",
    )
    texts = {"attention": "DP groups", "ffn": "FFN workers", "expert": "expert workers"}
    for role in ROLES:
        group.add_argument(f"--{role}", type=int, metavar="N", help=f"number of {texts[role]}")
    group.add_argument(
        "--pin",
        action=argparse.BooleanOptionalAction,
        help="give each worker cores of its own, if there are enough (the default)",
    )
    add_config_flags(parser, ExpertRoleSpec, only=("replicas", "rebalance_interval_s"))
    add_config_flags(parser, SloConfig)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; the address is bound before the model is loaded."""
    from xdeepserve.launch.access import opened_accounts
    from xdeepserve.maas.server import bind

    if args.log_format is not None:
        envs.LOG_FORMAT.export(args.log_format)
    setup_logging()
    if args.colocated:
        _refuse_worker_flags(args)
    deployment = deployment_from_args(args)
    counts = {role: getattr(args, role) for role in ROLES if getattr(args, role) is not None}
    is_apart = bool(counts) or args.deployment is not None
    with bind(deployment.gateway) as listener, opened_accounts(deployment.gateway) as access:
        loaded = load_named(deployment.model, deployment.precision)
        names = args.served_model_name or [loaded.name]
        if is_apart and not args.colocated:
            from xdeepserve.launch.serve_cluster import serve_cluster

            return serve_cluster(
                deployment,
                loaded,
                names=names,
                listener=listener,
                access=access,
                access_log=args.access_log,
            )
        return _serve_colocated(deployment, loaded, names, listener, access, args.access_log)


def _refuse_worker_flags(args: argparse.Namespace) -> None:
    given = [name for name in _WORKER_FLAGS if getattr(args, name, None) is not None]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"--colocated and {flags} exclude each other; give one of them")


def deployment_from_args(args: argparse.Namespace) -> Deployment:
    """The deployment file, if one is named, with the flags over it.

    Raises:
        ConfigError: a file, flag or count is wrong, or no model is named.
    """
    base = Deployment() if args.deployment is None else load_deployment(args.deployment)
    counts = {role: getattr(args, role) for role in ROLES if getattr(args, role) is not None}
    counted = base.with_counts(counts)
    if base.roles.expert.slices and not counted.roles.expert.slices:
        logger.warning(
            "--expert %d overrides %d slices of the deployment file; experts are split evenly",
            args.expert,
            base.roles.expert.count,
        )
    with naming_role("expert"):
        expert = override(counted.roles.expert, args)
    deployment = replace(
        counted,
        roles=replace(counted.roles, expert=expert),
        slo=override(base.slo, args),
        model=args.model or base.model,
        pin=base.pin if args.pin is None else args.pin,
        precision=override(base.precision, args),
        limits=override(base.limits, args),
        gateway=override(base.gateway, args),
    )
    if not deployment.model:
        raise ConfigError("no model is named; give MODEL, or `model:` in the deployment file")
    return deployment


def _serve_colocated(
    deployment: Deployment,
    loaded: LoadedModel,
    names: list[str],
    listener: socket.socket,
    access: Access,
    access_log: bool,
) -> int:
    from xdeepserve.flowserve.build import build_engine
    from xdeepserve.launch.cluster_metrics import StageCollector
    from xdeepserve.maas.app import create_app
    from xdeepserve.maas.server import run_server
    from xdeepserve.text.generation_config import SamplingDefaults
    from xdeepserve.text.tokenizer import Tokenizer
    from xdeepserve.transformerless.stage_times import StageTimes

    times = StageTimes()
    engine = build_engine(
        model=loaded.model, model_name=names[0], config=deployment.limits, stage_times=times
    )
    tokenizer = Tokenizer.from_folder(loaded.tokenizer_dir)
    app = create_app(
        engine,
        tokenizer,
        deployment.gateway,
        model_names=names,
        defaults=SamplingDefaults.from_folder(loaded.tokenizer_dir),
        collectors=[StageCollector(times)],
        access=access,
    )
    app.state.gateway.metrics.count_objectives(deployment.slo)
    engine.start()
    garbage.settle()
    run_server(app, deployment.gateway, listener=listener, access_log=access_log)
    return 0
