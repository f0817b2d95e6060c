"""What the sender makes up, reads and keys by, without a broker."""

from __future__ import annotations

import datetime as dt
import errno
import itertools
import json
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from subprocess import CompletedProcess
from typing import IO, Any, cast

import pytest
from confluent_kafka import Message

from orderlib.codecs import decode_order, encode_order, read_order_uid
from orderlib.entry_point import run
from orderlib.errors import BrokerUnavailable, ConfigurationError, DatabaseUnavailable, RejectedError
from orderlib.models import Delivery, Order
from orderlib.postgres.consumer_progress import ConsumerProgressRepository, RejectedRecord
from orderlib.testing import SAMPLE
from services.sender import wait
from services.sender.__main__ import _Sending, main
from services.sender.generate import generate_order, generate_values
from services.sender.input_lines import MAX_WARNINGS, lines, warn_about_invalid
from services.sender.manifest import Manifest
from services.sender.publish import Publisher
from services.sender.rate import CATCH_UP_S, RateLimiter
from services.sender.wait import SentRecords
from services.settings import KafkaSettings
from tests.support.fork_server import start

NOW = dt.datetime(2026, 11, 23, 12, 30, 15, 123456, tzinfo=dt.UTC)


def generate(count: int, seed: str = "seed") -> list[Order]:
    rng = Random(seed)
    return [generate_order(rng, lambda: NOW) for _ in range(count)]


def values(count: int, bad_rate: float, seed: str = "seed") -> list[bytes]:
    return list(itertools.islice(generate_values(Random(seed), lambda: NOW, bad_rate), count))


def test_every_generated_order_is_valid() -> None:
    for order in generate(3000):
        assert decode_order(encode_order(order)) == order


def test_the_sums_of_a_generated_order_add_up() -> None:
    for order in generate(1000):
        for item in order.items:
            assert item.total_price == item.price * (100 - item.sale) // 100
        payment = order.payment
        assert payment.goods_total == sum(item.total_price for item in order.items)
        assert payment.amount == payment.goods_total + payment.delivery_cost + payment.custom_fee


def test_a_generated_order_was_paid_shortly_before_its_date() -> None:
    for order in generate(1000):
        assert order.date_created == NOW
        assert 0 < NOW.timestamp() - order.payment.payment_dt < 180


def test_a_seed_reproduces_its_orders_and_another_seed_gives_others() -> None:
    assert values(200, 0.3) == values(200, 0.3)
    assert not set(values(200, 0)) & set(values(200, 0, seed="another"))


def test_generated_orders_have_different_order_uids() -> None:
    orders = generate(5000)
    assert len({order.order_uid for order in orders}) == len(orders)


def test_generated_orders_vary_like_those_of_a_shop() -> None:
    orders = generate(3000)
    assert len({order.payment.currency for order in orders}) >= 8
    assert len({order.delivery.name for order in orders}) >= 200
    assert len({item.name for order in orders for item in order.items}) >= 40
    counts = Counter(len(order.items) for order in orders)
    assert sum(counts[count] for count in range(1, 7)) > 0.9 * len(orders)
    assert max(counts) > 6
    paid_by_another_reference = sum(order.payment.transaction != order.order_uid for order in orders)
    assert 0.05 < paid_by_another_reference / len(orders) < 0.2


@pytest.mark.parametrize(
    "script", ["CYRILLIC", "CJK UNIFIED IDEOGRAPH", "HIRAGANA", "HEBREW", "LATIN SMALL LETTER E WITH", "APOSTROPHE"]
)
def test_names_are_written_in_many_scripts(script: str) -> None:
    names = {order.delivery.name for order in generate(500)}
    assert any(script in unicodedata.name(character) for name in names for character in name)


def test_a_customer_has_the_same_data_in_every_order() -> None:
    known: dict[str, Delivery] = {}
    for order in itertools.chain(generate(5000), generate(5000, seed="another")):
        assert known.setdefault(order.customer_id, order.delivery) == order.delivery
    assert len(known) < 8000


def test_an_article_costs_the_same_in_every_order_of_its_country() -> None:
    known: dict[tuple[str, int], int] = {}
    for order in generate(2000):
        for item in order.items:
            assert known.setdefault((order.locale, item.chrt_id), item.price) == item.price


def test_a_bad_rate_of_one_generates_only_invalid_orders() -> None:
    for value in values(500, 1.0):
        with pytest.raises(RejectedError):
            decode_order(value)


def test_the_fraction_of_invalid_orders_is_near_the_bad_rate() -> None:
    bad = 0
    for value in values(2000, 0.2):
        try:
            decode_order(value)
        except RejectedError:
            bad += 1
    assert 300 < bad < 500


def test_reading_the_order_uid_never_fails() -> None:
    for value in values(500, 1.0):
        read_order_uid(value)


@pytest.fixture
def lines_of() -> Iterator[Callable[[bytes], list[bytes | None]]]:
    with tempfile.TemporaryFile() as file:

        def read(content: bytes) -> list[bytes | None]:
            file.write(content)
            file.seek(0)
            return list(lines(file.fileno(), idle_s=1))

        yield read


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"one", [b"one"]),
        (b"one\n", [b"one"]),
        (b"one\n\n\ntwo", [b"one", b"", b"", b"two"]),
        (b"\n", [b""]),
        (b"dos\r\nmac\rform\x0cfeed\x85\xe2\x80\xa8", [b"dos\r", b"mac\rform\x0cfeed\x85\xe2\x80\xa8"]),
        (b" \0\xff \n", [b" \0\xff "]),
        (b"x" * 3_000_000 + b"\ny", [b"x" * 3_000_000, b"y"]),
    ],
)
def test_only_a_newline_ends_a_line(
    lines_of: Callable[[bytes], list[bytes | None]], content: bytes, expected: list[bytes]
) -> None:
    assert [line for line in lines_of(content) if line is not None] == expected


def test_waiting_for_a_line_returns_control_to_the_caller() -> None:
    reading, writing = os.pipe()
    found = lines(reading, idle_s=0.01)
    assert next(found) is None
    os.write(writing, b"ha")
    assert next(found) is None
    os.write(writing, b"lf\nrest")
    assert next(found) == b"half"
    os.close(writing)
    assert list(found) == [b"rest"]
    os.close(reading)


def test_a_line_without_end_returns_control_and_is_refused_at_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.sender.input_lines.MAX_LINE_BYTES", 3_000_000)
    with Path("/dev/zero").open("rb") as file:
        found = lines(file.fileno(), idle_s=1)
        assert next(found) is None
        with pytest.raises(ConfigurationError, match="longer than 3,000,000 bytes"):
            list(found)


def sending_times(limiter: RateLimiter, now_s: float, until_s: float, step_s: float) -> list[float]:
    """Return when records are sent if the limiter is checked every ``step_s``."""
    sent_s = []
    while now_s < until_s:
        while limiter.early_s(now_s) <= 0:
            limiter.record_sent(now_s)
            sent_s.append(now_s)
        now_s += step_s
    return sent_s


def test_the_rate_is_exact_even_with_coarse_waits() -> None:
    sent_s = sending_times(RateLimiter(300, 0.0), 0.0, 10.0, step_s=0.013)
    assert abs(len(sent_s) - 3000) < 10
    assert max(Counter(sent_s).values()) <= 5


def test_no_burst_follows_a_long_stall() -> None:
    limiter = RateLimiter(100, 0.0)
    limiter.record_sent(0.0)
    sent_s = sending_times(limiter, 60.0, 61.0, step_s=0.01)
    assert len(sent_s) <= 100 * (1.0 + CATCH_UP_S) + 2


def test_without_a_rate_every_record_is_due() -> None:
    limiter = RateLimiter(None, 5.0)
    for _ in range(1000):
        assert limiter.early_s(5.0) <= 0
        limiter.record_sent(5.0)


@pytest.mark.parametrize(
    "options",
    [
        "--count -1",
        "--count many",
        "--count 99999999999999999999",
        "--rate 0",
        "--rate nan",
        "--bad-rate 1.1",
        "--bad-rate nan",
        "--file - --count 5",
        "--file - --seed 0",
        "--file - --bad-rate 0",
        "--any",
        "--manifest -",
        "--manifest=",
        "--file=",
        "--fast",
        "orders.json",
    ],
)
def test_wrong_usage_exits_with_2(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(options.split(), {"ORDERS_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"})
    assert "usage: python -m services.sender" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "settings", "named"),
    [
        ("", {}, "ORDERS_KAFKA_BOOTSTRAP_SERVERS"),
        ("", {"ORDERS_KAFKA_ACKS": "0"}, "ORDERS_KAFKA_ACKS"),
        ("--file /no/such/file", {}, "/no/such/file: No such file"),
        ("--file /", {}, "/: Is a directory"),
        ("--manifest /no/such/folder/manifest", {}, "/no/such/folder/manifest: No such file"),
    ],
)
def test_a_configuration_error_is_one_line_and_exits_with_2(
    options: str, settings: dict[str, str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = settings if not options else {"ORDERS_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    assert run(lambda: main(options.split(), environ)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err


def test_a_seed_may_be_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.kafka.REQUEST_TIMEOUT_S", 0.1)
    with pytest.raises(BrokerUnavailable):
        main(["--seed", os.fsdecode(b"\xff")], {"ORDERS_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"})


@pytest.mark.parametrize("way", ["path", "symbolic link", "hard link", "stdin", "/dev/stdin"])
def test_a_manifest_that_is_the_input_is_refused_and_the_input_is_unchanged(way: str, tmp_path: Path) -> None:
    file, other = tmp_path / "orders.jsonl", tmp_path / "other"
    file.write_bytes(SAMPLE)
    if way == "symbolic link":
        other.symlink_to(file)
    elif way == "hard link":
        other.hardlink_to(file)
    source, manifest = {
        "path": (file, file),
        "stdin": ("-", file),
        "/dev/stdin": ("-", "/dev/stdin"),
    }.get(way, (file, other))
    with file.open("rb") as stdin:
        done = send("--file", str(source), "--manifest", str(manifest), stdin=stdin)
    assert done.returncode == 2
    assert done.stderr == f"error: {manifest}: --manifest and --file are the same file\n"
    assert file.read_bytes() == SAMPLE


@pytest.mark.parametrize("content", [SAMPLE, b"notes\n", b"\xff", b"[" * 100_000, b'{"topic":"orders"}\n'])
def test_a_file_that_is_not_a_manifest_is_never_replaced(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    done = send("--count", "1", "--manifest", str(file))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {file} exists and is not a manifest")
    assert file.read_bytes() == content


def test_a_manifest_keeps_its_lines_until_the_first_value_is_valid(tmp_path: Path) -> None:
    line = b'{"topic":"orders","partition":0,"offset":7,"order_uid":null,"sha256":"00"}\n'
    file, pretty = tmp_path / "manifest", tmp_path / "pretty.json"
    file.write_bytes(line)
    pretty.write_text(json.dumps(json.loads(SAMPLE), indent=2))
    for source in (tmp_path, tmp_path / "missing", pretty):
        done = send("--file", str(source), "--manifest", str(file))
        assert done.returncode in {1, 2}
        assert len(done.stderr.splitlines()) == 1
        assert file.read_bytes() == line


def test_the_manifest_cannot_be_the_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("wb") as stdout:
        done = send("--count", "1", "--manifest", str(out), stdout=stdout)
    assert done.returncode == 2
    assert "standard input, output or error" in done.stderr


def test_lines_that_are_not_orders_get_a_warning_and_are_sent(capsys: pytest.CaptureFixture[str]) -> None:
    values = [SAMPLE, None, b"", b'{"order_uid":"x"}', SAMPLE]
    assert list(warn_about_invalid(iter(values), "file")) == values
    warnings = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in warnings] == [
        "warning: file: line 2 is not an order",
        "warning: file: line 3 is not an order",
    ]
    assert "$.track_number: expected a string of 1 to 255 characters, found no value (and 12 more)" in warnings[1]


def test_many_lines_that_are_not_orders_get_a_limited_number_of_warnings_and_a_count(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(list(warn_about_invalid([SAMPLE, *[b"{"] * 250], "file"))) == 251
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == MAX_WARNINGS + 1
    assert warnings[-1] == f"warning: file: 250 lines are not orders; the first {MAX_WARNINGS} are listed above"


@pytest.mark.parametrize("first", [b"", b"{", b"[]", b"null", b"\xef\xbb\xbf" + SAMPLE, b"\x1f\x8b\x08"])
def test_a_file_whose_first_line_is_not_an_order_is_refused_before_sending(first: bytes) -> None:
    with pytest.raises(ConfigurationError, match=r"^file: line 1 is not an order \(.*--any"):
        next(warn_about_invalid([first, SAMPLE], "file"))


def send(*arguments: str, stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None) -> CompletedProcess[str]:
    """Run the sender without a Kafka."""
    environ = {**os.environ, "ORDERS_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    with tempfile.TemporaryFile() as stderr:
        process = start(
            ["sender", *arguments],
            environ,
            stdin=None if stdin is None else stdin.fileno(),
            stdout=None if stdout is None else stdout.fileno(),
            stderr=stderr.fileno(),
        )
        status = process.wait(60)
        stderr.seek(0)
        return CompletedProcess(arguments, status, stderr=stderr.read().decode())


class Reads:
    """What a database says about a consumer, for a while."""

    def __init__(self) -> None:
        self.next: dict[int, int] = {}
        self.rejects: list[tuple[int, RejectedRecord]] = []
        self.is_down = False

    def next_offsets(self, topic_id: str) -> dict[int, int]:
        return self.next if topic_id == "id" else {}

    def rejected_records(self, _topic_id: str, partition: int, first: int, last: int, limit: int) -> Any:
        if self.is_down:
            raise DatabaseUnavailable("PostgreSQL is down")
        found = [reject for found, reject in self.rejects if found == partition and first <= reject.offset <= last]
        return sorted(found, key=lambda reject: reject.offset)[:limit]


def sent_to(reads: Reads, offsets: Iterable[tuple[int, int | None]], topic_id: str = "id") -> SentRecords:
    records = SentRecords(cast("ConsumerProgressRepository", reads), "orders")
    for partition, offset in offsets:
        records.add(partition, offset)
    records.set_topic_id(topic_id)
    return records


def rejected(offset: int, code: str = "invalid_order", path: str | None = "$.entry") -> RejectedRecord:
    return RejectedRecord(offset=offset, code=code, first_path=path)


def test_outcomes_are_those_of_the_senders_own_records() -> None:
    """Records of other senders may be between them."""
    reads = Reads()
    records = sent_to(reads, [(0, 10), (0, 12), (0, 14), (1, 5)])
    assert not records.refresh()
    reads.next = {0: 14, 1: 5}
    reads.rejects = [(0, rejected(11)), (0, rejected(12)), (0, rejected(13)), (1, rejected(12))]
    assert records.refresh()
    assert not records.refresh()
    assert list(records.report()) == [
        "handled 1, rejected 1 (invalid_order 1), waiting 2",
        "rejected orders/0/12: invalid_order at $.entry",
    ]
    reads.next = {0: 15, 1: 6}
    assert records.refresh()
    assert records.summary() == "handled 3, rejected 1 (invalid_order 1), waiting 0"


def test_an_outage_while_rejects_are_read_counts_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "_REJECTS_AT_ONCE", 3)
    reads = Reads()
    records = sent_to(reads, [(0, offset) for offset in range(20)])
    reads.next = {0: 20}
    reads.rejects = [(0, rejected(offset, "malformed_json", None)) for offset in range(20)]
    reads.is_down = True
    assert not records.refresh()
    assert str(records.outage) == "PostgreSQL is down"
    assert records.waiting == 20
    reads.is_down = False
    assert records.refresh()
    assert records.outage is None
    summary, *named, more = records.report()
    assert summary == "handled 0, rejected 20 (malformed_json 20), waiting 0"
    assert named == [f"rejected orders/0/{offset}: malformed_json" for offset in range(10)]
    assert more == "and 10 more rejected records"


def test_offsets_of_an_older_topic_with_the_same_name_count_nothing_as_handled() -> None:
    reads = Reads()
    reads.next = {0: 1_000}
    records = sent_to(reads, [(0, 1)], topic_id="recreated")
    assert not records.refresh()
    assert records.waiting == 1


def test_a_record_without_a_known_offset_is_never_reported_as_handled() -> None:
    reads = Reads()
    reads.next = {0: 1_000}
    records = sent_to(reads, [(0, None), (0, 1)])
    records.refresh()
    assert records.summary() == "handled 1, rejected 0, waiting 1"


def test_an_acknowledgement_without_an_offset_is_in_the_manifest(tmp_path: Path) -> None:
    """It comes from the next leader, if a broker was lost after it had stored the record."""
    acknowledged: list[tuple[int, int | None]] = []
    path = tmp_path / "manifest"
    manifest = Manifest(str(path), None)
    settings = KafkaSettings.from_mapping({"ORDERS_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"})
    publisher = Publisher(settings, manifest, lambda *place: acknowledged.append(place))
    publisher._on_delivery(None, Message("orders", 2, -1001, b"key", b"value"))
    publisher.wait(0)
    manifest.close()
    assert acknowledged == [(2, None)]
    line = json.loads(path.read_text())
    assert (line["topic"], line["partition"], line["offset"], line["order_uid"]) == ("orders", 2, None, "key")
    Manifest(str(path), None).close()


def test_a_value_larger_than_the_queue_fails_and_does_not_wait_for_ever() -> None:
    environ = {"ORDERS_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1", "ORDERS_KAFKA_QUEUE_BUFFERING_MAX_KBYTES": "100"}
    publisher = Publisher(KafkaSettings.from_mapping(environ), None)
    assert publisher.send(bytes(200_000))
    assert (publisher.sent, publisher.failed, publisher.unacknowledged) == (1, 1, 0)
    assert publisher.first_failure is not None
    assert "ORDERS_KAFKA_QUEUE_BUFFERING_MAX_KBYTES" in publisher.first_failure.str()
    assert publisher.send(bytes(50_000))
    assert not publisher.send(bytes(200_000)), "it waits for the value before it"
    publisher.purge()
    assert publisher.send(bytes(200_000))
    assert (publisher.sent, publisher.failed) == (3, 3)


def test_a_manifest_that_was_full_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, is_full = os.write, [False, True, False]

    def write_a_part(file: int, data: bytes) -> int:
        if is_full.pop(0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:30])

    path = tmp_path / "manifest"
    manifest = Manifest(str(path), None)
    monkeypatch.setattr(os, "write", write_a_part)
    manifest.add(b"a line of twenty-five bytes\n")
    manifest.add(b"another\n")
    with pytest.raises(ConfigurationError, match="the manifest cannot be written: No space left on device"):
        manifest.write()
    manifest.write()
    manifest.close()
    assert path.read_bytes() == b"a line of twenty-five bytes\nanother\n"


class SlowKafka:
    """A publisher to a Kafka that acknowledges a record at each wait, or none."""

    def __init__(self, *, acknowledges: bool) -> None:
        self.acknowledges = acknowledges
        self.sent = self.acknowledged = self.failed = 0
        self.first_failure = None

    @property
    def unacknowledged(self) -> int:
        return self.sent - self.acknowledged - self.failed

    def send(self, _value: bytes) -> bool:
        self.sent += 1
        return True

    def wait(self, _timeout_s: float) -> None:
        self.acknowledged += self.acknowledges

    def purge(self) -> None:
        self.failed = self.unacknowledged


def values_that_end_with(error: Exception) -> Iterator[bytes]:
    yield from [SAMPLE] * 3
    raise error


@pytest.mark.parametrize(("acknowledges", "result"), [(True, "3, failed 0"), (False, "0, failed 3")])
def test_after_an_error_the_sender_still_waits_for_acknowledgements_and_reports(
    acknowledges: bool, result: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("services.sender.__main__.STOP_TIMEOUT_S", 0.01)
    sending = _Sending(cast("Publisher", SlowKafka(acknowledges=acknowledges)), None)
    sending.send(values_that_end_with(OSError("disk")), None)
    sending.wait_for_acknowledgements()
    sending.report()
    assert str(sending.error) == "disk"
    assert capsys.readouterr().out.endswith(f"acknowledged {result}\n")


def test_a_manifest_that_cannot_be_emptied_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_file: int, _length: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    manifest = Manifest(str(tmp_path / "manifest"), None)
    monkeypatch.setattr(os, "ftruncate", fail)
    with pytest.raises(ConfigurationError, match="the manifest cannot be written: Input/output error"):
        manifest.empty()
    manifest.close()


def test_wait_needs_the_reader() -> None:
    with pytest.raises(ConfigurationError, match="ORDERS_READER_URL is not set"):
        main(["--wait"], {"ORDERS_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"})
