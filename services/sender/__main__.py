"""``python -m services.sender``: generate or read orders and publish them."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from random import Random

from orderlib.entry_point import CONFIGURATION_STATUS, EXIT_DONE, EXIT_FAILED, StopEvent
from orderlib.errors import ConfigurationError
from orderlib.postgres.consumer_progress import ConsumerProgressRepository
from orderlib.postgres.pool import Pool
from services.kafka import REQUEST_TIMEOUT_S
from services.program import run_with_kafka, set_up_program
from services.sender.generate import generate_values
from services.sender.input_lines import lines, warn_about_invalid
from services.sender.manifest import Manifest
from services.sender.publish import Publisher
from services.sender.rate import RateLimiter
from services.sender.wait import SentRecords
from services.settings import KafkaSettings, database_url

#: How long to wait for acknowledgements after a signal.
STOP_TIMEOUT_S = 8.0

DESCRIPTION = """\
Publish orders to Kafka: generate reproducible ones (--seed), some of them invalid (--bad-rate), or send files unchanged
(--file). The key of each record is its order_uid, if it has a valid one.

Settings are environment variables: ORDERS_KAFKA_BOOTSTRAP_SERVERS, ORDERS_TOPIC, and ORDERS_KAFKA_X_Y for librdkafka's
property x.y. A record that is not acknowledged within 60 s counts as failed (ORDERS_KAFKA_MESSAGE_TIMEOUT_MS).
"""
EPILOG = f"""\
On Ctrl-C or SIGTERM it stops sending, waits up to {STOP_TIMEOUT_S:g} s for acknowledgements, and prints the result.
A signal alone is not a failure. It also ends the wait of --wait. After an error it does the same, and exits with the
status of the error.

Exit status: 0 every sent record is acknowledged, 1 some are not, or Kafka did not answer for {REQUEST_TIMEOUT_S:g} s,
{CONFIGURATION_STATUS}. With --wait, 0 also means that every record has an outcome, which may be
a reject, and 1 that some have none.
"""
DEFAULT_COUNT = 1000

#: The longest single wait, so that a signal takes effect soon.
_MAX_WAIT_S = 0.1
#: The rate limiter pauses at least this long: shorter pauses waste CPU. It then sends a few records at once.
_MIN_PAUSE_S = 0.005
_PROGRESS_EVERY_S = 0.2

#: ``--wait`` gives up after this time in which no record was handled.
NO_PROGRESS_S = 60.0
#: It queries again after this pause, which doubles up to the longest one while nothing changes.
_FIRST_POLL_S = 0.02
_LONGEST_POLL_S = 0.5

#: The time of the first seeded order; each following one is a second later.
_SEEDED_TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Run the sender and return its exit status."""
    options = _parse_options(arguments)
    settings = KafkaSettings.from_mapping(environ)
    reader_url = database_url(environ, "ORDERS_READER_URL") if options.wait else ""
    with contextlib.ExitStack() as stack:
        try:
            source = _open_input(options.file, stack)
            manifest = Manifest(options.manifest, source) if options.manifest else None
        except OSError as exc:
            raise ConfigurationError(f"{exc.filename}: {exc.strerror}") from exc
        if manifest is not None:
            stack.callback(manifest.close)
        values = _generated_values(options) if source is None else _input_values(options, source)
        sent_records = None
        if options.wait:
            progress = stack.enter_context(
                ConsumerProgressRepository(
                    Pool(reader_url, application_name="orderlib-sender", max_connections=4, timeout_s=5.0)
                )
            )
            progress.check()
            sent_records = SentRecords(progress, settings.topic)
        publisher = Publisher(settings, manifest, sent_records.add if sent_records else None)
        topic_id = publisher.check_topic()
        sending = _Sending(publisher, sent_records)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sending.stop())
        sending.send(values, options.rate)
        if sending.error is not None and not publisher.sent:
            raise sending.error
        if manifest is not None:
            # If nothing was sent, an older manifest must not remain.
            sending.attempt(manifest.empty)
        sending.wait_for_acknowledgements()
        if sent_records is not None:
            sending.attempt(lambda: sending.wait_until_handled(sent_records, topic_id))
        for number in (signal.SIGTERM, signal.SIGINT):
            # Nothing is left to wait for. A signal while Python exits would replace the exit status.
            signal.signal(number, signal.SIG_IGN)
        status = sending.report()
        if sending.error is not None:
            sys.stdout.flush()
            raise sending.error
        return status


def _open_input(path: str | None, stack: contextlib.ExitStack) -> int | None:
    """Return the file descriptor of the input; ``None`` if orders are generated. Raises OSError."""
    if path is None:
        return None
    if path != "-":
        return stack.enter_context(Path(path).open("rb")).fileno()
    if sys.stdin is None:
        raise ConfigurationError("--file -: standard input is closed")
    if sys.stdin.isatty():
        print("reading orders from the terminal, one per line; Ctrl-D ends the input", file=sys.stderr)
    return sys.stdin.fileno()


def _input_values(options: argparse.Namespace, source: int) -> Iterator[bytes | None]:
    values = lines(source, idle_s=_MAX_WAIT_S)
    return values if options.any else warn_about_invalid(values, "stdin" if options.file == "-" else options.file)


class _Sending:
    """One run of the sender, until its values end, or a signal or an error stops it."""

    def __init__(self, publisher: Publisher, sent_records: SentRecords | None) -> None:
        self._publisher = publisher
        self._sent_records = sent_records
        self._is_waiting = False
        self._stop_event = StopEvent()
        #: The first error. What was sent before must still be acknowledged, listed in the manifest and counted.
        self.error: Exception | None = None
        self._began_s = time.monotonic()
        self._shown_s = self._began_s if sys.stderr.isatty() else float("inf")

    def stop(self) -> None:
        """Send no more values."""
        self._stop_event.set()

    def attempt(self, step: Callable[[], None]) -> None:
        """Do a step. An error is kept, and stops the sender as a signal does."""
        try:
            step()
        except Exception as exc:  # noqa: BLE001  the caller raises it after the report
            self.error = self.error or exc
            self.stop()

    def send(self, values: Iterable[bytes | None], per_s: float | None) -> None:
        """Send the values at this rate, until they end, or a signal or an error stops it."""
        self.attempt(lambda: self._send(values, per_s))

    def _send(self, values: Iterable[bytes | None], per_s: float | None) -> None:
        limiter = RateLimiter(per_s, time.monotonic())
        for value in values:
            while (early_s := limiter.early_s(time.monotonic())) > 0 and not self._stop_event.is_set():
                self._wait(min(max(early_s, _MIN_PAUSE_S), _MAX_WAIT_S))
            if value is None:
                self._wait(0)
            else:
                while not self._stop_event.is_set() and not self._publisher.send(value):
                    self._show_progress()
                limiter.record_sent(time.monotonic())
            self._show_progress()
            if self._stop_event.is_set():
                return

    def wait_for_acknowledgements(self) -> None:
        """Wait until every sent record is acknowledged or failed.

        After a signal or an error, give up after ``STOP_TIMEOUT_S``.
        """
        deadline_s = None
        while self._publisher.unacknowledged:
            if deadline_s is None and self._stop_event.is_set():
                deadline_s = time.monotonic() + STOP_TIMEOUT_S
            if deadline_s is not None and time.monotonic() > deadline_s:
                self.attempt(self._publisher.purge)
                return
            self.attempt(lambda: self._wait(_MAX_WAIT_S))

    def wait_until_handled(self, sent_records: SentRecords, topic_id: str) -> None:
        """Wait until the consumer has handled every acknowledged record, or made no progress for a minute.

        After a signal or an error, ask once more and return.
        """
        self._is_waiting = True
        sent_records.set_topic_id(topic_id)
        progress_s, pause_s = time.monotonic(), _FIRST_POLL_S
        while True:
            if sent_records.refresh():
                progress_s, pause_s = time.monotonic(), _FIRST_POLL_S
            if not sent_records.waiting or time.monotonic() - progress_s > NO_PROGRESS_S:
                return
            self._show_progress()
            if self._stop_event.wait(pause_s):
                return
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)

    def report(self) -> int:
        """Print the result and return the exit status."""
        if self._shown_s < float("inf"):
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        print(self._sending_summary())
        status = EXIT_DONE
        if self._sent_records is not None:
            for line in self._sent_records.report():
                print(line)
            if self._sent_records.waiting:
                status = EXIT_FAILED
                print(f"error: {self._why_waiting(self._sent_records)}", file=sys.stderr)
        failed = self._publisher.sent - self._publisher.acknowledged
        if not failed:
            return status
        first = self._publisher.first_failure
        reason = f"the first: {first.str()} ({first.name()})" if first else "Kafka did not answer in time"
        print(f"error: {failed:,} of {self._publisher.sent:,} records not acknowledged; {reason}", file=sys.stderr)
        return EXIT_FAILED

    def _wait(self, timeout_s: float) -> None:
        self._publisher.wait(timeout_s)
        self._show_progress()

    def _show_progress(self) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s >= _PROGRESS_EVERY_S:
            self._shown_s = now_s
            print(f"\r\x1b[K{self._summary()}", end="", file=sys.stderr, flush=True)

    def _why_waiting(self, sent_records: SentRecords) -> str:
        reason = "a signal ended the wait" if self.error is None else "an error ended the wait"
        if not self._stop_event.is_set():
            reason = f"no progress for {NO_PROGRESS_S:g} s"
            reason += f": {sent_records.outage}" if sent_records.outage else "; is a consumer running?"
        return f"{sent_records.waiting:,} of {sent_records.total:,} records not handled; {reason}"

    def _summary(self) -> str:
        if self._sent_records is None or not self._is_waiting:
            return self._sending_summary()
        return f"sent {self._publisher.sent:,}, {self._sent_records.summary()}"

    def _sending_summary(self) -> str:
        publisher, seconds = self._publisher, time.monotonic() - self._began_s
        return (
            f"sent {publisher.sent:,} in {seconds:.1f} s ({publisher.sent / max(seconds, 0.001):,.0f}/s), "
            f"acknowledged {publisher.acknowledged:,}, failed {publisher.failed:,}"
        )


def _parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m services.sender",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=_count, metavar="N", help=f"number of orders to generate ({DEFAULT_COUNT})")
    parser.add_argument("--seed", metavar="S", help="generate reproducible orders: the same S gives the same bytes")
    parser.add_argument(
        "--bad-rate",
        type=_fraction,
        metavar="0..1",
        help="fraction of generated orders to make invalid, each in one way (0)",
    )
    parser.add_argument("--rate", type=_rate, metavar="PER_S", help="records per second (unlimited)")
    parser.add_argument(
        "--file",
        metavar="F",
        help="send the lines of a file (- is stdin) unchanged, one order per line. Only \\n ends a line; the last line "
        "may lack it. Lines that are not orders are sent, with a warning. If the first line is not an order, nothing "
        "is sent",
    )
    parser.add_argument(
        "--any",
        action="store_true",
        help="with --file: send lines that are not orders without a warning, also the first; an empty line is an empty "
        "value",
    )
    parser.add_argument(
        "--manifest",
        metavar="F",
        help="write a JSON line for each acknowledged record to this file. It replaces an older manifest, never "
        "another file",
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="wait until the consumer has handled every acknowledged record, and report how many were rejected and why "
        f"(ORDERS_READER_URL). Gives up after {NO_PROGRESS_S:g} s without progress",
    )
    options = parser.parse_args(arguments)
    for name in ("file", "manifest"):
        if getattr(options, name) == "":
            parser.error(f"--{name} is empty")
    if options.file is not None:
        for name in ("count", "seed", "bad_rate"):
            if getattr(options, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is for generated orders, not for --file")
    elif options.any:
        parser.error("--any is for --file")
    if options.manifest == "-":
        parser.error("--manifest must be a file: stdout has the summary")
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 15:
        raise argparse.ArgumentTypeError("must be an integer from 0 to 999999999999999")
    return int(text)


def _fraction(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError("must be a number from 0 to 1")


def _rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError("must be a number above 0")


def _generated_values(options: argparse.Namespace) -> Iterator[bytes]:
    if options.seed is None:
        rng, clock = Random(), lambda: dt.datetime.now(dt.UTC)  # noqa: S311 - generated orders, no secret
    else:
        seconds = itertools.count()
        seed = options.seed.encode(errors="surrogateescape")
        rng, clock = Random(seed), lambda: _SEEDED_TIME + dt.timedelta(seconds=next(seconds))  # noqa: S311 - as above
    count = DEFAULT_COUNT if options.count is None else options.count
    return itertools.islice(generate_values(rng, clock, options.bad_rate or 0.0), count)


if __name__ == "__main__":
    set_up_program(os.environ)
    run_with_kafka(lambda: main(sys.argv[1:], os.environ))
