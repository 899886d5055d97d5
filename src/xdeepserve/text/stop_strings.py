"""Stop strings in streamed text: found across piece borders, never emitted, linear time.

An Aho-Corasick automaton reads each character once. Its state is the longest suffix of the text
that is a prefix of some stop string: exactly the part that must be held back. The result does
not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """Immutable automaton over the stop strings of a request; its choices share it.

    Of all occurrences the one that ends first counts; of several with the same end, the longest.

    Args:
        stops: non-empty strings; their total length bounds time and memory.
    """

    __slots__ = ("depth", "fail", "goto", "match_length")

    def __init__(self, stops: Sequence[str]) -> None:
        self.goto: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.match_length = [0]
        self.fail = [0]
        for stop in stops:
            self._insert(stop)
        self._link()

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self.goto[state]:
                self.goto[state][char] = len(self.goto)
                self.goto.append({})
                self.depth.append(self.depth[state] + 1)
                self.match_length.append(0)
                self.fail.append(0)
            state = self.goto[state][char]
        self.match_length[state] = len(stop)

    def _link(self) -> None:
        """Breadth first: a state fails to the longest proper suffix that is also a prefix."""
        queue = deque(self.goto[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self.goto[state].items():
                self.fail[child] = self.step(self.fail[state], char)
                self.match_length[child] = max(
                    self.match_length[child], self.match_length[self.fail[child]]
                )
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """State after one more character."""
        while state and char not in self.goto[state]:
            state = self.fail[state]
        return self.goto[state].get(char, 0)


class StopMatcher:
    """Scans the text of one sequence; `feed` returns what is safe to emit.

    Attributes:
        is_stopped: a stop string was found; nothing more will be emitted.
    """

    __slots__ = ("_automaton", "_held", "_include", "_state", "is_stopped")

    def __init__(self, automaton: StopAutomaton, *, include_stop: bool = False) -> None:
        self._automaton = automaton
        self._include = include_stop
        self._state = 0
        self._held = ""
        self.is_stopped = False

    def feed(self, piece: str) -> str:
        """Emit all of the text so far except a tail that may still become a stop string."""
        if self.is_stopped:
            return ""
        automaton, state = self._automaton, self._state
        text = self._held + piece
        for end, char in enumerate(piece, start=len(self._held) + 1):
            state = automaton.step(state, char)
            length = automaton.match_length[state]
            if length:
                self.is_stopped = True
                self._held = ""
                return text[:end] if self._include else text[: end - length]
        self._state = state
        cut = len(text) - automaton.depth[state]
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """Release what was held back: the sequence ended without a stop string."""
        held, self._held = self._held, ""
        return held
