"""RoutedGroup: one DP group as its router knows it."""

from __future__ import annotations

import weakref

from xdeepserve.engine_api import EngineClient
from xdeepserve.flowserve.prefix_memory import PrefixMemory
from xdeepserve.flowserve.replay import Loss
from xdeepserve.flowserve.routed_stream import RoutedStream


class RoutedGroup:
    """A group's client, its streams in their order of arrival, and what they tell of its ends.

    Streams are held weakly, so that one that nobody reads any more is collected and aborts its
    request.

    Attributes:
        is_draining: it gets no new requests.
        num_failures: times a request was lost with it.
        prefixes: what was sent there.
    """

    def __init__(self, name: str, engine: EngineClient) -> None:
        self.name = name
        self.engine = engine
        self.is_draining = False
        self.num_failures = 0
        self.prefixes = PrefixMemory(engine.info.num_kv_blocks)
        # Values are priorities.
        self._streams: weakref.WeakKeyDictionary[RoutedStream, int] = weakref.WeakKeyDictionary()
        self._suspect: weakref.ref[RoutedStream] | None = None
        # Streams that have yet to tell of the group's end.
        self._losses: weakref.WeakKeyDictionary[RoutedStream, Loss] = weakref.WeakKeyDictionary()

    @property
    def is_open(self) -> bool:
        """Whether it may get requests."""
        return self.engine.is_alive() and not self.is_draining

    @property
    def streams(self) -> list[RoutedStream]:
        """Those whose requests are here."""
        return list(self._streams)

    @property
    def num_streams(self) -> int:
        """Requests that run or wait here."""
        return len(self._streams)

    @property
    def has_suspect(self) -> bool:
        """Whether one of the requests here is on trial."""
        suspect = None if self._suspect is None else self._suspect()
        return suspect is not None and suspect in self._streams and suspect.is_suspect

    def enter(self, stream: RoutedStream) -> None:
        """The stream's request is here now; of suspects there is one at a time."""
        self._streams[stream] = stream.priority
        if stream.is_suspect:
            self._suspect = weakref.ref(stream)

    def leave(self, stream: RoutedStream) -> None:
        """It is not here any more, or never was."""
        self._streams.pop(stream, None)

    def note_loss(self, stream: RoutedStream) -> Loss:
        """One of the streams was lost here.

        Streams tell of the group's end one by one; where each stood in line is settled by the
        first one. The group computes for the first `max_num_seqs` requests by (priority, arrival).
        """
        if self.is_draining:
            return Loss.MEANT
        self.num_failures += 1
        self.prefixes.clear()
        if stream not in self._losses:
            line = [item for item in self._streams.items() if item[0] not in self._losses]
            line.sort(key=lambda item: item[1])
            num_running = self.engine.info.max_num_seqs
            self._losses.update((s, Loss.RUNNING) for s, _ in line[:num_running])
            self._losses.update((s, Loss.WAITING) for s, _ in line[num_running:])
        return self._losses.pop(stream)
