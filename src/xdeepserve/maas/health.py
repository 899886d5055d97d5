"""GET /health (does the engine live) and /ready (may a balancer send requests here)."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from xdeepserve.maas.gateway import gateway_of


async def health(request: Request) -> Response:
    """200 while the engine makes progress, also during a drain; 503 when it is dead."""
    if gateway_of(request).engine.is_alive():
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "engine dead"}, 503)


async def ready(request: Request) -> Response:
    """200 if new requests are welcome; 503 while draining or with a dead engine."""
    gateway = gateway_of(request)
    if gateway.is_draining:
        return JSONResponse({"status": "draining"}, 503)
    if not gateway.engine.is_alive():
        return JSONResponse({"status": "engine dead"}, 503)
    return JSONResponse({"status": "ready"})
