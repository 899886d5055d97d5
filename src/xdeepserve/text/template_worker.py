"""Child process that renders one model's chat template; started by `chat_template.py`.

Templates come with model files and are untrusted: the immutable sandbox stops them from reaching
Python, and the process limits stop them from eating time or memory. An alarm whose default action
is to kill the process bounds each command, whatever it is doing; RLIMIT_AS bounds memory. Frames on
stdin and stdout: 4 bytes little-endian length, then JSON.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from datetime import datetime
from typing import IO, Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

LENGTH = struct.Struct("<I")
RENDER_TIMEOUT_S = 5.0
MAX_MEMORY_BYTES = 1 << 30
MAX_OUTPUT_CHARS = 32 << 20


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks assistant text for training; here a no-op."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON without HTML escaping, as Hugging Face's templates expect."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def compile_template(source: str) -> jinja2.Template:
    """Compile in the sandbox with the globals and filters that chat templates use."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, GenerationTag],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Text of the template; piecewise, so that the output limit acts early.

    Raises:
        jinja2.TemplateError: the template refused the messages, or its output is too long.
    """
    pieces: list[str] = []
    size = 0
    for piece in template.generate(variables):
        size += len(piece)
        if size > MAX_OUTPUT_CHARS:
            raise jinja2.TemplateError(f"output exceeds {MAX_OUTPUT_CHARS} characters")
        pieces.append(piece)
    return "".join(pieces)


def read_frame(stream: IO[bytes]) -> bytes | None:
    """Next frame, or None at the end of the stream."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    body = stream.read(size)
    return body if len(body) == size else None


def write_frame(stream: IO[bytes], body: bytes) -> None:
    """Write one frame and flush."""
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def _answer(frame: bytes, template: jinja2.Template | None) -> tuple[jinja2.Template | None, Any]:
    command = json.loads(frame)
    if template is None:
        return compile_template(command["source"]), {"text": ""}
    return template, {"text": render(template, command["variables"])}


def main(timeout_s: float) -> None:
    """Serve frames until stdin closes: first the source, then one set of variables at a time."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    template: jinja2.Template | None = None
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            template, reply = _answer(frame, template)
        except MemoryError:
            reply = {"error": f"needs more than {MAX_MEMORY_BYTES} bytes of memory"}
        except Exception as exc:  # loop top: a template can raise anything
            reply = {"error": f"{type(exc).__name__}: {exc}"[:1000]}
        body = json.dumps(reply).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(sys.stdout.buffer, body)


if __name__ == "__main__":
    main(float(sys.argv[1]))
