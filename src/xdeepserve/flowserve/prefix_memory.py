"""PrefixMemory: which prompt prefixes a DP group has seen lately, as the router remembers it.

A guess at the group's prefix cache from outside: bounded like it, forgotten in the same order, and
wrong without harm, because it decides only where a request runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from xdeepserve.messages import GenerateRequest
from xdeepserve.rtc.block_hash import BlockHashChain


def prefix_digests(request: GenerateRequest, block_size: int) -> list[bytes]:
    """Chained content keys of the full blocks that a prefix cache could serve; salted."""
    token_ids = [*request.prompt_token_ids, *request.resume_token_ids]
    chain = BlockHashChain(cache_salt=request.cache_salt, block_size=block_size)
    chain.extend(token_ids, (len(token_ids) - 1) // block_size)
    return [key.digest for key in chain.keys]


class PrefixMemory:
    """The last `capacity` block digests sent to one group, least recently used first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._digests)

    def num_known(self, digests: Sequence[bytes]) -> int:
        """How many leading blocks are remembered."""
        for idx, digest in enumerate(digests):
            if digest not in self._digests:
                return idx
        return len(digests)

    def remember(self, digests: Sequence[bytes]) -> None:
        """Note a sequence; its end will be forgotten before its beginning."""
        for digest in reversed(digests):
            self._digests[digest] = None
            self._digests.move_to_end(digest)
        while len(self._digests) > self._capacity:
            self._digests.popitem(last=False)

    def clear(self) -> None:
        """Forget all: the group has lost its cache."""
        self._digests.clear()
