"""RTC, the Relational Tensor Cache: who owns which KV block of one DP group."""

from __future__ import annotations

from xdeepserve.rtc.manager import KVBlocks, KVCacheManager

__all__ = ["KVBlocks", "KVCacheManager"]
