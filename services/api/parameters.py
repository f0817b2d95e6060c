"""Parameters of the query: what is not known, repeated or unreadable is a 400, never ignored."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote_to_bytes

from falcon.asgi import Request, Response

from orderlib.errors import InvalidQuery


class ParametersMiddleware:
    """Middleware: accept only the parameters in the resource's ``PARAMETERS``, each once."""

    async def process_resource(self, req: Request, _resp: Response, resource: object, _params: dict[str, Any]) -> None:
        """Raise InvalidQuery naming the first parameter at fault."""
        if req.query_string:
            _check(req, getattr(resource, "PARAMETERS", frozenset()))


def _check(req: Request, known: frozenset[str]) -> None:
    try:
        unquote_to_bytes(req.query_string).decode()
    except UnicodeDecodeError as exc:
        raise bad_parameter("query", "UTF-8", "other bytes") from exc
    for name in sorted(req.params.keys() - known):
        expected = f"one of {', '.join(sorted(known))}" if known else "no parameters"
        raise bad_parameter(name, expected, "another parameter")
    for name, value in req.params.items():
        if isinstance(value, list):
            raise bad_parameter(name, "one value", "several")


def bad_parameter(name: str, expected: str, found: str) -> InvalidQuery:
    """Return the error for a parameter."""
    return InvalidQuery(f"{name}: expected {expected}, found {found}")
