"""XCCL: memory-semantic communication between the processes of one host. Usable alone.

Ports (one per rank) own named shared segments; on them lie point-to-point messages, put/get
windows, and exchanges of rows between askers (attention) and servers (experts, FFN). Imports only
`errors`.
"""

from xdeepserve._xccl import RecvHandle, SendHandle
from xdeepserve.xccl.batch import Batch
from xdeepserve.xccl.ep_group import EpGroup
from xdeepserve.xccl.exchange import Exchange, Part, PartState, Reply
from xdeepserve.xccl.layout import Layout, Tag
from xdeepserve.xccl.port import (
    FORWARD,
    PeerState,
    PeerStatus,
    Port,
    TraceKind,
    TraceRecord,
)
from xdeepserve.xccl.segments import SegmentInfo, leftovers, list_segments, unlink_all
from xdeepserve.xccl.trampoline import Trampoline
from xdeepserve.xccl.transfers import Transfer, TransferKind, read_transfers

__all__ = [
    "FORWARD",
    "Batch",
    "EpGroup",
    "Exchange",
    "Layout",
    "Part",
    "PartState",
    "PeerState",
    "PeerStatus",
    "Port",
    "RecvHandle",
    "Reply",
    "SegmentInfo",
    "SendHandle",
    "Tag",
    "TraceKind",
    "TraceRecord",
    "Trampoline",
    "Transfer",
    "TransferKind",
    "leftovers",
    "list_segments",
    "read_transfers",
    "unlink_all",
]
