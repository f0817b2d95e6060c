"""What is told about each request: its id, one line in the log, the metrics. Never personal data."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from http import HTTPMethod

import falcon
from falcon.asgi import Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from orderlib.program import event

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_METHODS = frozenset(HTTPMethod)

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Metrics:
    """The counts and times of requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "orders_http_requests", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        self._seconds = Histogram(
            "orders_http_request_seconds",
            "Time to answer a request.",
            ["route"],
            registry=registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5),
        )

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class Observation:
    """Middleware around all others: it sees every request, however it ends."""

    def __init__(self, metrics: Metrics, make_id: Callable[[], str]) -> None:
        self._metrics = metrics
        self._make_id = make_id

    async def process_request(self, req: Request, resp: Response) -> None:
        """Begin to watch; take over the client's request id if it is one."""
        req.context.started = time.perf_counter()
        req.context.token_name = None
        req.context.reason = None
        req.context.order_uid = None
        given = req.get_header("X-Request-Id", default="")
        req.context.request_id = given if _REQUEST_ID.fullmatch(given) else self._make_id()
        resp.set_header("X-Request-Id", req.context.request_id)

    async def process_response(self, req: Request, resp: Response, _resource: object, _succeeded: bool) -> None:
        """Log and count."""
        resp.set_headers(SECURITY_HEADERS)
        seconds = time.perf_counter() - req.context.started
        route = req.uri_template or "unmatched"
        method = req.method if req.method in _METHODS else "other"
        self._metrics.count(route, method, resp.status_code, seconds)
        known = {
            name: value
            for name in ("token_name", "order_uid", "reason")
            if (value := getattr(req.context, name)) is not None
        }
        event(
            "request",
            logging.WARNING if "reason" in known else logging.INFO,
            route=route,
            method=method,
            status=resp.status_code,
            ms=round(seconds * 1000, 2),
            request_id=req.context.request_id,
            **known,
        )


class MetricsResource:
    """``/metrics``, on an address of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    async def on_get(self, _req: Request, resp: Response) -> None:
        """Everything counted, in Prometheus' text format."""
        resp.content_type = CONTENT_TYPE_LATEST
        resp.data = generate_latest(self._registry)


def metrics_app(registry: CollectorRegistry) -> falcon.asgi.App[Request, Response]:
    """The application behind ``ORDERS_METRICS_BIND``."""
    app = falcon.asgi.App()
    app.add_route("/metrics", MetricsResource(registry))
    return app
