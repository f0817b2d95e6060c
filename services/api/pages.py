"""Pages for people: the templates, and the format of money, times and counts."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import falcon
import jinja2
from falcon.asgi import Request, Response

from orderlib.contract import defaults_of
from orderlib.repository import COUNT_LIMIT
from services.api.parameters import MAX_SEARCH_CHARS

_HERE = Path(__file__).parent

#: The number of decimals of each currency that does not have two (ISO 4217). An unknown code has two.
_DECIMALS = {
    code: decimals
    for decimals, codes in {
        0: [
            *("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG"),
            *("RWF", "UGX", "UYI", "VND", "VUV", "XAF", "XOF", "XPF"),
        ],
        3: ["BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"],
        4: ["CLF", "UYW"],
    }.items()
    for code in codes
}


#: A list shows this many characters of a value at most: a UUID has 36.
MAX_SHOWN_CHARS = 40


def money(minor_units: int, currency: str) -> str:
    """Format an amount: ``1,817.00 USD``."""
    decimals = _DECIMALS.get(currency, 2)
    whole, rest = divmod(minor_units, 10**decimals)
    fraction = f".{rest:0{decimals}}" if decimals else ""
    return f"{whole:,}{fraction}\N{NO-BREAK SPACE}{currency}"


def moment(time: dt.datetime | int) -> str:
    """Format a time, or Unix seconds, in UTC to the second: ``26 Nov 2021, 06:22:19 UTC``."""
    time = _utc(time)
    return f"{time.day} {time:%b} {time.year:04}, {time:%H:%M:%S} UTC"


def ago(time: dt.datetime, now: dt.datetime) -> str:
    """Format a past time for a list: ``12 s ago`` or, after a day, ``26 Nov 2021``."""
    time = _utc(time)
    if now - time < dt.timedelta(days=1):
        return f"{duration(now - time)} ago"
    return f"{time.day} {time:%b} {time.year:04}"


def shortened(text: str) -> str:
    """Return the beginning and the end of a text that is longer than ``MAX_SHOWN_CHARS``."""
    if len(text) <= MAX_SHOWN_CHARS:
        return text
    return f"{text[: MAX_SHOWN_CHARS - 9]}…{text[-8:]}"


def machine_time(time: dt.datetime | int) -> str:
    """Format a time, or Unix seconds, for ``<time datetime=…>``: ``2021-11-26T06:22:19Z``."""
    return _utc(time).isoformat().replace("+00:00", "Z")


def _utc(time: dt.datetime | int) -> dt.datetime:
    if isinstance(time, int):
        return dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=time)
    return time.astimezone(dt.UTC)


def duration(elapsed: dt.timedelta) -> str:
    """Format a duration in one unit: ``40 s``, ``3 min``, ``5 h``, ``12 days``. A negative one counts as zero."""
    seconds = max(int(elapsed.total_seconds()), 0)
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def counted(number: int) -> str:
    """Format a count that stops at ``COUNT_LIMIT``: ``9,999``, ``10,000 or more``."""
    return f"{number:,}{' or more' if number >= COUNT_LIMIT else ''}"


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


#: What the page of an order calls the fields, in this sequence. Another field is named after itself, and comes last.
LABELS = {
    # Delivery.
    "name": "Name",
    "phone": "Phone",
    "email": "E-mail",
    "address": "Address",
    "city": "City",
    "zip": "Postal code",
    "region": "Region",
    # Payment.
    "goods_total": "Goods",
    "delivery_cost": "Delivery",
    "custom_fee": "Customs fee",
    "amount": "Paid",
    "payment_dt": "Paid at",
    "provider": "Provider",
    "bank": "Bank",
    "transaction": "Transaction",
    "request_id": "Request",
    # The order.
    "customer_id": "Customer",
    "track_number": "Track number",
    "delivery_service": "Carrier",
    "entry": "Entry",
    "locale": "Locale",
    "sm_id": "Service",
    "shardkey": "Shard",
    "oof_shard": "OOF shard",
    "internal_signature": "Signature",
}
#: How a page shows a field; any other as its text. ``list``: as a link to the orders with this value.
_KINDS = {
    **dict.fromkeys(("goods_total", "delivery_cost", "custom_fee", "amount"), "money"),
    **dict.fromkeys(("customer_id", "track_number"), "list"),
    "payment_dt": "time",
}
#: Fields that the page shows elsewhere.
_SHOWN_ELSEWHERE = frozenset({"order_uid", "date_created", "delivery", "payment", "items", "currency"})


@attrs.frozen(kw_only=True)
class ShownField:
    """A field of an order with its value, as the page shows it. Its repr shows no value."""

    name: str
    value: object = attrs.field(repr=False)

    @property
    def label(self) -> str:
        """What the page calls the field."""
        return LABELS.get(self.name) or self.name.replace("_", " ").capitalize()

    @property
    def kind(self) -> str:
        """How the page shows the value."""
        return _KINDS.get(self.name, "text")

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return self.value is None or self.value == ""

    @property
    def is_sum(self) -> bool:
        """Whether it is the sum of the fields above it."""
        return self.name == "amount"


def shown_fields(part: attrs.AttrsInstance) -> list[ShownField]:
    """Return the fields of an order, or of its delivery or payment, in the sequence of ``LABELS``."""
    names = [field.name for field in attrs.fields(type(part)) if field.name not in _SHOWN_ELSEWHERE]
    places = list(LABELS)
    names.sort(key=lambda name: places.index(name) if name in LABELS else len(places))
    return [ShownField(name=name, value=getattr(part, name)) for name in names]


def optional_fields(item: attrs.AttrsInstance) -> dict[str, object]:
    """Return the values of an item's optional fields by label, which the template does not name: ``Gift note``."""
    return {ShownField(name=name, value="").label: getattr(item, name) for name in defaults_of(type(item))}


class Pages:
    """Render the templates beside this file. Every value in them is escaped."""

    def __init__(
        self, status_words: Mapping[int, str] | None = None, clock: Callable[[], dt.datetime] = _utc_now
    ) -> None:
        self._status_words = status_words or {}
        self._clock = clock
        self.static = {path.name: path.read_bytes() for path in sorted((_HERE / "static").iterdir())}
        self.static_version = hashlib.sha256(b"".join(self.static.values())).hexdigest()[:12]
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals["static_version"] = self.static_version
        self._templates.globals["search_max_chars"] = MAX_SEARCH_CHARS
        self._templates.globals["max_shown_chars"] = MAX_SHOWN_CHARS
        self._templates.filters.update(
            money=money,
            moment=moment,
            ago=ago,
            machine_time=machine_time,
            duration=duration,
            counted=counted,
            shortened=shortened,
            shown_fields=shown_fields,
            optional_fields=optional_fields,
            status=self._status,
        )

    def _status(self, code: int) -> str:
        """Format the status of an item: ``202 accepted``, or ``202`` if the shop has no word for it."""
        return f"{code} {self._status_words.get(code, '')}".rstrip()

    def now(self) -> dt.datetime:
        """Return the time that the pages show times relative to."""
        return self._clock()

    def show(self, resp: Response, template: str, **shown: Any) -> None:
        """Answer with a page that no cache may store: it may show personal data."""
        resp.content_type = falcon.MEDIA_HTML
        resp.set_header("Cache-Control", "no-store")
        resp.text = self._templates.get_template(template).render(shown, now=self._clock())


class StaticResource:
    """``/static/{name}``: style sheet and icon."""

    PARAMETERS = frozenset({"v"})

    def __init__(self, pages: Pages) -> None:
        self._files = pages.static
        self._version = pages.static_version

    async def on_get(self, req: Request, resp: Response, name: str) -> None:
        """Return a file. A browser may cache it only under its own version.

        During a roll-out, a page of one release may request the file of another one.
        """
        if name not in self._files:
            raise falcon.HTTPNotFound
        resp.content_type = {"css": "text/css; charset=utf-8", "svg": "image/svg+xml"}[name.rpartition(".")[2]]
        is_current = req.params.get("v") == self._version
        resp.set_header("Cache-Control", "private, max-age=31536000, immutable" if is_current else "no-cache")
        resp.data = self._files[name]

    on_head = on_get
