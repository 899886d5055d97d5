"""RequestQueue: requests kept in order of service."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from xdeepserve.flowserve.request import Request


def _order(request: Request) -> tuple[int, int]:
    return request.order


class RequestQueue:
    """A list sorted by `Request.order`, which is unique.

    Add and remove are a binary search and one memmove: at the bounded lengths of the engine's
    queues that is faster than a heap, and unlike a heap it can drop from the middle and the tail.
    """

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, idx: int) -> Request:
        return self._requests[idx]

    def add(self, request: Request) -> None:
        """Insert in order."""
        insort(self._requests, request, key=_order)

    def remove(self, request: Request) -> None:
        """Drop a request that is in the queue."""
        idx = bisect_left(self._requests, request.order, key=_order)
        assert self._requests[idx] is request, f"{request.request_id} is not in this queue"
        del self._requests[idx]

    def clear(self) -> None:
        """Drop all."""
        self._requests.clear()
