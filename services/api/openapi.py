"""The description of the API, its schemas read off the one contract."""

from __future__ import annotations

from typing import Any

import falcon
import msgspec
from falcon.asgi import Request, Response

import orderlib
from orderlib.arguments import MAX_PAGE_SIZE
from orderlib.contract import ORDER_UID, json_schema
from orderlib.models import Order
from orderlib.repository import PAGE_SIZE
from services.api.problems import PROBLEM_JSON

_JSON = falcon.MEDIA_JSON


def _problem(description: str, **headers: str) -> dict[str, Any]:
    return {
        "description": description,
        "headers": {
            name.replace("_", "-"): {"description": text, "schema": {"type": "string"}}
            for name, text in headers.items()
        },
        "content": {
            PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}},
            "text/html": {"schema": {"type": "string"}},
        },
    }


_PROBLEMS = {
    "401": _problem("No token, or one that is not known.", WWW_Authenticate="Bearer and Basic."),
    "406": _problem("Neither JSON nor a page is acceptable."),
    "421": _problem("Without tokens, a Host that is not localhost."),
    "503": _problem("The database does not answer.", Retry_After="Seconds after which to try again."),
}
_BAD_REQUEST = _problem("A parameter is not what it should be.")
_NOT_FOUND = _problem("There is no such order.")


def _text(description: str, *, most: int) -> dict[str, Any]:
    return {
        "description": description,
        "required": False,
        "schema": {"type": "string", "minLength": 1, "maxLength": most, "pattern": r"^[^\u0000]*$"},
    }


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    (order,), schemas = json_schema(Order)
    headers = {
        "ETag": {"description": "SHA-256 of the canonical JSON.", "schema": {"type": "string"}},
        "Cache-Control": {"schema": {"type": "string"}},
        "Vary": {"schema": {"type": "string"}},
    }
    order_uid = {
        "name": "order_uid",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": 128, **ORDER_UID.json_schema()},
    }
    if_none_match = {
        "name": "If-None-Match",
        "in": "header",
        "description": "Versions that the client has; 304 if the current one is among them.",
        "schema": {"type": "string"},
    }
    one = {
        "200": {
            "description": "The order, as JSON or as a page.",
            "headers": headers,
            "content": {_JSON: {"schema": order}, "text/html": {"schema": {"type": "string"}}},
        },
        "304": {"description": "The client has the current version.", "headers": headers},
        "400": _BAD_REQUEST,
        "404": _NOT_FOUND,
        **_PROBLEMS,
    }
    many = {
        "200": {
            "description": "A page of orders, newest first. One of very large orders ends early.",
            "headers": {name: headers[name] for name in ("Cache-Control", "Vary")},
            "content": {
                _JSON: {"schema": {"$ref": "#/components/schemas/OrderList"}},
                "text/html": {"schema": {"type": "string"}},
            },
        },
        "400": _BAD_REQUEST,
        **_PROBLEMS,
    }
    as_json = {
        "name": "format",
        "in": "query",
        "description": "`json` gives JSON to a browser too.",
        "schema": {"type": "string", "enum": ["json"]},
    }
    query = [
        {
            "name": "limit",
            "description": "How many at most.",
            "schema": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE_SIZE, "default": PAGE_SIZE},
        },
        {
            "name": "cursor",
            "description": "`next_cursor` of the page before.",
            "schema": {"type": "string", "minLength": 1},
        },
        {"name": "customer_id", **_text("Only orders of exactly this customer.", most=255)},
        {"name": "track_number", **_text("Only orders with exactly this track number.", most=255)},
    ]
    health = {
        "200": {"description": "Yes.", "content": {_JSON: {"schema": {"type": "object"}}}},
        "400": _BAD_REQUEST,
    }
    ready = {
        "description": "Yes. The delay of a standby does not change that.",
        "content": {
            _JSON: {
                "schema": {
                    "type": "object",
                    "required": ["status"],
                    "properties": {
                        "status": {"const": "ready"},
                        "replication_delay_s": {
                            "type": "number",
                            "minimum": 0,
                            "description": (
                                "Only if the database is a standby: how many seconds it is behind its primary at "
                                "most. 0: it has replayed everything that it received. Otherwise the age of the last "
                                "replayed transaction, which also grows while the primary writes nothing and the "
                                "standby has lost it or reads an archive."
                            ),
                        },
                    },
                }
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Orders",
            "version": orderlib.__version__,
            "description": (
                "Orders as shops published them. Money is in minor units of the payment's currency. "
                "Integers may be as large as 2^63 - 1: JavaScript's JSON.parse rounds above 2^53."
            ),
        },
        "security": [{"bearer": []}, {"basic": []}],
        "paths": {
            "/orders/{order_uid}": {
                "parameters": [order_uid, if_none_match, as_json],
                "get": {"operationId": "getOrder", "summary": "An order", "responses": one},
                "head": {"operationId": "headOrder", "summary": "An order's headers", "responses": one},
            },
            "/orders": {
                "parameters": [as_json, *({"in": "query", "required": False, **parameter} for parameter in query)],
                "get": {
                    "operationId": "listOrders",
                    "summary": "Orders, newest first",
                    "description": "By the time of their first storing, which updates never move.",
                    "responses": many,
                },
                "head": {"operationId": "headOrders", "summary": "The list's headers", "responses": many},
            },
            "/livez": {"get": {"operationId": "live", "summary": "Does it live?", "security": [], "responses": health}},
            "/readyz": {
                "get": {
                    "operationId": "ready",
                    "summary": "Does the database answer?",
                    "security": [],
                    "responses": {"200": ready, "400": _BAD_REQUEST, "503": _PROBLEMS["503"]},
                }
            },
        },
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic", "description": "The token as the password."},
            },
            "schemas": {
                **schemas,
                "OrderList": {
                    "type": "object",
                    "required": ["orders", "next_cursor"],
                    "properties": {
                        "orders": {"type": "array", "maxItems": MAX_PAGE_SIZE, "items": order},
                        "next_cursor": {
                            "type": ["string", "null"],
                            "description": "Where the next page begins; null on the last.",
                        },
                    },
                },
                "Problem": {
                    "type": "object",
                    "description": "RFC 9457.",
                    "required": ["type", "title", "status", "detail", "request_id"],
                    "properties": {
                        "type": {"type": "string"},
                        "title": {"type": "string"},
                        "status": {"type": "integer"},
                        "detail": {"type": "string"},
                        "request_id": {"type": "string"},
                    },
                },
            },
        },
    }


class OpenApiResource:
    """``/openapi.json``."""

    def __init__(self) -> None:
        self._document = msgspec.json.encode(document())

    async def on_get(self, _req: Request, resp: Response) -> None:
        """The document, the same for everybody."""
        resp.content_type = falcon.MEDIA_JSON
        resp.set_header("Cache-Control", "public, max-age=300")
        resp.data = self._document

    on_head = on_get
