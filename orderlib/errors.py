"""The errors, by what the caller does next.

::

    OrderlibError
    ├── TransientError              retry later: the same call may succeed
    │   ├── DatabaseUnavailable     PostgreSQL refused or dropped the connection, or did not answer in time
    │   ├── BrokerUnavailable       Kafka did not answer in time
    │   │   └── UnreadableRecord    a record cannot be read: its partition waits
    │   └── TransactionConflict     deadlock or serialization failure: retry immediately
    ├── RejectedError               bad data: retrying cannot help; store it as a reject, or answer 4xx
    │   ├── MalformedJson           not one well-formed JSON text
    │   ├── InvalidOrder            JSON, but not an order: .faults, each with its path
    │   ├── TooLarge                longer than the limit; not parsed
    │   └── RefusedByDatabase       valid for orderlib, but refused by PostgreSQL
    ├── OrderNotFound               no order has this order_uid
    ├── RejectNotFound              no reject has this position
    ├── InvalidQuery                an argument of a query is invalid: change it
    ├── FenceLost                   the stored offsets are not the expected ones: continue from them
    ├── BreakerTripped              nearly every record was rejected: probably the wrong topic or release
    └── ConfigurationError          a missing or wrong table, privilege or setting: stop
        └── TopicRecreated          the topic was deleted and created again: restart to read the new one

No message contains a value of an order except its order_uid, because the other values are personal data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import attrs

#: Topic and partition.
_TopicPartition = TypeVar("_TopicPartition", bound=tuple[str, int])

#: A report has at most this number of faults. Its total counts all of them.
MAX_FAULTS = 100


@attrs.frozen(kw_only=True)
class Fault:
    """One way in which a record breaks the contract. It never contains a value from the record."""

    #: JSON path of the value, such as ``$.items[3].price``; ``$`` is the record itself.
    path: str
    #: The contract's rule for this value, in words.
    expected: str
    #: The kind of value that was found, in words.
    found: str

    def __str__(self) -> str:
        return f"{self.path}: expected {self.expected}, found {self.found}"


def _restore_error(
    cls: type[OrderlibError], args: tuple[object, ...], attributes: Mapping[str, object]
) -> OrderlibError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(attributes)
    return error


class OrderlibError(Exception):
    """The root of all errors of orderlib. An error can be copied and pickled without loss."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Restore the error without ``__init__``, because its parameters are not what ``args`` contains."""
        return _restore_error, (type(self), self.args, self.__dict__)


class TransientError(OrderlibError):
    """An outage or a conflict. The data may be valid, and the same call may succeed later."""


class DatabaseUnavailable(TransientError):
    """PostgreSQL refused or dropped the connection, or did not answer in time: wait, then retry.

    If a COMMIT was in progress, its outcome is unknown. A retry is safe: every call is idempotent, and an order that is
    stored already counts as a duplicate.
    """


class BrokerUnavailable(TransientError):
    """Kafka did not answer in time: wait, then retry. Only the programs raise it, never a repository."""


class UnreadableRecord(BrokerUnavailable):
    """librdkafka cannot read a record batch: its partition waits, the others continue. An operator must act.

    Only the consumer raises it.
    """


class TransactionConflict(TransientError):
    """Deadlock or serialization failure: nothing of the call is stored. Retry immediately.

    A repository of ``connect`` or ``connect_async`` has retried several times: repeat the call. One of ``using`` has
    not: roll back your transaction, and repeat all of it.
    """


class RejectedError(OrderlibError):
    """The data is invalid: the same call can never succeed.

    The message is the first fault and the number of the others. It contains no value.
    """

    #: The code that a reject carries in ``rejects``, metrics and logs.
    code: ClassVar[str]
    #: The first 100 faults, in document order.
    faults: tuple[Fault, ...]
    #: The number of all faults.
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
    """The value is longer than ``ORDERS_MAX_RECORD_BYTES``. Only the programs check it, never ``decode_order``."""

    code = "too_large"


class RefusedByDatabase(RejectedError):
    """PostgreSQL refused a row that orderlib had accepted. Nothing of the call is stored."""

    code = "refused_by_database"

    #: SQLSTATE of the refusal, or ``None`` if the driver refused to send the row.
    sqlstate: str | None

    def __init__(self, sqlstate: str | None, order_uid: str | None = None) -> None:
        self.sqlstate = sqlstate
        #: The order_uid, or ``None`` if it is not known.
        self.order_uid = order_uid
        where = f"order {order_uid}" if order_uid else "a row"
        found = f"SQLSTATE {sqlstate}" if sqlstate else "a value the driver cannot encode"
        super().__init__([Fault(path="$", expected=f"{where} that PostgreSQL accepts", found=found)])


#: The code of every reject. The CHECK constraint on ``rejects.code`` lists the same codes.
REJECT_CODES = tuple(error.code for error in (MalformedJson, InvalidOrder, TooLarge, RefusedByDatabase))


class OrderNotFound(OrderlibError):
    """No stored order has this order_uid."""

    def __init__(self, order_uid: str) -> None:
        #: The order_uid of the call.
        self.order_uid = order_uid
        super().__init__(f"no order {order_uid!r}")


class RejectNotFound(OrderlibError):
    """No reject is stored for this position. Only the programs raise it, never a repository."""

    def __init__(self, position: str) -> None:
        #: TOPIC/PARTITION/OFFSET.
        self.position = position
        super().__init__(position)

    def __str__(self) -> str:
        return f"no reject {self.position!r}"


class FenceLost(OrderlibError):
    """The stored offsets differ from what this batch expected.

    Another consumer has handled its records, or this one has, in a COMMIT whose answer was lost; or a promoted
    standby lacks the last transactions. This call stores nothing. Only the consumer raises it, never a repository.
    """

    def __init__(self, partitions: Collection[tuple[str, int]], next_offsets: Mapping[_TopicPartition, int]) -> None:
        #: The partitions whose fence failed, as (topic, partition).
        self.partitions: frozenset[tuple[str, int]] = frozenset(partitions)
        #: The stored next offset of each partition, if it has one.
        self.next_offsets: dict[tuple[str, int], int] = dict(next_offsets.items())
        lost = ", ".join(f"{topic}[{partition}]" for topic, partition in sorted(self.partitions))
        super().__init__(f"the stored offsets of {lost} are not those that the batch expects")


class ConfigurationError(OrderlibError):
    """A setting, table, topic or privilege is missing or wrong: a retry cannot help until an operator corrects it.

    Also: a repository is closed or belongs to another process, or a transaction does not allow the call.
    """


class TopicRecreated(ConfigurationError):
    """The topic was deleted and created again, so its offsets begin at 0 again. Restart to read the new topic."""


class BreakerTripped(OrderlibError):
    """Nearly all of the last records were rejected: probably the wrong topic or release. The batch was rolled back."""


class InvalidQuery(OrderlibError, ValueError):
    """An argument of a query is invalid: change it. It says nothing about an order."""
