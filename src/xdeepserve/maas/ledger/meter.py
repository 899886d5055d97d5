"""Token counts of running requests, in a mapped file that outlives the process that counts.

```
slot  0 state  1 which record  2 reason  8 finished_us  16 request id  80 record 0  104 record 1
      u8       u8              u8        i64            64 bytes       3 x u64      3 x u64
```

A slot is claimed before a request is accepted and freed when its charge is in the ledger. Counts
are stored before the tokens they count are sent. After a SIGKILL the file holds what was stored:
a new count goes to the record that is not in use, and one byte switches over, so it is never half
of one. The file has its full size from the start, so a full disk cannot stop the counting.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections import deque
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Final

import msgspec

from xdeepserve.errors import CapacityError, ConfigError
from xdeepserve.maas.ledger.prices import TokenCounts

NUM_SLOTS: Final = 4096
SLOT_BYTES: Final = 128
ID_BYTES: Final = 64

_COUNTS: Final = struct.Struct("<3Q")
_TIME: Final = struct.Struct("<q")
_WHICH, _REASON, _FINISHED, _ID, _RECORD = 1, 2, 8, 16, 80


class _State(IntEnum):
    FREE = 0
    RUNNING = 1
    FINISHED = 2


class Ending(IntEnum):
    """Why a request is over; stored as its number, which must not change."""

    CRASH = 0  # what a slot says that nobody finished
    STOP = 1
    LENGTH = 2
    MIXED = 3  # choices ended for different reasons
    ABORT = 4  # the client left, or the server was told to stop
    ERROR = 5
    REFUSED = 6  # before anything was computed: no charge, and no row


class Metered(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is over.

    Attributes:
        slot: in its file.
        finished_us: microseconds since the epoch; 0 after a crash.
    """

    slot: int
    request_id: str
    counts: TokenCounts
    ending: Ending
    finished_us: int


class Meter:
    """Counts one request. Never blocks, never fails."""

    __slots__ = ("_base", "_map", "_which", "slot")

    def __init__(self, mapped: mmap.mmap, slot: int) -> None:
        self._map = mapped
        self.slot = slot
        self._base = slot * SLOT_BYTES
        self._which = 0

    def record(self, counts: TokenCounts) -> None:
        """These are the counts from now on."""
        self._which ^= 1
        at = self._base + _RECORD + self._which * _COUNTS.size
        _COUNTS.pack_into(self._map, at, counts.prompt, counts.cached, counts.completion)
        self._map[self._base + _WHICH] = self._which

    def finish(self, ending: Ending, now_us: int) -> None:
        """Nothing more will be counted."""
        _TIME.pack_into(self._map, self._base + _FINISHED, now_us)
        self._map[self._base + _REASON] = ending
        self._map[self._base] = _State.FINISHED


class MeterFile:
    """The slots of one gateway; its lock says that the gateway lives.

    Claim on one thread, free on any.

    Args:
        path: made when it is not there.

    Raises:
        ConfigError: it is in use, or cannot be made.
    """

    def __init__(self, path: Path, *, num_slots: int = NUM_SLOTS) -> None:
        self.path = path
        size = max(1, num_slots) * SLOT_BYTES
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = max(size, os.fstat(self._file).st_size // SLOT_BYTES * SLOT_BYTES)
            os.posix_fallocate(self._file, 0, size)
        except OSError as exc:
            raise ConfigError(f"{path}: {exc.strerror}; requests cannot be metered") from exc
        self._map = mmap.mmap(self._file, size)
        self._free = deque(
            slot for slot in range(size // SLOT_BYTES) if self._state(slot) is _State.FREE
        )

    def claim(self, request_id: str) -> Meter:
        """A slot for a request.

        Raises:
            CapacityError: none is free: too many requests run, or wait for the database.
        """
        encoded = request_id.encode()
        assert len(encoded) <= ID_BYTES, "ids are ours"
        try:
            slot = self._free.popleft()
        except IndexError:
            raise CapacityError(
                "too many requests are running, or wait to be billed; try again later"
            ) from None
        base = slot * SLOT_BYTES
        self._map[base : base + SLOT_BYTES] = bytes(SLOT_BYTES)
        self._map[base + _ID : base + _ID + len(encoded)] = encoded
        self._map[base] = _State.RUNNING
        return Meter(self._map, slot)

    def read(self, slot: int) -> Metered:
        """What a slot that is not free says."""
        base = slot * SLOT_BYTES
        at = base + _RECORD + self._map[base + _WHICH] * _COUNTS.size
        return Metered(
            slot=slot,
            request_id=self._map[base + _ID : base + _ID + ID_BYTES].rstrip(b"\0").decode(),
            counts=TokenCounts(*_COUNTS.unpack_from(self._map, at)),
            ending=Ending(self._map[base + _REASON]),
            finished_us=_TIME.unpack_from(self._map, base + _FINISHED)[0],
        )

    def free(self, slot: int) -> None:
        """Its charge is in the ledger."""
        self._map[slot * SLOT_BYTES] = _State.FREE
        self._free.append(slot)

    def left_over(self) -> Iterator[Metered]:
        """All that is not free: of a file whose gateway is dead, every request it still had."""
        for slot in range(len(self._map) // SLOT_BYTES):
            if self._state(slot) is not _State.FREE:
                yield self.read(slot)

    @property
    def num_open(self) -> int:
        """Slots that are not free."""
        return len(self._map) // SLOT_BYTES - len(self._free)

    def flush(self) -> None:
        """Onto the disk, for the case that the machine dies."""
        self._map.flush()

    def close(self) -> None:
        """Let go; a file without open slots is removed."""
        is_empty = not any(True for _ in self.left_over())
        self._map.close()
        if is_empty:
            self.path.unlink(missing_ok=True)
        os.close(self._file)

    def _state(self, slot: int) -> _State:
        return _State(self._map[slot * SLOT_BYTES])


def dead_files(folder: Path) -> Iterator[MeterFile]:
    """The files of gateways that are dead, opened one after the other."""
    for path in sorted(folder.glob("*.meter")):
        try:
            yield MeterFile(path, num_slots=0)
        except ConfigError:
            continue  # it lives
