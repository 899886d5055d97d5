"""Text of one choice: EOS, stop strings, logprobs that belong to emitted text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.maas.replay_engine import steps_of
from tests.unit.text.byte_tokenizer import byte_tokenizer
from xdeepserve.maas.choice import ChoiceDelta, ChoiceText, TextOptions, merge_deltas
from xdeepserve.messages import FinishReason, TokenOutput
from xdeepserve.text.stop_strings import StopAutomaton

TOKENIZER = byte_tokenizer()


def _deltas(outputs: Sequence[TokenOutput], options: TextOptions) -> list[ChoiceDelta]:
    choice = ChoiceText(0, TOKENIZER, options)
    deltas: list[ChoiceDelta] = []
    for output in outputs:
        deltas.append(choice.feed(output))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def _stops(*stops: str) -> TextOptions:
    return TextOptions(stops=StopAutomaton(stops))


def test_eos_ends_the_text_and_is_not_part_of_it() -> None:
    whole = merge_deltas(_deltas(steps_of("hi 🎉", logprobs=True), TextOptions()))
    assert (whole.text, whole.finish_reason) == ("hi 🎉", "stop")
    assert [entry.token_id for entry in whole.entries] == list("hi 🎉".encode())


def test_length_flushes_half_a_code_point() -> None:
    outputs = steps_of("aé", finish=FinishReason.LENGTH)
    cut = [*outputs[:-1], steps_of("a", finish=FinishReason.LENGTH)[0]]
    assert cut[-1].token_ids == [ord("a")]
    half = TokenOutput(
        request_id="", token_ids=[0xC3], usage=cut[-1].usage, finish_reason=FinishReason.LENGTH
    )
    assert merge_deltas(_deltas([half], TextOptions())).text == "�"


@settings(deadline=None, derandomize=True)
@given(
    text=st.text(alphabet="abé🎉", max_size=20),
    step=st.integers(1, 7),
    stop=st.text(alphabet="abé🎉", min_size=1, max_size=3),
)
def test_result_does_not_depend_on_tokens_per_step(text: str, step: int, stop: str) -> None:
    deltas = _deltas(steps_of(text, step=step, logprobs=True), _stops(stop))
    whole = merge_deltas(deltas)
    assert whole.text == text.partition(stop)[0]
    assert whole.finish_reason == "stop"
    chosen = b"".join(TOKENIZER.token_bytes(entry.token_id) for entry in whole.entries)
    assert chosen.decode() == whole.text


def test_logprobs_wait_for_their_text() -> None:
    deltas = _deltas(steps_of("ab<x", step=1, logprobs=True), _stops("<|"))
    shown = [(d.text, [e.token_id for e in d.entries]) for d in deltas]
    assert shown == [
        ("a", [ord("a")]),
        ("b", [ord("b")]),
        ("", []),
        ("<x", [ord("<"), ord("x")]),
        ("", []),
    ]


def test_offsets_count_characters() -> None:
    whole = merge_deltas(_deltas(steps_of("é1", step=1, logprobs=True), TextOptions()))
    assert [entry.text_offset for entry in whole.entries] == [0, 0, 1]


def test_stop_string_in_the_middle_of_a_step() -> None:
    whole = merge_deltas(_deltas(steps_of("one two three", step=13, logprobs=True), _stops(" two")))
    assert whole.text == "one"
    assert len(whole.entries) == 3


def test_stop_string_can_be_kept() -> None:
    options = TextOptions(stops=StopAutomaton(["wo"]), include_stop=True)
    assert merge_deltas(_deltas(steps_of("one two three"), options)).text == "one two"


@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, "on"), (3, "on"), (4, "one tw"), (5, "one tw")]
)
def test_stop_strings_wait_for_min_tokens(min_tokens: int, text: str) -> None:
    options = TextOptions(stops=StopAutomaton(["e", "o "]), min_tokens=min_tokens)
    assert merge_deltas(_deltas(steps_of("one two three", step=1), options)).text == text


def test_empty_deltas_are_recognised() -> None:
    deltas = _deltas(steps_of("é", step=1), TextOptions())
    assert [delta.is_empty for delta in deltas] == [True, False, False]
