"""The OpenAPI document. Its schemas and limits come from the contract of an order and from the repository."""

from __future__ import annotations

from typing import Any, TypeAlias

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
_HTML = "text/html"

#: A part of the document.
_Part: TypeAlias = dict[str, Any]

_TEXT: _Part = {"type": "string"}
_TIME: _Part = {"type": "string", "format": "date-time"}

#: Where a record is in Kafka.
_TOPIC: _Part = {"type": "string", "pattern": TOPIC_PATTERN}
_PARTITION: _Part = {"type": "integer", "minimum": 0, "maximum": MAX_PARTITION}
_OFFSET: _Part = {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET}


def _ref(kind: str, name: str) -> _Part:
    """Refer to a component."""
    return {"$ref": f"#/components/{kind}/{name}"}


def _schema(name: str) -> _Part:
    return {"schema": _ref("schemas", name)}


def _query(name: str, description: str, schema: _Part, **more: object) -> _Part:
    return {"name": name, "in": "query", "description": description, "schema": schema, **more}


def _in_path(name: str, schema: _Part) -> _Part:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _period(description: str) -> list[_Part]:
    """Return the parameters of a period. The description has a gap for what each of them means."""
    since, until = PERIOD
    return [
        _query(since, description.format("at this time or later"), _TIME),
        _query(until, description.format("before this time"), _TIME),
    ]


_HEADERS: _Part = {
    "ETag": {"description": "Identifies the content.", "schema": _TEXT},
    "Cache-Control": {"schema": _TEXT},
    "X-Request-Id": {"description": "Also in the log, and in the problem document of an error.", "schema": _TEXT},
    "Allow": {"description": "The methods of this path.", "schema": _TEXT},
    "Vary": {"schema": _TEXT},
    "Location": {"schema": _TEXT},
    "WWW-Authenticate": {"description": "Bearer and Basic.", "schema": _TEXT},
    "Retry-After": {"description": "Seconds to wait before the next try.", "schema": _TEXT},
}


def _headers(*names: str) -> _Part:
    """Refer to the headers of a response. Each response has an X-Request-Id."""
    return {name: _ref("headers", name) for name in (*names, "X-Request-Id")}


#: The parameters of several resources.
_PARAMETERS: _Part = {
    "X-Request-Id": {
        "name": "X-Request-Id",
        "in": "header",
        "description": "The id of the request, if it is 1 to 64 of the characters A-Z a-z 0-9 . _ : -. Otherwise the "
        "service creates one.",
        "schema": _TEXT,
    },
    "format": _query("format", "`json` returns JSON to a browser, too.", {"type": "string", "enum": ["json"]}),
    "meta": _query(
        "meta",
        "Add the member `meta` to each order: times, version, position in Kafka, and whether it has an original. For "
        "one order, the ETag is then the SHA-256 of the response. Not with `format=original`; ignored for pages.",
        {"type": "string", "enum": ["1"]},
    ),
    "limit": _query(
        "limit",
        "How many orders to return at most.",
        {"type": "integer", "minimum": 1, "maximum": MAX_PAGE_SIZE, "default": PAGE_SIZE},
    ),
    "cursor": _query(
        "cursor",
        "`next_cursor` of the previous page. Its text is opaque.",
        {"type": "string", "minLength": 1},
    ),
}


def _parameter(name: str) -> _Part:
    return _ref("parameters", name)


def _problem(description: str, *headers: str) -> _Part:
    return {
        "description": description,
        "headers": _headers(*headers, "Cache-Control"),
        "content": {PROBLEM_JSON: _schema("Problem"), _HTML: {"schema": _TEXT}},
    }


#: The errors of several resources.
_PROBLEMS: _Part = {
    "400": _problem("A parameter is unknown, repeated or invalid."),
    "401": _problem("The token is missing or unknown.", "WWW-Authenticate"),
    "405": _problem("The method is neither GET nor HEAD.", "Allow"),
    "406": _problem("The client accepts neither application/json nor text/html."),
    "414": {
        **_problem("The URL is too long. The response is never a page."),
        "content": {PROBLEM_JSON: _schema("Problem")},
    },
    "421": _problem("Authentication is off, and the Host header does not name localhost."),
    "503": _problem("The database is unavailable, or the service is not configured correctly.", "Retry-After"),
}


def _problems(*statuses: str) -> _Part:
    return {status: _ref("responses", status) for status in statuses}


def _ok(description: str, schema: str, *headers: str) -> _Part:
    """Return the responses of a resource that is JSON or a page: 200 and the common errors."""
    return {
        "200": {
            "description": description,
            "headers": _headers(*headers, "Cache-Control", "Vary"),
            "content": {_JSON: _schema(schema), _HTML: {"schema": _TEXT}},
        },
        **_problems(*_PROBLEMS),
    }


def _path(parameters: list[_Part], get: _Part, head: _Part, responses: _Part) -> _Part:
    """Return a path. HEAD has the responses of GET."""
    return {
        "parameters": [*parameters, _parameter("X-Request-Id")],
        "get": {**get, "responses": responses},
        "head": {**head, "responses": responses},
    }


def _order(fields: _Part) -> _Part:
    return _path(
        [
            _in_path("order_uid", fields["order_uid"]),
            {
                "name": "If-None-Match",
                "in": "header",
                "description": "ETags of the versions that the client has. The response is 304 if one of them is "
                "current.",
                "schema": _TEXT,
            },
            _query(
                "format",
                "`json` returns JSON to a browser, too. `original` returns the order byte for byte as it was sent, "
                "with the SHA-256 of these bytes as ETag. Only an order with fields that this service does not know "
                "has an original; for others the response is 404.",
                {"type": "string", "enum": ["json", "original"]},
            ),
            _parameter("meta"),
            _query(
                "view",
                "`json` shows the indented JSON as an HTML page. Ignored for JSON responses.",
                {"type": "string", "enum": ["json"]},
            ),
        ],
        {"operationId": "getOrder", "summary": "Return an order"},
        {"operationId": "headOrder", "summary": "Return the headers of an order"},
        {
            **_ok("The order, as JSON or as an HTML page.", "OrderWithMeta", "ETag"),
            "304": {
                "description": "The client has the current version.",
                "headers": _headers("ETag", "Cache-Control", "Vary"),
            },
            "404": _problem("No order has this order_uid, or with `format=original`: it has no original."),
        },
    )


def _orders(fields: _Part, delivery_fields: _Part) -> _Part:
    return _path(
        [
            *(_parameter(name) for name in ("format", "meta", "limit", "cursor")),
            *(_query(name, f"Return only orders with exactly this `{name}`.", fields[name]) for name in ORDER_FILTERS),
            _query(
                "phone",
                "Return only orders whose phone number has exactly these digits. Other characters are ignored.",
                {**delivery_fields["phone"], "pattern": "[0-9]"},
            ),
            _query(
                "email",
                "Return only orders with this e-mail address, in any case of the letters A to Z.",
                delivery_fields["email"],
            ),
            *_period("Return only orders that were first stored {}. Updates do not count."),
        ],
        {
            "operationId": "listOrders",
            "summary": "List orders, newest first",
            "description": "Sorted by the time an order was first stored. An update never moves an order.",
        },
        {"operationId": "headOrders", "summary": "Return the headers of the list"},
        _ok("One page of the list, newest order first. It is shorter if the orders are very large.", "OrderList"),
    )


def _search() -> _Part:
    return _path(
        [
            _query(
                "q",
                "A complete order_uid in any case, the URL of an order, a track number, a customer_id, the digits of a "
                "phone number with the country code, as in the order, an e-mail address in any case, or the rid of an "
                "item. If none of these matches, a prefix of an order_uid. White space and invisible characters around "
                "the text do not count.",
                {"type": "string", "maxLength": MAX_SEARCH_CHARS, "pattern": r"\S"},
                required=True,
            ),
            _parameter("limit"),
            _parameter("format"),
        ],
        {
            "operationId": "search",
            "summary": "Search orders by an identifier",
            "description": "The newest orders that match, with the reasons. Orders whose order_uid begins with the "
            "text are sorted by it.",
        },
        {"operationId": "headSearch", "summary": "Return the headers of a search"},
        {
            **_ok("What was found, as JSON or as an HTML page.", "Matches"),
            "303": {
                "description": "Only for a page: one order matches, and `Location` has its URL.",
                "headers": _headers("Location", "Cache-Control"),
            },
        },
    )


def _rejects() -> _Part:
    return _path(
        [
            *(_parameter(name) for name in ("format", "limit", "cursor")),
            _query("code", "Return only rejects with this code.", {"type": "string", "enum": list(REJECT_CODES)}),
            *_period("Return only records that were rejected {}."),
        ],
        {
            "operationId": "listRejects",
            "summary": "List rejected records, newest first",
            "description": "Positions, times, codes and faults. Never a key, a value or a header.",
        },
        {"operationId": "headRejects", "summary": "Return the headers of the list of rejects"},
        _ok("One page of the list, newest reject first.", "RejectList"),
    )


def _record() -> _Part:
    return _path(
        [
            _in_path("topic", _TOPIC),
            _in_path("partition", _PARTITION),
            _in_path("offset", _OFFSET),
            _query(
                "wait",
                "How many seconds to wait until the record is handled or rejected. The response is sent as soon as "
                "this happens.",
                {"type": "number", "minimum": 0, "maximum": MAX_WAIT_S, "default": 0},
            ),
        ],
        {
            "operationId": "getRecord",
            "summary": "Tell what happened to a Kafka record",
            "description": "After `handled`, an order that was sent in this record can be read, unless a later record "
            "has replaced or erased it, or it was forgotten.",
        },
        {"operationId": "headRecord", "summary": "Return the headers of the state of a record"},
        {
            "200": {
                "description": "The state of the record at the time of the response.",
                "headers": _headers("Cache-Control"),
                "content": {_JSON: _schema("RecordState")},
            },
            **_problems("400", "401", "405", "414", "421", "503"),
        },
    )


def _probe(operation_id: str, summary: str, responses: _Part) -> _Part:
    """Return the path of a probe, which needs no token."""
    return {
        "parameters": [_parameter("X-Request-Id")],
        "get": {"operationId": operation_id, "summary": summary, "security": [], "responses": responses},
    }


_LIVE: _Part = {
    "200": {
        "description": "Healthy.",
        "headers": _headers("Cache-Control"),
        "content": {_JSON: {"schema": {"type": "object"}}},
    },
    **_problems("400", "405", "414"),
}
_READY: _Part = {
    "200": {
        "description": "Ready. A standby is ready with any replication delay.",
        "headers": _headers("Cache-Control"),
        "content": {_JSON: _schema("Ready")},
    },
    **_problems("400", "405", "414", "503"),
}


def _page_schema(name: str, item: str, next_cursor: str) -> _Part:
    """Return the schema of a page of a list. ``next_cursor`` describes its cursor."""
    return {
        "type": "object",
        "required": [name, "next_cursor"],
        "properties": {
            name: {"type": "array", "maxItems": MAX_PAGE_SIZE, "items": _ref("schemas", item)},
            "next_cursor": {"type": ["string", "null"], "description": next_cursor},
        },
    }


#: The schemas besides those of an order and of a match.
_SCHEMAS: _Part = {
    "OrderList": _page_schema(
        "orders", "OrderWithMeta", "Continues the list in the same direction; null on the last page."
    ),
    "Meta": {
        "description": "Only with `meta=1`: what the database knows about an order.",
        "type": "object",
        "required": [*META, "position"],
        "properties": {
            "first_stored_at": {**_TIME, "description": "When an order with this order_uid was first stored."},
            "stored_at": {**_TIME, "description": "When the current version was stored."},
            "version": {"type": "integer", "minimum": 1, "description": "Number of this version of the order: 1, 2, …"},
            "has_original": {
                "type": "boolean",
                "description": "Whether it was sent with fields that this service does not know. `format=original` "
                "returns them.",
            },
            "position": {
                "description": "The record that last confirmed the content; null for an order that was not read from "
                "Kafka.",
                "type": ["object", "null"],
                "required": ["topic_id", "partition", "offset"],
                "properties": {"topic_id": _TEXT, "partition": _PARTITION, "offset": _OFFSET},
            },
        },
    },
    "RejectList": _page_schema("rejects", "Reject", "Continues the list; null on the last page."),
    "Reject": {
        "type": "object",
        "properties": {
            "topic": _TOPIC,
            "partition": _PARTITION,
            "offset": _OFFSET,
            "topic_id": _TEXT,
            "record_time": _TIME,
            "code": {"enum": list(REJECT_CODES)},
            "faults": _ref("schemas", "Faults"),
            "total_faults": {"type": "integer", "minimum": 0},
            "rejected_at": _TIME,
            "redriven_at": {**_TIME, "type": ["string", "null"], "description": "Null until the first redrive."},
            "redrive_outcome": {"enum": [*Outcome, None]},
        },
    },
    "RecordState": {
        "type": "object",
        "required": ["state", "code", "faults", "total_faults"],
        "properties": {
            "state": {
                "enum": list(RecordState),
                "description": "`waiting`: the consumer has not handled it yet. `handled`: the order was stored, or "
                "the stored version is the same or newer, or the order was erased or forgotten. `rejected`: it is "
                "stored as a reject. `unknown`: no consumer has read this partition.",
            },
            "code": {"enum": [*REJECT_CODES, None], "description": "Why it was rejected."},
            "faults": _ref("schemas", "Faults"),
            "total_faults": {"type": "integer", "minimum": 0},
        },
    },
    "Faults": {
        "type": "array",
        "description": "The first faults of a rejected record, without its values.",
        "items": {
            "type": "object",
            "required": ["path", "expected", "found"],
            "properties": {
                "path": {**_TEXT, "description": "JSON path; `$` is the record itself."},
                "expected": {**_TEXT, "description": "The rule."},
                "found": {**_TEXT, "description": "The kind of value that was found."},
            },
        },
    },
    "Ready": {
        "type": "object",
        "required": ["status"],
        "properties": {
            "status": {"const": "ready"},
            "replication_delay_s": {
                "type": "number",
                "minimum": 0,
                "description": "Only if the database is a standby: how many seconds it is behind its primary, at "
                "most. 0: it has replayed everything that it received. Otherwise it is the age of the last replayed "
                "transaction. Without streaming replication, that age also grows while the primary is idle.",
            },
        },
    },
    "Problem": {
        "type": "object",
        "description": "An error as RFC 9457 defines it.",
        "required": ["type", "title", "status", "detail", "request_id"],
        "properties": {
            "type": _TEXT,
            "title": _TEXT,
            "status": {"type": "integer"},
            "detail": _TEXT,
            "request_id": _TEXT,
        },
    },
}


def _matches_schema(fields: _Part, payment_fields: _Part) -> _Part:
    match = {
        "type": "object",
        "required": [field.name for field in attrs.fields(OrderSummary)] + ["fields"],
        "properties": {
            **{name: fields[name] for name in ("order_uid", "customer_id", "track_number")},
            "items": {"type": "integer", "minimum": 1, "description": "How many items the order has."},
            **{name: payment_fields[name] for name in ("amount", "currency")},
            "first_stored_at": _TIME,
            "fields": {
                "type": "array",
                "minItems": 1,
                "description": "Why the order matches.",
                "items": {"enum": list(SearchField)},
            },
        },
    }
    return {
        "type": "object",
        "required": ["matches"],
        "properties": {"matches": {"type": "array", "maxItems": MAX_PAGE_SIZE, "items": match}},
    }


def document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    (order,), models = model_schemas(Order)
    fields, delivery_fields, payment_fields = (
        models[model.__name__]["properties"] for model in (Order, Delivery, Payment)
    )
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
            "/orders/{order_uid}": _order(fields),
            "/orders": _orders(fields, delivery_fields),
            "/search": _search(),
            "/rejects": _rejects(),
            "/records/{topic}/{partition}/{offset}": _record(),
            "/livez": _probe("live", "Is the process alive?", _LIVE),
            "/readyz": _probe("ready", "Can the service read the database?", _READY),
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
            "headers": _HEADERS,
            "parameters": _PARAMETERS,
            "responses": _PROBLEMS,
            "schemas": {
                **models,
                "OrderWithMeta": {"allOf": [order, {"properties": {"meta": _ref("schemas", "Meta")}}]},
                "Matches": _matches_schema(fields, payment_fields),
                **_SCHEMAS,
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
