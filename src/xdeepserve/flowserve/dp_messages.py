"""What a gateway and a DP group's process say to each other over the group's control socket.

gateway                                   DP group
  | call Attach --------------------------> |
  | <----------- Attached, then Events ...  |  after each step, and at least every interval
  | notice Submit, notice Abort ----------> |  in order
  | call GetStatus -----------------------> |  <- DPStatus (for whoever watches)
"""

from __future__ import annotations

import msgspec

from xdeepserve.control import RemoteError
from xdeepserve.messages import EngineInfo, GenerateRequest, LoadReport, TokenOutput


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """Open the stream of events; outputs of requests of this connection go there."""


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Accept a request, or say in the next events why not."""

    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End a request of this connection; unknown ids are no error."""

    request_id: str


class GetStatus(msgspec.Struct, frozen=True, tag="get_status"):
    """How are you?"""


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """First message of the stream."""

    info: EngineInfo


class Refused(msgspec.Struct, frozen=True, array_like=True):
    """A submitted request was not accepted; nothing else will be heard of it."""

    request_id: str
    error: RemoteError


class Events(msgspec.Struct, frozen=True, tag="events"):
    """All that happened since the last events of this connection.

    Attributes:
        outputs: in the order they were made.
        refused: requests that were not accepted.
        load: as of now.
        is_alive: whether the step loop runs.
        num_received: Submits of this connection that `load` counts already.
    """

    outputs: list[TokenOutput]
    refused: list[Refused]
    load: LoadReport
    is_alive: bool
    num_received: int


class DPStatus(msgspec.Struct, frozen=True, tag="dp_status"):
    """Answer to GetStatus."""

    info: EngineInfo
    load: LoadReport
    is_alive: bool
    num_connections: int


FromGateway = Attach | Submit | Abort | GetStatus
FromGroup = Attached | Events | DPStatus
