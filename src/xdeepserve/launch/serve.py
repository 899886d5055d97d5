"""`xdeepserve serve`: gateway, frontend and one colocated DP group in one process."""

from __future__ import annotations

import argparse

from xdeepserve.config import EngineConfig, GatewayConfig
from xdeepserve.launch.compose import add_model_arguments, load, setup_logging
from xdeepserve.launch.flags import add_config_flags, config_from_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_config_flags(parser, GatewayConfig)
    parser.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name clients use for the model; may be given several times (default: MODEL's own)",
    )
    parser.add_argument(
        "--colocated",
        action="store_true",
        default=True,
        help="run attention, FFN and experts in one process (the default, and so far the only way)",
    )
    parser.add_argument("--access-log", action="store_true", help="log every HTTP request")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; the address is bound before the model is loaded."""
    from xdeepserve.flowserve.build import build_engine
    from xdeepserve.maas.app import create_app
    from xdeepserve.maas.server import bind, run_server
    from xdeepserve.text.generation_config import SamplingDefaults
    from xdeepserve.text.tokenizer import Tokenizer

    setup_logging()
    gateway = config_from_args(GatewayConfig, args)
    engine_config = config_from_args(EngineConfig, args)
    with bind(gateway) as listener:
        loaded = load(args)
        names = args.served_model_name or [loaded.name]
        engine = build_engine(model=loaded.model, model_name=names[0], config=engine_config)
        tokenizer = Tokenizer.from_folder(loaded.tokenizer_dir)
        defaults = SamplingDefaults.from_folder(loaded.tokenizer_dir)
        app = create_app(engine, tokenizer, gateway, model_names=names, defaults=defaults)
        engine.start()
        run_server(app, gateway, listener=listener, access_log=args.access_log)
    return 0
