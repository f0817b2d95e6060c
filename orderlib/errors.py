"""Every error of the library, named by what the caller does next.

::

    OrderlibError
    ├── TransientError              retry later: the same call may succeed
    │   ├── DatabaseUnavailable     PostgreSQL refused or dropped the connection, or did not answer
    │   ├── BrokerUnavailable       Kafka did not answer
    │   └── TransactionConflict     deadlock or serialization failure: retry immediately
    ├── RejectedError               bad data: retrying cannot help; store it as a reject, or answer 4xx
    │   ├── MalformedJson           not one well-formed JSON text
    │   ├── InvalidOrder            JSON, but not an order: .faults, each with its path
    │   ├── TooLarge                longer than the limit; not parsed
    │   └── RefusedByDatabase       valid here, refused by PostgreSQL
    ├── OrderNotFound               no order has that order_uid
    ├── RejectNotFound              no reject has that position
    ├── InvalidQuery                a cursor or limit that is not valid: change the argument
    ├── FenceLost                   these records were handled already: re-read the offsets, continue from there
    ├── BreakerTripped              nearly every record was rejected: probably the wrong topic or release
    └── ConfigurationError          a missing table, right or setting: stop
        └── TopicRecreated          offsets of the deleted topic mean nothing: a restart begins the new topic

No message holds a value of an order: values are personal data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import attrs

#: So many faults of one record are kept; the total says how many there were.
MAX_FAULTS = 100


@attrs.frozen(kw_only=True)
class Fault:
    """One way in which a record breaks the contract. It never holds a value from the record."""

    #: JSON path of the value, ``$`` being the whole record: ``$.items[3].price``.
    path: str
    #: What the contract asks for there.
    expected: str
    #: What kind of thing was found instead.
    found: str

    def __str__(self) -> str:
        return f"{self.path}: expected {self.expected}, found {self.found}"


def _restored(cls: type[OrderlibError], args: tuple[object, ...], attributes: Mapping[str, object]) -> OrderlibError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(attributes)
    return error


class OrderlibError(Exception):
    """Root of every error that orderlib raises on purpose. Copies and pickles of an error equal it in every part."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Restore the error without ``__init__``, which takes other arguments than the message in ``args``."""
        return _restored, (type(self), self.args, self.__dict__)


class TransientError(OrderlibError):
    """An outage or a collision: nothing is known to be wrong with the data, and the call may succeed later."""


class DatabaseUnavailable(TransientError):
    """PostgreSQL refused, cut or did not answer: wait, then again.

    Whether a COMMIT under way took effect is unknown. Every call of ours may be made again all the same: what is stored
    already counts as a duplicate.
    """


class BrokerUnavailable(TransientError):
    """Kafka did not answer in time: wait, then again. Raised by the programs, never by a repository."""


class TransactionConflict(TransientError):
    """Two transactions met (deadlock, serialization) and this one was rolled back whole; at once again is right.

    A repository has tried again by itself, many times, before it raises this.
    """


class RejectedError(OrderlibError):
    """The data is at fault: the same call will never succeed.

    The message is the first fault and the number of the others; it holds no value.
    """

    #: The code that a reject carries in ``rejects``, metrics and logs.
    code: ClassVar[str]
    #: The first 100 faults, in document order.
    faults: tuple[Fault, ...]
    #: How many faults there were.
    total: int

    def __init__(self, faults: Sequence[Fault], total: int | None = None) -> None:
        self.faults = tuple(faults[:MAX_FAULTS])
        self.total = len(faults) if total is None else total
        more = f" (and {self.total - 1} more)" if self.total > 1 else ""
        super().__init__(f"{self.code}: {self.faults[0]}{more}")


class MalformedJson(RejectedError):
    """The bytes are not one well-formed JSON text in UTF-8, or nest more than 100 levels deep."""

    code = "malformed_json"


class InvalidOrder(RejectedError):
    """JSON or a Python value that breaks the contract of an order; ``faults`` says where."""

    code = "invalid_order"


class TooLarge(RejectedError):
    """The value is longer than ``ORDERS_MAX_RECORD_BYTES``. Raised by the programs; ``decode_order`` has no limit."""

    code = "too_large"


class RefusedByDatabase(RejectedError):
    """PostgreSQL refused a row that passed our own checks. Nothing of the call is stored."""

    code = "refused_by_database"

    #: SQLSTATE of the refusal, or ``None`` where the driver refused before sending.
    sqlstate: str | None

    def __init__(self, sqlstate: str | None, order_uid: str | None = None) -> None:
        self.sqlstate = sqlstate
        #: Which order it was, or ``None`` where that is not known.
        self.order_uid = order_uid
        where = f"order {order_uid}" if order_uid else "a row"
        found = f"SQLSTATE {sqlstate}" if sqlstate else "a value the driver cannot encode"
        super().__init__([Fault(path="$", expected=f"{where} that PostgreSQL takes", found=found)])


#: The code of every reject. The CHECK constraint on ``rejects.code`` lists the same codes.
REJECT_CODES = tuple(error.code for error in (MalformedJson, InvalidOrder, TooLarge, RefusedByDatabase))


class OrderNotFound(OrderlibError):
    """No stored order has this order_uid."""

    def __init__(self, order_uid: str) -> None:
        #: What was asked for.
        self.order_uid = order_uid
        super().__init__(f"no order {order_uid!r}")


class RejectNotFound(OrderlibError):
    """No reject is stored at this position. Raised by the programs, never by a repository."""

    def __init__(self, place: str) -> None:
        #: TOPIC/PARTITION/OFFSET.
        self.place = place
        super().__init__(place)

    def __str__(self) -> str:
        return f"no reject {self.place!r}"


class FenceLost(OrderlibError):
    """The offsets were not where this batch expected them: its records were handled by someone.

    Perhaps by us, in a COMMIT whose answer was lost. Nothing of the batch is stored by this call. It is the consumer's,
    and no repository raises it.
    """

    def __init__(self, partitions: Collection[int], next_offsets: Mapping[int, int]) -> None:
        #: The partitions whose fence failed.
        self.partitions = frozenset(partitions)
        #: Where the store stands now, by partition.
        self.next_offsets = dict(next_offsets)
        super().__init__(f"records of partitions {sorted(self.partitions)} were handled already")


class ConfigurationError(OrderlibError):
    """A missing setting, table, topic or right: no retry helps until an operator acts."""


class TopicRecreated(ConfigurationError):
    """The topic was deleted and created again: its offsets start anew. A restart begins the new topic."""


class BreakerTripped(OrderlibError):
    """Nearly all of the last records were rejected, so the set-up is probably wrong. The batch was rolled back."""


class InvalidQuery(OrderlibError, ValueError):
    """A cursor or a limit is invalid. The argument is wrong, not an order."""
