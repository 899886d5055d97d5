"""Chat templates: what they may use, and that hostile ones harm nobody."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from tests.unit.text.byte_tokenizer import CHATML
from xdeepserve.errors import ModelFormatError, RequestError
from xdeepserve.text import template_worker
from xdeepserve.text.chat_template import ChatTemplate

HELLO = [{"role": "user", "content": "hi <b> é 北"}]


def _render(source: str, **variables: object) -> str:
    with ChatTemplate(source, special_tokens={"bos_token": "<s>"}) as template:
        return template.render(HELLO, variables=variables)


@pytest.fixture(scope="module")
def chatml() -> Iterator[ChatTemplate]:
    with ChatTemplate(CHATML) as template:
        yield template


def test_chatml(chatml: ChatTemplate) -> None:
    assert chatml.render(HELLO) == (
        "<|im_start|>user\nhi <b> é 北<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_generation_prompt(chatml: ChatTemplate) -> None:
    text = chatml.render(HELLO, add_generation_prompt=False)
    assert text.endswith("<|im_end|>\n")


def test_blocks_are_trimmed_loops_can_break_and_json_is_not_escaped() -> None:
    source = """{{ bos_token }}
{% for i in range(9) %}
    {% if i == 2 %}{% break %}{% endif %}
{{ i }},
{% endfor %}
{{ messages | tojson }} {{ messages[0] | tojson(indent=2) | length > 9 }} {{ flag }}"""
    assert _render(source, flag="on") == (
        '<s>\n0,\n1,\n[{"role": "user", "content": "hi <b> é 北"}] True on'
    )


def test_generation_tag_and_clock() -> None:
    assert _render("{% generation %}a{% endgeneration %}{{ strftime_now('x%%y') }}") == "ax%y"


def test_variables_cannot_shadow_the_standard_names() -> None:
    text = _render("{{ messages | length }}{{ bos_token }}", messages=[], bos_token="evil")
    assert text == "1<s>"


def test_raise_exception_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        _render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% include '/etc/passwd' %}",
        "{% for x in range(10000000) %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 1 / 0 }}",
        "{{ missing.attribute }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(99999) %}{{ 'aaaaaaaaaa' * 100 }}{% endfor %}",
    ],
)
def test_hostile_templates_end_in_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        _render(source)


@pytest.mark.parametrize(
    "source", ["{{ raise_exception.__globals__ }}", "{{ self._TemplateReference__context }}"]
)
def test_private_attributes_look_undefined(source: str) -> None:
    assert _render(source) == ""


def test_template_that_does_not_compile() -> None:
    with (
        ChatTemplate("{% if %}") as template,
        pytest.raises(ModelFormatError, match="TemplateSyntaxError"),
    ):
        template.check()


def test_the_child_is_replaced_after_it_died(chatml: ChatTemplate) -> None:
    assert chatml._child is None or chatml._child.poll() is None
    chatml.check()
    assert chatml._child is not None
    chatml._child.kill()
    chatml._child.wait()
    assert chatml.render(HELLO).startswith("<|im_start|>user")


def test_endless_template_is_killed_and_the_next_request_is_served() -> None:
    endless = (
        "{% if messages | length > 1 %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}ok"
    )
    with ChatTemplate(endless, timeout_s=0.5) as template:
        with pytest.raises(RequestError, match=r"within 0\.5 s"):
            template.render([*HELLO, *HELLO])
        assert template.render(HELLO) == "ok"


def test_worker_frames_round_trip_and_cut_short_input_ends() -> None:
    stream = io.BytesIO()
    template_worker.write_frame(stream, b"abc")
    whole = stream.getvalue()
    assert template_worker.read_frame(io.BytesIO(whole)) == b"abc"
    assert template_worker.read_frame(io.BytesIO(whole[:-1])) is None
    assert template_worker.read_frame(io.BytesIO(b"")) is None
