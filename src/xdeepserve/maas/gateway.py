"""What the endpoints share: engine, prompts, limits, metrics, and which generations are running."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
from starlette.requests import Request

from xdeepserve.clock import Clock
from xdeepserve.config import GatewayConfig
from xdeepserve.engine_api import EngineClient
from xdeepserve.errors import EngineDeadError, NotFoundError
from xdeepserve.maas.accounts.caller import Caller
from xdeepserve.maas.choice import TextOptions
from xdeepserve.maas.generation import Generation, GenerationPlan
from xdeepserve.maas.http_errors import DrainingError
from xdeepserve.maas.ledger.billing import Billing, Charge, Purchase
from xdeepserve.maas.metrics import GatewayMetrics
from xdeepserve.maas.prompts import PromptEncoder
from xdeepserve.maas.sampling import stop_list
from xdeepserve.maas.schema import Envelope, GenerationFields
from xdeepserve.text.generation_config import SamplingDefaults
from xdeepserve.text.stop_strings import StopAutomaton


class Gateway:
    """Shared state of all endpoints; lives on the event loop.

    Args:
        model_names: names under which the engine's model is served; the first is canonical.
        billing: None where nobody pays.
    """

    def __init__(
        self,
        *,
        engine: EngineClient,
        prompts: PromptEncoder,
        config: GatewayConfig,
        model_names: Sequence[str],
        clock: Clock,
        defaults: SamplingDefaults,
        billing: Billing | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = prompts.tokenizer
        self.prompts = prompts
        self.config = config
        self.model_names = tuple(model_names)
        self.clock = clock
        self.defaults = defaults
        self._billing = billing
        self.metrics = GatewayMetrics(engine, self.model_names[0])
        self.started_s = int(clock.wall())
        self.system_fingerprint = _fingerprint(engine)
        self.is_draining = False
        self._running: set[Generation] = set()

    def admit(self, model: str, caller: Caller) -> None:
        """Whether a request may start at all.

        Raises:
            NotFoundError: no such model is served, to them.
            DrainingError: the server is shutting down.
            EngineDeadError: the engine is gone.
        """
        self.check_model(model, caller)
        if self.is_draining:
            raise DrainingError("the server is shutting down; try another", code="draining")
        if not self.engine.is_alive():
            raise EngineDeadError("the engine is not running", code="engine_dead")

    def models_for(self, caller: Caller) -> list[str]:
        """The served names that exist for them; the first is canonical."""
        return [name for name in self.model_names if caller.may_use(name)]

    def check_model(self, model: str, caller: Caller) -> None:
        """Refuse a model name that is not served to them.

        Raises:
            NotFoundError: with the names that are.
        """
        names = self.models_for(caller)
        if model not in names:
            served = ", ".join(names) or "none with this key"
            raise NotFoundError(
                f"the model {model[:200]!r} does not exist; served here: {served}",
                code="model_not_found",
                param="model",
            )

    def text_options(self, fields: GenerationFields) -> TextOptions:
        """How this request wants its text.

        Raises:
            RequestError: bad stop strings.
        """
        stops = stop_list(fields.stop, self.config)
        return TextOptions(
            stops=StopAutomaton(stops) if stops else None,
            include_stop=fields.include_stop_str_in_output,
            skip_special_tokens=fields.skip_special_tokens,
            min_tokens=fields.min_tokens or 0,
        )

    def envelope(self, request_id: str, kind: str) -> Envelope:
        """The fields that every object of one reply shares."""
        return Envelope(
            id=request_id,
            object=kind,
            created=int(self.clock.wall()),
            model=self.model_names[0],
            system_fingerprint=self.system_fingerprint,
        )

    @asynccontextmanager
    async def run(self, plan: GenerationPlan, request_id: str) -> AsyncIterator[Generation]:
        """Start a plan; whatever happens inside the block, nothing of it survives the block.

        Raises:
            XDeepServeError: it cannot be paid for.
        """
        charge = await self._open_charge(plan, request_id)
        generation = Generation(
            plan,
            request_id,
            engine=self.engine,
            tokenizer=self.tokenizer,
            metrics=self.metrics,
            clock=self.clock,
            charge=charge,
        )
        self._running.add(generation)
        try:
            generation.start()
            yield generation
        finally:
            self._running.discard(generation)
            await generation.close()

    @property
    def billing(self) -> Billing:
        """Of a service with keys; no route of others asks for it."""
        assert self._billing is not None, "somebody pays"
        return self._billing

    async def _open_charge(self, plan: GenerationPlan, request_id: str) -> Charge | None:
        if self._billing is None:
            return None
        return await self._billing.open(
            Purchase(
                request_id=request_id,
                caller=plan.caller,
                model=self.model_names[0],
                num_prompt_tokens=plan.num_prompt_tokens,
                max_completion_tokens=plan.max_output_tokens,
            )
        )

    @property
    def num_running(self) -> int:
        """Generations whose clients wait for them."""
        return len(self._running)

    def begin_drain(self) -> None:
        """Refuse new requests from now on; running ones go on."""
        self.is_draining = True

    def abort_running(self) -> None:
        """End every running generation with an error that its client sees."""
        for generation in self._running:
            generation.fail(EngineDeadError("the server is shutting down", code="aborted"))


def gateway_of(request: Request) -> Gateway:
    """The gateway of the app that serves this request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def new_request_id(prefix: str) -> str:
    """Unique id with the prefix that OpenAI uses for this kind of object."""
    return f"{prefix}-{uuid.uuid4().hex}"


def _fingerprint(engine: EngineClient) -> str:
    """Changes when what determines the tokens changes: model, precision, sizes."""
    info = msgspec.json.encode(engine.info)
    return "fp_" + hashlib.blake2b(info, digest_size=6).hexdigest()
