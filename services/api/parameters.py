"""Query parameters: an unknown, repeated or unreadable one is a 400 and never ignored."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

import attrs
import msgspec
from falcon.asgi import Request, Response
from msgspec.inspect import StrType

from orderlib.contract import Validator, field_rules
from orderlib.errors import InvalidOrder, InvalidQuery
from orderlib.models import Delivery, Order
from orderlib.repository import FILTERS, MAX_PAGE_SIZE, PAGE_SIZE, in_utc

#: The fields that ``/orders`` filters by: of an order and of its delivery. The names of the parameters are the same.
ORDER_FILTERS = tuple(name for name in FILTERS if name in attrs.fields_dict(Order))
DELIVERY_FILTERS = tuple(name for name in FILTERS if name in attrs.fields_dict(Delivery))
TEXT_FILTERS = (*ORDER_FILTERS, *DELIVERY_FILTERS)
#: The period in which the orders of ``/orders`` were first stored.
PERIOD = ("since", "until")
#: The longest text of a search. No field that it searches is longer, but the URL of an order may be. In a URL, each
#: character takes up to 12 bytes, and the text must fit into a request line (``server.MAX_REQUEST_LINE_BYTES``).
MAX_SEARCH_CHARS = 600


class ParametersMiddleware:
    """Middleware: accept only the parameters in the resource's ``PARAMETERS``, each once."""

    async def process_resource(self, req: Request, _resp: Response, resource: object, _params: dict[str, Any]) -> None:
        """Raise InvalidQuery that names the first invalid parameter."""
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
    """Return the error for an invalid parameter. ``found`` must not quote its value."""
    return InvalidQuery(f"{name}: expected {expected}, found {found}")


def text_rule(field_name: str) -> StrType:
    """Return the contract's rule for a text field of an order or of its delivery."""
    model = Delivery if field_name in DELIVERY_FILTERS else Order
    rule = field_rules(model)[field_name]
    assert isinstance(rule, StrType)
    return rule


def text_parameter(req: Request, name: str) -> str | None:
    """Return a parameter that is named like a filter, or None. Raise InvalidQuery if it breaks the rule."""
    text = single_parameter(req, name)
    if text is None:
        return None
    validator = Validator()
    validator.validate(text, text_rule(name), name)
    try:
        validator.raise_faults()
    except InvalidOrder as exc:
        raise bad_parameter(name, exc.faults[0].expected, exc.faults[0].found) from exc
    return text


def time_parameter(req: Request, name: str) -> dt.datetime | None:
    """Return a parameter that is a time with an offset, in UTC, or None."""
    text = single_parameter(req, name)
    if text is None:
        return None
    try:
        time: dt.datetime = in_utc(msgspec.convert(text, Annotated[dt.datetime, msgspec.Meta(tz=True)]))
    except msgspec.ValidationError as exc:
        raise bad_parameter(name, "a time such as 2026-01-31T12:00:00Z", "another text") from exc
    return time


def limit_parameter(req: Request) -> int:
    """Return the parameter ``limit``, or its default."""
    text = single_parameter(req, "limit")
    if text is None:
        return PAGE_SIZE
    return parse_integer("limit", text, 1, MAX_PAGE_SIZE)


def parse_integer(name: str, text: str, least: int, most: int) -> int:
    """Return the integer in a text. Raise InvalidQuery for any other text, and outside these bounds."""
    # Python refuses to convert thousands of digits. No offset has more than 19.
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and least <= int(text) <= most):
        raise bad_parameter(name, f"an integer from {least} to {most}", "another value")
    return int(text)


def flag_parameter(req: Request, name: str) -> bool:
    """Return whether a parameter is present. Its only value is ``1``."""
    text = single_parameter(req, name)
    if text not in {None, "1"}:
        raise bad_parameter(name, "1", "another value")
    return text is not None


def single_parameter(req: Request, name: str) -> str | None:
    """Return the value of a parameter, or None. ``ParametersMiddleware`` has refused several values."""
    value = req.params.get(name)
    assert not isinstance(value, list)
    return value
