"""`xdeepserve generate`: complete one prompt in this process, streaming to stdout."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.config import EngineConfig
from xdeepserve.errors import ConfigError, EngineDeadError
from xdeepserve.flowserve.build import build_engine
from xdeepserve.flowserve.engine_client import InProcClient
from xdeepserve.launch.compose import LoadedModel, add_model_arguments, load
from xdeepserve.launch.flags import config_from_args
from xdeepserve.launch.logs import setup_logging
from xdeepserve.messages import FinishReason, GenerateRequest, SamplingParams, TokenOutput
from xdeepserve.telemetry import RequestTimeline
from xdeepserve.text.chat_template import ChatTemplate
from xdeepserve.text.detokenizer import Detokenizer
from xdeepserve.text.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--prompt", help="the prompt (default: read stdin)")
    parser.add_argument("--raw", action="store_true", help="complete the text; no chat template")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 = greedy (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the completion on stdout and its timing on stderr; 1 when the engine failed."""
    setup_logging()
    params = _params(args)
    prompt = _prompt(args)
    loaded = load(args)
    tokenizer = Tokenizer.from_folder(loaded.tokenizer_dir)
    ids = _encode(tokenizer, prompt, raw=args.raw)
    request = GenerateRequest(request_id="generate", prompt_token_ids=ids, params=params)
    engine = _engine(loaded, args)
    reason = asyncio.run(_stream(engine, tokenizer, request))
    return 1 if reason is FinishReason.ERROR else 0


def _prompt(args: argparse.Namespace) -> str:
    try:
        prompt: str = args.prompt if args.prompt is not None else sys.stdin.read()
        prompt.encode()
    except UnicodeError as exc:
        raise ConfigError(f"the prompt is not valid UTF-8: {exc}") from exc
    return prompt


def _params(args: argparse.Namespace) -> SamplingParams:
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens={args.max_tokens} must be at least 1")
    if not 0 <= args.temperature <= 2:
        raise ConfigError(f"--temperature={args.temperature} must be between 0 and 2")
    seed = secrets.randbits(64) if args.seed is None else args.seed % 2**64
    return SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=seed)


def _encode(tokenizer: Tokenizer, prompt: str, *, raw: bool) -> list[int]:
    if raw or tokenizer.chat_template is None:
        return tokenizer.encode(prompt, add_special_tokens=True)
    messages = [{"role": "user", "content": prompt}]
    with ChatTemplate(tokenizer.chat_template, special_tokens=tokenizer.special_tokens) as template:
        text = template.render(messages, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def _engine(loaded: LoadedModel, args: argparse.Namespace) -> InProcClient:
    config = config_from_args(EngineConfig, args)
    engine = build_engine(model=loaded.model, model_name=loaded.name, config=config)
    engine.start()
    return engine


async def _stream(
    engine: InProcClient, tokenizer: Tokenizer, request: GenerateRequest
) -> FinishReason | None:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
    timeline = RequestTimeline(arrived_s=SYSTEM_CLOCK.monotonic())
    output: TokenOutput | None = None
    try:
        async for output in engine.generate(request=request):
            timeline.on_tokens(now_s=SYSTEM_CLOCK.monotonic(), count=len(output.token_ids))
            _write("".join(map(detokenizer.feed, output.token_ids)))
        _write(detokenizer.finish() + "\n")
    finally:
        await engine.close(drain_timeout_s=0.0)
    if output is None:
        raise EngineDeadError("the engine gave no output")
    _report(output, timeline)
    return output.finish_reason


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _report(output: TokenOutput, timeline: RequestTimeline) -> None:
    usage = output.usage
    counts = f"{usage.num_prompt_tokens} prompt tokens, {usage.num_output_tokens} output tokens"
    times = [
        f"{name} {value * 1e3:.1f} ms"
        for name, value in (("TTFT", timeline.ttft_s), ("TPOT", timeline.tpot_s))
        if value is not None
    ]
    reason = output.error or output.finish_reason
    print(f"[{', '.join([*times, counts])}, {reason}]", file=sys.stderr)
