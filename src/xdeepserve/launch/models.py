"""`xdeepserve models`: list, inspect, pull and upcycle models on this machine."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from xdeepserve import store
from xdeepserve.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    listing = verbs.add_parser("list", help="models on this machine, and names that can be pulled")
    listing.set_defaults(handler=_list)
    info = verbs.add_parser("info", help="facts of one model")
    info.add_argument("model", metavar="MODEL", help="a name, a folder or a .gguf file")
    info.set_defaults(handler=_info)
    pull = verbs.add_parser("pull", help="fetch or build a model by name")
    pull.add_argument("model", metavar="NAME", help="a name from `models list`")
    pull.set_defaults(handler=_pull)
    convert = verbs.add_parser("convert", help="make a Hugging Face folder out of a .gguf file")
    convert.add_argument("source", metavar="SRC", help="a .gguf file of the llama family")
    convert.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    convert.set_defaults(handler=_convert)
    _add_upcycle(verbs.add_parser("upcycle", help="make an MoE checkpoint out of a dense one"))


def _add_upcycle(parser: argparse.ArgumentParser) -> None:
    defaults = store.UpcycleOptions()
    parser.description = (
        "Turn a dense llama-family checkpoint into an MoE checkpoint (glm4_moe form) that computes "
        "the same function: half of the FFN neurons become the shared expert, every routed expert "
        "is a copy of the other half, and the router's top-k weights sum to one."
    )
    parser.add_argument("source", metavar="SRC", help="a name or a folder")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    texts = {
        "experts": "routed experts",
        "top_k": "routed experts per token",
        "shared": "shared experts",
        "dense_layers": "first layers that stay dense",
        "seed": "seed of the random router",
    }
    for name, text in texts.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=int, default=getattr(defaults, name), help=f"{text} (default: %(default)s)"
        )
    parser.set_defaults(handler=_upcycle)


def _list(args: argparse.Namespace) -> int:
    installed = store.list_models()
    for model in installed:
        if isinstance(model, store.BrokenModel):
            print(f"{model.name:24} damaged: {model.problem}")
        else:
            print(f"{model.name:24} {model.size_bytes / 2**20:7.0f} MiB  {_shape(model)}")
    for name, entry in store.CATALOG.items():
        if name not in {model.name for model in installed}:
            print(f"{name:24} {'not here':>11}  {entry.summary}")
    return 0


def _shape(model: store.ModelInfo) -> str:
    experts = f", {model.num_experts} experts top-{model.top_k}" if model.num_experts else ""
    return f"{model.family}, {model.num_parameters / 1e6:.0f} M parameters{experts}"


def _info(args: argparse.Namespace) -> int:
    info = store.model_info(store.resolve(args.model, progress=store.terminal_progress(sys.stderr)))
    for field in fields(info):
        print(f"{field.name + ':':28} {getattr(info, field.name)}")
    return 0


def _pull(args: argparse.Namespace) -> int:
    print(store.pull(args.model, progress=store.terminal_progress(sys.stderr)))
    return 0


def _convert(args: argparse.Namespace) -> int:
    source = store.resolve(args.source)
    if source.suffix != ".gguf":
        raise ConfigError(f"{source} is not a .gguf file; only those are converted")
    target = Path(args.target)
    store.convert_gguf(source, target, progress=store.terminal_progress(sys.stderr))
    print(target)
    return 0


def _upcycle(args: argparse.Namespace) -> int:
    progress = store.terminal_progress(sys.stderr)
    options = store.UpcycleOptions(
        **{field.name: getattr(args, field.name) for field in fields(store.UpcycleOptions)}
    )
    source = store.resolve(args.source, progress=progress)
    target = Path(args.target)
    store.upcycle(source, target, options, progress=progress)
    print(target)
    return 0
