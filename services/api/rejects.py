"""The list of rejected records, without their content: position, time, code and faults."""

from __future__ import annotations

import datetime as dt
from typing import Protocol
from urllib.parse import urlencode

import attrs
import falcon
import msgspec
from falcon.asgi import Request, Response

from orderlib.errors import REJECT_CODES
from orderlib.postgres.reject_list import RejectCursor, RejectPage, RejectQuery, RejectSummary
from orderlib.repository import PAGE_SIZE
from services.api.deadline import with_deadline
from services.api.negotiation import wants_page
from services.api.pages import Pages
from services.api.parameters import PERIOD, bad_parameter, limit_parameter, single_parameter, time_parameter

#: The periods that the page links to, by name.
_PERIODS = {"last hour": dt.timedelta(hours=1), "last day": dt.timedelta(days=1), "last week": dt.timedelta(days=7)}


class AsyncRejectRepository(Protocol):
    """Lists rejects, for asyncio."""

    async def list_rejects(self, query: RejectQuery) -> RejectPage:
        """Return a page of the list of rejects."""
        ...


class RejectsResource:
    """``/rejects``: a page of the list, newest first."""

    PARAMETERS = frozenset({"limit", "cursor", "code", *PERIOD, "format"})

    def __init__(self, repository: AsyncRejectRepository, pages: Pages) -> None:
        self._repository = repository
        self._pages = pages

    @with_deadline
    async def on_get(self, req: Request, resp: Response) -> None:
        """Return a page of rejects. It costs one query."""
        is_page = wants_page(req)
        code = single_parameter(req, "code")
        if code is not None and code not in REJECT_CODES:
            raise bad_parameter("code", f"one of {', '.join(REJECT_CODES)}", "another text")
        cursor = single_parameter(req, "cursor")
        query = RejectQuery(
            code=code,
            since=time_parameter(req, "since"),
            until=time_parameter(req, "until"),
            cursor=None if cursor is None else RejectCursor.parse(cursor),
            limit=limit_parameter(req),
        )
        page = await self._repository.list_rejects(query)
        resp.set_header("Cache-Control", "no-store")
        if not is_page:
            resp.content_type = falcon.MEDIA_JSON
            resp.data = msgspec.json.encode(
                {
                    "rejects": [_plain(reject) for reject in page.rejects],
                    "next_cursor": str(page.next_cursor) if page.next_cursor else None,
                }
            )
            return
        first = attrs.evolve(query, cursor=None)
        now = self._pages.now().replace(microsecond=0)
        self._pages.show(
            resp,
            "rejects.html",
            page=page,
            code=code,
            is_filtered=bool(code or query.since or query.until),
            is_first=query.cursor is None,
            codes={name: _link(attrs.evolve(first, code=name)) for name in REJECT_CODES},
            any_code=_link(attrs.evolve(first, code=None)),
            periods={name: _link(attrs.evolve(first, since=now - length)) for name, length in _PERIODS.items()},
            any_time=_link(attrs.evolve(first, since=None, until=None)),
            since=query.since,
            until=query.until,
            newest=_link(first),
            older=page.next_cursor and _link(attrs.evolve(query, cursor=page.next_cursor)),
            query="",
        )

    on_head = on_get


def _plain(reject: RejectSummary) -> dict[str, object]:
    return {
        **attrs.asdict(reject.position),
        "topic_id": reject.topic_id,
        "record_time": reject.record_time,
        "code": reject.code,
        "faults": [attrs.asdict(fault) for fault in reject.faults],
        "total_faults": reject.total_faults,
        "rejected_at": reject.rejected_at,
        "redriven_at": reject.redriven_at,
        "redrive_outcome": reject.redrive_outcome,
    }


def _link(query: RejectQuery) -> str:
    parameters = {
        "code": query.code,
        "since": query.since and query.since.isoformat(),
        "until": query.until and query.until.isoformat(),
        "limit": query.limit if query.limit != PAGE_SIZE else None,
        "cursor": query.cursor,
    }
    given = {name: str(value) for name, value in parameters.items() if value is not None}
    return f"/rejects?{urlencode(given)}" if given else "/rejects"
