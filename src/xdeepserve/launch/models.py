"""`xdeepserve models`: list, inspect, pull and upcycle models on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from xdeepserve import store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    listing = verbs.add_parser("list", help="models on this machine and names that can be pulled")
    listing.set_defaults(handler=_list)
    info = verbs.add_parser("info", help="facts of one model")
    info.add_argument("model", help="a name or a folder")
    info.set_defaults(handler=_info)
    pull = verbs.add_parser("pull", help="fetch a model by name")
    pull.add_argument("model", help="a name from `models list`")
    pull.set_defaults(handler=_pull)
    _add_upcycle(verbs.add_parser("upcycle", help="make an MoE checkpoint out of a dense one"))


def _add_upcycle(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turn a dense llama-family checkpoint into an MoE checkpoint (glm4_moe form) that computes "
        "the same function: half of the FFN neurons become the shared expert, every routed expert "
        "is a copy of the other half, and the router's top-k weights sum to one."
    )
    parser.add_argument("source", metavar="SRC", help="a name or a folder")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    parser.add_argument("--experts", type=int, default=8, help="routed experts (default: 8)")
    parser.add_argument("--top-k", type=int, default=2, help="experts per token (default: 2)")
    parser.add_argument("--shared", type=int, default=1, help="shared experts (default: 1)")
    parser.add_argument("--dense-layers", type=int, default=1, help="first dense layers (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the router (default: 0)")
    parser.set_defaults(handler=_upcycle)


def _list(args: argparse.Namespace) -> int:
    for entry in store.list_models():
        size = f"{entry.num_bytes / 2**20:8.0f} MiB" if entry.is_present else "  not here"
        print(f"{entry.name:24} {size}  {entry.description}")
    return 0


def _info(args: argparse.Namespace) -> int:
    for name, value in store.model_info(store.resolve(args.model)).items():
        print(f"{name + ':':24} {value}")
    return 0


def _pull(args: argparse.Namespace) -> int:
    print(store.resolve(args.model))
    return 0


def _upcycle(args: argparse.Namespace) -> int:
    target = Path(args.target)
    store.upcycle(
        store.resolve(args.source),
        target,
        store.UpcycleSpec(
            num_experts=args.experts,
            top_k=args.top_k,
            num_shared=args.shared,
            num_dense_layers=args.dense_layers,
            seed=args.seed,
        ),
    )
    print(target)
    return 0
