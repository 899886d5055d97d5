"""MoeTransport: how hidden states reach the experts and come back.

    [router] -> dispatch -> (permute -> expert MLP, wherever it runs) -> combine -> [residual add]

Dispatch and combine are one object, because their layouts must agree. `XcclTransport` reaches
workers in other processes; a colocated step needs none, because all its layers are one operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from xdeepserve.errors import IntegrityError
from xdeepserve.ops import F32, I32

H = TypeVar("H", bound="OpenHandle")


@dataclass(frozen=True, slots=True)
class StepTag:
    """Identifies one exchange of a DP group. A transport adds the epoch of its routing."""

    step_idx: int
    layer_idx: int
    microbatch_idx: int


class DispatchHandle(Protocol):
    """One exchange under way; goes to exactly one `combine` or `release`."""

    @property
    def tag(self) -> StepTag:
        """The tag given to dispatch."""
        ...


class OpenHandle(DispatchHandle, Protocol):
    """A handle that knows whether it was used."""

    is_open: bool


def use_up(handle: DispatchHandle, kind: type[H]) -> H:
    """The handle as the transport's own kind, closed by this call.

    Raises:
        IntegrityError: it was used before, or is another transport's.
    """
    if not isinstance(handle, kind):
        raise IntegrityError(f"exchange {handle.tag} belongs to another transport")
    if not handle.is_open:
        raise IntegrityError(f"exchange {handle.tag} was already combined or released")
    handle.is_open = False
    return handle


class MoeTransport(Protocol):
    """Dispatch tokens to the modules of a layer and combine the answers. Thread: the step loop."""

    def dispatch(
        self, *, tag: StepTag, hidden_states: F32, topk_ids: I32 | None, topk_weights: F32 | None
    ) -> DispatchHandle:
        """Send each row to the layer's FFN (dense or shared experts) and to its top-k experts.

        Args:
            tag: names the layer and the exchange.
            hidden_states: [T, H] normed activations; must stay unchanged until combine.
            topk_ids: [T, K] logical expert ids, -1 = skip; None on a dense layer.
            topk_weights: [T, K]; None on a dense layer.

        Returns:
            The handle; the answers are on their way.
        """
        ...

    def combine(self, handle: DispatchHandle) -> F32:
        """[T, H]: the layer's FFN output: shared plus routed, routed summed in top-k slot order."""
        ...

    def release(self, handle: DispatchHandle) -> None:
        """Forget an exchange whose answer is no longer wanted."""
        ...

    def close(self) -> None:
        """Free buffers and peers. Idempotent."""
        ...
