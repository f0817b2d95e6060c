"""Orders, one and many: JSON for programs, pages for people."""

from __future__ import annotations

import datetime as dt
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import cast
from urllib.parse import urlencode

import attrs
import falcon
import msgspec
from falcon.asgi import Request, Response

from orderlib.codecs import encode_order
from orderlib.errors import InvalidQuery
from orderlib.repository import PAGE_SIZE, AsyncOrderRepository, Cursor, Direction, Filters, Page, StoredOrder
from services.api.deadline import ANSWER_TIMEOUT_S, with_deadline
from services.api.negotiation import known_etags, wants_page
from services.api.pages import Pages
from services.api.parameters import (
    PERIOD,
    TEXT_FILTERS,
    bad_parameter,
    flag_parameter,
    limit_parameter,
    single_parameter,
    text_parameter,
    time_parameter,
)

_REVALIDATE = "private, no-cache"

#: The parts of ``?meta=1`` besides the position.
META = ("first_stored_at", "stored_at", "version", "has_original")

#: In a URL, this character before a cursor means Direction.NEWER. Base64 does not use it.
_NEWER = "~"


class OrderResource:
    """``/orders/{order_uid}``."""

    PARAMETERS = frozenset({"format", "meta", "view"})

    def __init__(self, repository: AsyncOrderRepository, pages: Pages) -> None:
        self._repository = repository
        self._pages = pages

    async def on_get(self, req: Request, resp: Response, order_uid: str) -> None:
        """Return the order, or 304 if the client has the current version; a 304 costs one read by primary key.

        A single read ends in time by itself. Only a second one needs ``with_deadline``, which takes 3 % of a request.
        """
        with_meta = flag_parameter(req, "meta")
        if req.params.get("view", "json") != "json":
            raise bad_parameter("view", "json", "another text")
        if req.params.get("format") == "original":
            if with_meta:
                raise bad_parameter("meta", "none with format=original", "one")
            await self._show_original(req, resp, order_uid)
            return
        if wants_page(req):
            await self._show_page(req, resp, order_uid)
            return
        resp.set_header("Cache-Control", _REVALIDATE)
        known = known_etags(req)
        get_stored = self._repository.get_stored
        if known and not with_meta:
            began_s = time.monotonic()
            etag = (await self._repository.content_sha256(order_uid)).hex()
            if _is_not_modified(resp, etag, known):
                req.context.log_fields["order_uid"] = order_uid
                return
            get_stored = with_deadline(get_stored, ANSWER_TIMEOUT_S - (time.monotonic() - began_s))
        stored = await get_stored(order_uid)
        req.context.log_fields["order_uid"] = order_uid
        etag, data = stored.content_sha256.hex(), encode_order(stored.order)
        if with_meta:
            # The position may move while the content stays the same.
            data = _with_meta(stored)
            etag = hashlib.sha256(data).hexdigest()
            if _is_not_modified(resp, etag, known):
                return
        resp.set_header("ETag", f'"{etag}"')
        resp.content_type = falcon.MEDIA_JSON
        resp.data = data

    async def _show_page(self, req: Request, resp: Response, order_uid: str) -> None:
        """Show the order as a page or, with ``view=json``, its indented JSON."""
        stored = await self._repository.get_stored(order_uid)
        req.context.log_fields["order_uid"] = order_uid
        if single_parameter(req, "view") == "json":
            readable = msgspec.json.format(encode_order(stored.order), indent=2).decode()
            self._pages.show(resp, "json.html", order_uid=order_uid, json=readable, query="")
            return
        statuses = Counter(item.status for item in stored.order.items)
        self._pages.show(resp, "order.html", stored=stored, statuses=statuses, query="")

    async def _show_original(self, req: Request, resp: Response, order_uid: str) -> None:
        """Return the order byte for byte as it was sent. The ETag is the SHA-256 of these bytes."""
        original = await self._repository.original(order_uid)
        req.context.log_fields["order_uid"] = order_uid
        if original is None:
            raise falcon.HTTPNotFound(
                description="This order has no unknown fields, so no original is kept: its JSON has everything that "
                "was sent."
            )
        resp.set_header("Cache-Control", _REVALIDATE)
        etag = hashlib.sha256(original).hexdigest()
        if _is_not_modified(resp, etag, known_etags(req)):
            return
        resp.set_header("ETag", f'"{etag}"')
        resp.content_type = falcon.MEDIA_JSON
        resp.data = original

    on_head = on_get


def _is_not_modified(resp: Response, etag: str, known: Collection[str]) -> bool:
    """Answer 304 if the client knows this version. Return whether it does."""
    if etag not in known and "*" not in known:
        return False
    resp.set_header("ETag", f'"{etag}"')
    resp.status = falcon.HTTP_NOT_MODIFIED
    return True


class OrdersResource:
    """``/orders``: a page of the list, newest first."""

    PARAMETERS = frozenset({"limit", "cursor", *TEXT_FILTERS, *PERIOD, "format", "meta"})

    def __init__(self, repository: AsyncOrderRepository, pages: Pages) -> None:
        self._repository = repository
        self._pages = pages

    @with_deadline
    async def on_get(self, req: Request, resp: Response) -> None:
        """Return a page of orders; JSON costs two queries."""
        is_page = wants_page(req)
        encode = _with_meta if flag_parameter(req, "meta") else _without_meta
        limit = limit_parameter(req)
        cursor, direction = _cursor(req)
        texts = {name: text_parameter(req, name) for name in TEXT_FILTERS}
        period = {name: time_parameter(req, name) for name in PERIOD}
        filters = cast("Filters", texts | period)
        page = await self._repository.list_orders(cursor=cursor, direction=direction, limit=limit, **filters)
        if not is_page:
            resp.set_header("Cache-Control", _REVALIDATE)
            resp.content_type = falcon.MEDIA_JSON
            resp.data = _encode_page(page, direction, encode)
            return
        if direction is Direction.NEWER and page.next_cursor is None and len(page.orders) < limit:
            # Back at the top: show a full page, not only the few orders that are newer.
            cursor, direction = None, Direction.OLDER
            page = await self._repository.list_orders(direction=direction, limit=limit, **filters)
        newer, older = _neighbours(page, direction, is_top=cursor is None)
        self._pages.show(
            resp,
            "orders.html",
            orders=page.orders,
            count=await self._count(page, cursor, filters),
            **period,
            is_filtered=any(value is not None for value in filters.values()),
            is_top=cursor is None,
            newest=_link(None, limit, filters),
            newer=newer and _link(newer, limit, filters),
            older=older and _link(older, limit, filters),
            filters=texts,
            # The search box keeps what the list was found by.
            query=next(filter(None, texts.values()), ""),
        )

    async def _count(self, page: Page, cursor: Cursor | None, filters: Filters) -> int:
        """Return how many orders the whole list has. ``cursor`` is where the page begins."""
        if cursor is None and page.next_cursor is None:
            return len(page.orders)
        return await self._repository.count(**filters)

    on_head = on_get


def _without_meta(stored: StoredOrder) -> bytes:
    return encode_order(stored.order)


def _with_meta(stored: StoredOrder) -> bytes:
    """Return the JSON of an order with one more member: what the database knows about it."""
    position = stored.position and attrs.asdict(stored.position)
    meta = {**{name: getattr(stored, name) for name in META}, "position": position}
    return encode_order(stored.order)[:-1] + b',"meta":' + msgspec.json.encode(meta) + b"}"


def _encode_page(page: Page, direction: Direction, encode: Callable[[StoredOrder], bytes]) -> bytes:
    orders = b",".join(map(encode, page.orders))
    next_cursor = _cursor_text(page.next_cursor, direction) if page.next_cursor else None
    return b'{"orders":[%b],"next_cursor":%b}' % (orders, msgspec.json.encode(next_cursor))


def _cursor_text(cursor: Cursor, direction: Direction) -> str:
    return f"{_NEWER if direction is Direction.NEWER else ''}{cursor}"


def _neighbours(page: Page, direction: Direction, *, is_top: bool) -> tuple[str | None, str | None]:
    """Return the cursors of the newer and of the older page, or None for a page that does not exist."""
    if not page.orders:
        return None, None
    newer, older = page.orders[0].cursor, page.orders[-1].cursor
    if direction is Direction.NEWER:
        has_newer, has_older = page.next_cursor is not None, True
    else:
        has_newer, has_older = not is_top, page.next_cursor is not None
    return (
        _cursor_text(newer, Direction.NEWER) if has_newer else None,
        _cursor_text(older, Direction.OLDER) if has_older else None,
    )


def _link(cursor: str | None, limit: int, filters: Filters) -> str:
    parameters = {"cursor": cursor, "limit": limit if limit != PAGE_SIZE else None, **filters}
    given = {
        name: value.isoformat() if isinstance(value, dt.datetime) else value
        for name, value in parameters.items()
        if value is not None
    }
    return f"/orders?{urlencode(given)}" if given else "/orders"


def _cursor(req: Request) -> tuple[Cursor | None, Direction]:
    text = single_parameter(req, "cursor")
    if text is None:
        return None, Direction.OLDER
    direction = Direction.NEWER if text.startswith(_NEWER) else Direction.OLDER
    try:
        return Cursor.parse(text.removeprefix(_NEWER)), direction
    except InvalidQuery as exc:
        raise bad_parameter("cursor", "a next_cursor as it was returned", "another text") from exc
