"""What the text of a search can mean: the fields that it may match, and how each is compared.

Comparisons are the same in PostgreSQL, in any database and locale, and in memory: letters of ASCII match in any case,
and only the digits of a phone number count.
"""

from __future__ import annotations

import enum
import re
from urllib.parse import unquote

import attrs

from orderlib.contract import fits_postgres


class SearchField(enum.StrEnum):
    """Why an order matches a search."""

    #: The text is its order_uid, in any case, or the URL of its page.
    ORDER_UID = "order_uid"
    #: Its order_uid begins with the text, in any case.
    ORDER_UID_PREFIX = "order_uid_prefix"
    #: The text is its track number.
    TRACK_NUMBER = "track_number"
    #: The text is its customer_id.
    CUSTOMER_ID = "customer_id"
    #: The text has the digits of its phone number.
    PHONE = "phone"
    #: The text is its e-mail address, in any case.
    EMAIL = "email"
    #: The text is the rid of one of its items.
    RID = "rid"


#: A text with more characters matches nothing. No field of a search has as many, and no URL of an order needs them.
MAX_CHARS = 4_096
#: The path of a URL as it is copied from a browser: of the page or the JSON of an order. Only for a text without white
#: space, where the first match is the result: otherwise a search would take quadratic time.
_ORDER_URL = re.compile(r".*/orders/([^/?#]+)")
_ORDER_UID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
#: White space and invisible characters, such as those that a text is copied with. They do not count around a search.
_AROUND = "".join(
    chr(code)
    for first, last in (
        *((0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200F)),
        *((0x2028, 0x202F), (0x205F, 0x2060), (0x2066, 0x2069), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
    )
    for code in range(first, last + 1)
)
_NON_DIGITS = re.compile("[^0-9]+")
#: Words that people write beside a phone number.
_PHONE_WORDS = re.compile(r"\b(?:tel|phone|mobile|fax|ext|x)\b", re.IGNORECASE)


def phone_digits(text: str) -> str:
    """Return the digits 0 to 9 of a text."""
    return _NON_DIGITS.sub("", text)


def lower_ascii(text: str) -> str:
    """Return a text with small letters for A to Z. Other letters stay as they are."""
    return text.encode().lower().decode()


@attrs.frozen
class SearchText:
    """The text of a search, as each field is compared with it. Its repr shows no text."""

    #: Without white space and invisible characters around it.
    text: str = attrs.field(repr=False)
    #: An order_uid or its beginning, in small letters; ``None`` if no order_uid can begin like that.
    order_uid: str | None = attrs.field(repr=False)
    #: The digits of a phone number; ``None`` if the text has none or is no phone number.
    phone: str | None = attrs.field(repr=False)
    #: In small letters.
    email: str = attrs.field(repr=False)

    @classmethod
    def parse(cls, text: str) -> SearchText | None:
        """Return a search, or ``None`` for a text that no field can have: an empty or a very long one, for example."""
        text = text.strip(_AROUND)
        if not text or len(text) > MAX_CHARS or not fits_postgres(text):
            return None
        url = None if re.search(r"\s", text) else _ORDER_URL.match(text)
        order_uid = unquote(url[1]) if url else text
        has_words = any(map(str.isalpha, _PHONE_WORDS.sub("", text)))
        return cls(
            text=text,
            order_uid=order_uid.lower() if _ORDER_UID.fullmatch(order_uid) else None,
            phone=None if has_words else phone_digits(text) or None,
            email=lower_ascii(text),
        )
