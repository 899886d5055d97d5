"""Stop strings against a naive oracle, cut into pieces at random."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from xdeepserve.text.stop_strings import StopAutomaton, StopMatcher

TEXT = st.text(alphabet="ab", max_size=40)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def _oracle(text: str, stops: list[str], *, include: bool) -> tuple[str, bool]:
    """The occurrence that ends first counts; of several with that end, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end if include else end - max(map(len, found))], True
    return text, False


def _run(pieces: list[str], stops: list[str], *, include: bool = False) -> tuple[list[str], bool]:
    matcher = StopMatcher(StopAutomaton(stops), include_stop=include)
    emitted = [matcher.feed(piece) for piece in pieces]
    emitted.append(matcher.finish())
    return emitted, matcher.is_stopped


@settings(deadline=None, derandomize=True)
@given(pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=20), stops=STOPS)
def test_equals_the_oracle_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    for include in (False, True):
        emitted, is_stopped = _run(pieces, stops, include=include)
        assert ("".join(emitted), is_stopped) == _oracle("".join(pieces), stops, include=include)


@settings(deadline=None, derandomize=True)
@given(text=TEXT, stops=STOPS)
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(StopAutomaton(stops))
    emitted = 0
    for end, char in enumerate(text, start=1):
        emitted += len(matcher.feed(char))
        if matcher.is_stopped:
            return
        tails = (text[start:end] for start in range(end))
        held = max((len(t) for t in tails if any(s.startswith(t) for s in stops)), default=0)
        assert end - emitted == held


def test_a_stop_string_over_several_pieces_is_never_emitted() -> None:
    assert _run(["Hello <", "|en", "d|> rest"], ["<|end|>"]) == (["Hello ", "", "", ""], True)


def test_a_false_start_is_released() -> None:
    assert _run(["a<", "b"], ["<|"]) == (["a", "<b", ""], False)


def test_what_is_held_is_released_at_the_end() -> None:
    assert _run(["a<|"], ["<|end|>"]) == (["a", "<|"], False)


def test_nothing_is_emitted_after_the_stop() -> None:
    matcher = StopMatcher(StopAutomaton(["x"]))
    assert [matcher.feed("axb"), matcher.feed("c"), matcher.finish()] == ["a", "", ""]


def test_overlapping_stops_fall_back_along_suffixes() -> None:
    assert _run(["aabaabaaa"], ["aabaaa"]) == (["aab", ""], True)


def test_code_points_outside_the_bmp() -> None:
    assert _run(["a🎉", "🎊b"], ["🎉🎊"]) == (["a", "", ""], True)
