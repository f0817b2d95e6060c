"""The OpenAPI document. Its schemas and limits come from the contract of an order and from the repository."""

from __future__ import annotations

from typing import Any

import attrs
import falcon
import msgspec
from falcon.asgi import Request, Response

import orderlib
from orderlib.contract import model_schemas
from orderlib.errors import REJECT_CODES
from orderlib.models import Delivery, Order, Payment
from orderlib.repository import MAX_OFFSET, MAX_PAGE_SIZE, MAX_PARTITION, PAGE_SIZE, OrderSummary, Outcome, RecordState
from orderlib.search import SearchField
from services.api.error_handlers import PROBLEM_JSON
from services.api.orders import META
from services.api.parameters import MAX_SEARCH_CHARS, ORDER_FILTERS, PERIOD
from services.api.records import MAX_WAIT_S, TOPIC_PATTERN

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
    "401": _problem("The token is missing or unknown.", WWW_Authenticate="Bearer and Basic."),
    "406": _problem("The client accepts neither application/json nor text/html."),
    "421": _problem("Authentication is off, and the Host header does not name localhost."),
    "503": _problem(
        "The database does not answer, or the service is not configured correctly.",
        Retry_After="Seconds to wait before the next try.",
    ),
}
_FAULTS = {
    "type": "array",
    "description": "The first faults of a rejected record, without its values.",
    "items": {
        "type": "object",
        "required": ["path", "expected", "found"],
        "properties": {
            "path": {"type": "string", "description": "JSON path; `$` is the record itself."},
            "expected": {"type": "string", "description": "The rule."},
            "found": {"type": "string", "description": "The kind of value that was found."},
        },
    },
}
_BAD_REQUEST = _problem("A parameter is unknown, repeated or invalid.")
_NOT_FOUND = _problem("No order has this order_uid, or with `format=original`: it has no original.")


def document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    (order,), schemas = model_schemas(Order)
    fields = schemas[Order.__name__]["properties"]
    delivery_fields = schemas[Delivery.__name__]["properties"]
    payment_fields = schemas[Payment.__name__]["properties"]
    headers = {
        "ETag": {"description": "Identifies the content.", "schema": {"type": "string"}},
        "Cache-Control": {"schema": {"type": "string"}},
        "Vary": {"schema": {"type": "string"}},
    }
    order_uid = {
        "name": "order_uid",
        "in": "path",
        "required": True,
        "schema": fields["order_uid"],
    }
    if_none_match = {
        "name": "If-None-Match",
        "in": "header",
        "description": "ETags of the versions that the client has. The response is 304 if one of them is current.",
        "schema": {"type": "string"},
    }
    one = {
        "200": {
            "description": "The order, as JSON or as an HTML page.",
            "headers": headers,
            "content": {
                _JSON: {"schema": {"$ref": "#/components/schemas/OrderWithMeta"}},
                "text/html": {"schema": {"type": "string"}},
            },
        },
        "304": {"description": "The client has the current version.", "headers": headers},
        "400": _BAD_REQUEST,
        "404": _NOT_FOUND,
        **_PROBLEMS,
    }
    many = {
        "200": {
            "description": "One page of the list, newest order first. It is shorter if the orders are very large.",
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
        "description": "`json` returns JSON to a browser, too.",
        "schema": {"type": "string", "enum": ["json"]},
    }
    order_format = {
        **as_json,
        "description": "`json` returns JSON to a browser, too. `original` returns the order byte for byte as it was "
        "sent, with the SHA-256 of these bytes as ETag. Only an order with fields that this service does not know has "
        "an original; for others the response is 404.",
        "schema": {"type": "string", "enum": ["json", "original"]},
    }
    meta = {
        "name": "meta",
        "in": "query",
        "description": "Add the member `meta` to each order: times, version, position in Kafka, and whether it has an "
        "original. Of one order, the ETag is then the SHA-256 of the response. Not with `format=original`; ignored for "
        "pages.",
        "schema": {"type": "string", "enum": ["1"]},
    }
    view = {
        "name": "view",
        "in": "query",
        "description": "`json` shows the indented JSON as an HTML page. Ignored for JSON responses.",
        "schema": {"type": "string", "enum": ["json"]},
    }
    limit = {
        "name": "limit",
        "description": "How many orders to return at most.",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE_SIZE, "default": PAGE_SIZE},
    }
    query = [
        limit,
        {
            "name": "cursor",
            "description": ("`next_cursor` of the previous page. Its text is opaque."),
            "schema": {"type": "string", "minLength": 1},
        },
        *(
            {"name": name, "description": f"Return only orders with exactly this `{name}`.", "schema": fields[name]}
            for name in ORDER_FILTERS
        ),
        {
            "name": "phone",
            "description": "Return only orders whose phone number has exactly these digits. Other characters are "
            "ignored.",
            "schema": {**delivery_fields["phone"], "pattern": "[0-9]"},
        },
        {
            "name": "email",
            "description": "Return only orders with this e-mail address, in any case of the letters A to Z.",
            "schema": delivery_fields["email"],
        },
        *(
            {
                "name": name,
                "description": f"Return only orders that were first stored {meaning}. Updates do not count.",
                "schema": {"type": "string", "format": "date-time"},
            }
            for name, meaning in zip(PERIOD, ("at this time or later", "before this time"), strict=True)
        ),
    ]
    search = {
        "200": {
            "description": "What was found, as JSON or as an HTML page.",
            "headers": {name: headers[name] for name in ("Cache-Control", "Vary")},
            "content": {
                _JSON: {"schema": {"$ref": "#/components/schemas/Matches"}},
                "text/html": {"schema": {"type": "string"}},
            },
        },
        "303": {
            "description": "Only for a page: one order matches, and `Location` has its URL.",
            "headers": {"Location": {"schema": {"type": "string"}}},
        },
        "400": _BAD_REQUEST,
        **_PROBLEMS,
    }
    rejects = {
        "200": {
            "description": "One page of the list, newest reject first.",
            "headers": {name: headers[name] for name in ("Cache-Control", "Vary")},
            "content": {
                _JSON: {"schema": {"$ref": "#/components/schemas/RejectList"}},
                "text/html": {"schema": {"type": "string"}},
            },
        },
        "400": _BAD_REQUEST,
        **_PROBLEMS,
    }
    reject_query: list[dict[str, Any]] = [
        limit,
        {
            "name": "cursor",
            "description": "`next_cursor` of the previous page. Its text is opaque.",
            "schema": {"type": "string", "minLength": 1},
        },
        {
            "name": "code",
            "description": "Return only rejects with this code.",
            "schema": {"type": "string", "enum": list(REJECT_CODES)},
        },
        *(
            {
                "name": name,
                "description": f"Return only records that were rejected {meaning}.",
                "schema": {"type": "string", "format": "date-time"},
            }
            for name, meaning in zip(PERIOD, ("at this time or later", "before this time"), strict=True)
        ),
    ]
    position: list[dict[str, Any]] = [
        {"name": "topic", "schema": {"type": "string", "pattern": TOPIC_PATTERN}},
        {"name": "partition", "schema": {"type": "integer", "minimum": 0, "maximum": MAX_PARTITION}},
        {"name": "offset", "schema": {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET}},
    ]
    record = {
        "200": {
            "description": "The state of the record at the time of the response.",
            "headers": {"Cache-Control": headers["Cache-Control"]},
            "content": {_JSON: {"schema": {"$ref": "#/components/schemas/RecordState"}}},
        },
        "400": _BAD_REQUEST,
        **{status: answer for status, answer in _PROBLEMS.items() if status != "406"},
    }
    health = {
        "200": {"description": "Healthy.", "content": {_JSON: {"schema": {"type": "object"}}}},
        "400": _BAD_REQUEST,
    }
    ready = {
        "description": "Ready. A standby is ready with any replication delay.",
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
                                "replayed transaction, which without streaming replication also grows while the "
                                "primary is idle."
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
                "The orders that shops published. Amounts are in minor units of the payment's currency. "
                "Integers go up to 2^63 - 1; JSON.parse of JavaScript rounds them above 2^53."
            ),
        },
        "security": [{"bearer": []}, {"basic": []}],
        "paths": {
            "/orders/{order_uid}": {
                "parameters": [order_uid, if_none_match, order_format, meta, view],
                "get": {"operationId": "getOrder", "summary": "Return an order", "responses": one},
                "head": {"operationId": "headOrder", "summary": "Return the headers of an order", "responses": one},
            },
            "/orders": {
                "parameters": [
                    as_json,
                    meta,
                    *({"in": "query", "required": False, **parameter} for parameter in query),
                ],
                "get": {
                    "operationId": "listOrders",
                    "summary": "List orders, newest first",
                    "description": "Sorted by the time an order was first stored. An update never moves an order.",
                    "responses": many,
                },
                "head": {"operationId": "headOrders", "summary": "Return the headers of the list", "responses": many},
            },
            "/search": {
                "parameters": [
                    {
                        "name": "q",
                        "in": "query",
                        "required": True,
                        "description": (
                            "A complete order_uid in any case, the URL of an order, a track number, a customer_id, a "
                            "phone number in any format, an e-mail address in any case, or the rid of an item. If "
                            "none of these matches, a prefix of an order_uid."
                        ),
                        "schema": {"type": "string", "maxLength": MAX_SEARCH_CHARS, "pattern": r"\S"},
                    },
                    {"in": "query", "required": False, **limit},
                    as_json,
                ],
                "get": {
                    "operationId": "search",
                    "summary": "Search orders by an identifier",
                    "description": (
                        "The newest orders that match, with the reasons. Orders whose order_uid begins with the text "
                        "are sorted by it."
                    ),
                    "responses": search,
                },
                "head": {"operationId": "headSearch", "summary": "Return the headers of a search", "responses": search},
            },
            "/rejects": {
                "parameters": [
                    as_json,
                    *({"in": "query", "required": False, **parameter} for parameter in reject_query),
                ],
                "get": {
                    "operationId": "listRejects",
                    "summary": "List rejected records, newest first",
                    "description": "Positions, times, codes and faults. Never a key, a value or a header.",
                    "responses": rejects,
                },
                "head": {
                    "operationId": "headRejects",
                    "summary": "Return the headers of the list of rejects",
                    "responses": rejects,
                },
            },
            "/records/{topic}/{partition}/{offset}": {
                "parameters": [
                    *({"in": "path", "required": True, **parameter} for parameter in position),
                    {
                        "name": "wait",
                        "in": "query",
                        "description": (
                            "How many seconds to wait until the record is handled or rejected. The response is "
                            "sent as soon as this happens."
                        ),
                        "schema": {"type": "number", "minimum": 0, "maximum": MAX_WAIT_S, "default": 0},
                    },
                ],
                "get": {
                    "operationId": "getRecord",
                    "summary": "Tell what happened to a Kafka record",
                    "description": (
                        "After `handled`, an order that was sent in this record can be read, unless a later record "
                        "has replaced it."
                    ),
                    "responses": record,
                },
                "head": {
                    "operationId": "headRecord",
                    "summary": "Return the headers of the state of a record",
                    "responses": record,
                },
            },
            "/livez": {
                "get": {"operationId": "live", "summary": "Is the process alive?", "security": [], "responses": health}
            },
            "/readyz": {
                "get": {
                    "operationId": "ready",
                    "summary": "Can the service read the database?",
                    "security": [],
                    "responses": {"200": ready, "400": _BAD_REQUEST, "503": _PROBLEMS["503"]},
                }
            },
        },
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {
                    "type": "http",
                    "scheme": "basic",
                    "description": "The token is the password, with any user name.",
                },
            },
            "schemas": {
                **schemas,
                "OrderList": {
                    "type": "object",
                    "required": ["orders", "next_cursor"],
                    "properties": {
                        "orders": {
                            "type": "array",
                            "maxItems": MAX_PAGE_SIZE,
                            "items": {"$ref": "#/components/schemas/OrderWithMeta"},
                        },
                        "next_cursor": {
                            "type": ["string", "null"],
                            "description": "Continues the list in the same direction; null on the last page.",
                        },
                    },
                },
                "OrderWithMeta": {
                    "allOf": [order, {"properties": {"meta": {"$ref": "#/components/schemas/Meta"}}}],
                },
                "Meta": {
                    "description": "Only with `meta=1`: what the database knows about an order.",
                    "type": "object",
                    "required": [*META, "position"],
                    "properties": {
                        "first_stored_at": {
                            "type": "string",
                            "format": "date-time",
                            "description": "When an order with this order_uid was first stored.",
                        },
                        "stored_at": {
                            "type": "string",
                            "format": "date-time",
                            "description": "When the current version was stored.",
                        },
                        "version": {
                            "type": "integer",
                            "minimum": 1,
                            "description": "Counts the versions of this order_uid.",
                        },
                        "has_original": {
                            "type": "boolean",
                            "description": "Whether it was sent with fields that this service does not know. "
                            "`format=original` returns them.",
                        },
                        "position": {
                            "description": "The record that last confirmed the content; null for an order that was not "
                            "read from Kafka.",
                            "type": ["object", "null"],
                            "required": ["topic_id", "partition", "offset"],
                            "properties": {
                                "topic_id": {"type": "string"},
                                "partition": {"type": "integer", "minimum": 0, "maximum": MAX_PARTITION},
                                "offset": {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET},
                            },
                        },
                    },
                },
                "Matches": {
                    "type": "object",
                    "required": ["matches"],
                    "properties": {
                        "matches": {
                            "type": "array",
                            "maxItems": MAX_PAGE_SIZE,
                            "items": {
                                "type": "object",
                                "required": [field.name for field in attrs.fields(OrderSummary)] + ["fields"],
                                "properties": {
                                    **{name: fields[name] for name in ("order_uid", "customer_id", "track_number")},
                                    "items": {"type": "integer", "minimum": 1, "description": "How many it has."},
                                    **{name: payment_fields[name] for name in ("amount", "currency")},
                                    "first_stored_at": {"type": "string", "format": "date-time"},
                                    "fields": {
                                        "type": "array",
                                        "minItems": 1,
                                        "description": "Why the order matches.",
                                        "items": {"enum": list(SearchField)},
                                    },
                                },
                            },
                        },
                    },
                },
                "RejectList": {
                    "type": "object",
                    "required": ["rejects", "next_cursor"],
                    "properties": {
                        "rejects": {
                            "type": "array",
                            "maxItems": MAX_PAGE_SIZE,
                            "items": {"$ref": "#/components/schemas/Reject"},
                        },
                        "next_cursor": {
                            "type": ["string", "null"],
                            "description": "Continues the list; null on the last page.",
                        },
                    },
                },
                "Reject": {
                    "type": "object",
                    "properties": {
                        **{parameter["name"]: parameter["schema"] for parameter in position},
                        "topic_id": {"type": "string"},
                        "record_time": {"type": "string", "format": "date-time"},
                        "code": {"enum": list(REJECT_CODES)},
                        "faults": _FAULTS,
                        "total_faults": {"type": "integer", "minimum": 0},
                        "rejected_at": {"type": "string", "format": "date-time"},
                        "redriven_at": {
                            "type": ["string", "null"],
                            "format": "date-time",
                            "description": "Null until the first redrive.",
                        },
                        "redrive_outcome": {"enum": [*Outcome, None]},
                    },
                },
                "RecordState": {
                    "type": "object",
                    "required": ["state", "code", "faults", "total_faults"],
                    "properties": {
                        "state": {
                            "enum": list(RecordState),
                            "description": (
                                "`waiting`: the consumer has not handled it yet. `handled`: it was stored or changed "
                                "nothing. `rejected`: it is stored as a reject. `unknown`: no consumer has read this "
                                "partition."
                            ),
                        },
                        "code": {"enum": [*REJECT_CODES, None], "description": "Why it was rejected."},
                        "faults": _FAULTS,
                        "total_faults": {"type": "integer", "minimum": 0},
                    },
                },
                "Problem": {
                    "type": "object",
                    "description": "An error as RFC 9457 defines it.",
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
        """Return the document."""
        resp.content_type = falcon.MEDIA_JSON
        resp.set_header("Cache-Control", "public, max-age=300")
        resp.data = self._document

    on_head = on_get
