"""A schedule: consumers, a topic, a store and the failures between them, all decided by one seed.

There are no threads, and the clock is simulated. First, steps are random. Then all failures end, the consumers handle
the rest, and the result is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from orderlib.errors import DatabaseUnavailable, FenceLost, OrderlibError, TopicRecreated, TransactionConflict
from orderlib.ingestion.records import Classified, Record
from tests.simulation.invariants import Invariants, InvariantViolation
from tests.simulation.kafka import (
    GOOD,
    HEAVY,
    KEYED_UIDS,
    PARTITIONS,
    POISON,
    REFUSED,
    REJECTED_TOMBSTONE,
    TOMBSTONE,
    TOO_LARGE,
    UIDS,
    Entry,
    Fetched,
    Group,
    Topic,
)
from tests.simulation.process import MistakeError, Process
from tests.simulation.store import Bug, Operation, Step, Store

#: At most this number of consumers.
PROCESSES = 3

#: A schedule has at least STEPS random steps, and fewer than MORE_STEPS in addition.
STEPS, MORE_STEPS = 100, 150

#: One schedule uses this number of kinds of failures.
FAILURES_AT_ONCE = 5

#: After all failures have ended, this number of rounds must be enough.
ROUNDS = 200

#: Fatal errors that a schedule causes.
RIGHT_REVOKED = "permission denied for table items"
NOT_AUTHORIZED = "Kafka: topic authorization failed"
MISTAKE = "a mistake in the program"
FATAL = {RIGHT_REVOKED, NOT_AUTHORIZED, MISTAKE}

#: Everything that may occur in a schedule and is counted.
OCCURRENCES = {
    *(
        "COMMIT took effect late",
        "COMMIT without an answer",
        "Kafka unavailable",
        "PostgreSQL unavailable",
        "batch full",
    ),
    *("collected while the store works", "wrong lag"),
    *("blocker ended", "transaction conflict", "connection cut", "duplicate", "end reached", "fence lost", "frozen"),
    *(
        "frozen in its transaction",
        "gap at the end",
        "gap in the log",
        "good record",
        "heavy record",
        "killed after COMMIT",
    ),
    *("killed before COMMIT", "killed between batches", "killed in COMMIT", "offsets rewound", "partitions lost"),
    *("tombstone", "tombstone that was a reject", "stored after a tombstone", "erased by a redrive"),
    *("poison", "rebalance", "redrive", "redrive beside a newer version", "refused by PostgreSQL"),
    "reject accepted after a rewind",
    *("seek to a stored offset", "stall", "superseded", "stopped", "stopped in a batch", "too large"),
    *(
        "no answer while it stops",
        "batch aborted",
        "mistake in the program",
        "not authorized by Kafka",
        "privilege revoked",
        "waited to stop",
    ),
    *("topic id differs", "topic recreated", "two redrives at once", "version", "zombie", "zombie at the fence"),
}

_NAMES = {
    GOOD: "good record",
    HEAVY: "heavy record",
    POISON: "poison",
    REFUSED: "refused by PostgreSQL",
    TOO_LARGE: "too large",
    TOMBSTONE: "tombstone",
    REJECTED_TOMBSTONE: "tombstone that was a reject",
}
_KINDS = [GOOD] * 20 + [HEAVY, HEAVY, HEAVY, POISON, POISON, REFUSED, TOO_LARGE, TOO_LARGE, TOMBSTONE, TOMBSTONE]
_KINDS += [REJECTED_TOMBSTONE]
_UIDS = [uid for uid in range(UIDS) for _ in range(3 if uid < KEYED_UIDS else 1)]


class Simulator:
    """One schedule."""

    def __init__(self, seed: int, bug: Bug | None = None, print_line: Callable[[str], None] | None = None) -> None:
        self.rng = Random(seed)
        self._chance = self.rng.random
        self._print = print_line
        #: What occurred in this schedule.
        self.occurred: set[str] = set()
        self.now_s = 0.0
        self.healing = False
        self.kafka_unavailable = False
        #: The writer lacks a privilege; Kafka refuses the next fetch.
        self.revoked = False
        self.refusing = False
        #: Consumers accept what only a redrive accepted before.
        self._rules_relaxed = False
        self.bug = bug
        self.invariants = Invariants(self.count)
        self.store = Store(self.invariants, bug)
        self.group = Group(self._chance)
        self.processes: list[Process] = []
        #: Transactions whose client has ended or given up, and redrives.
        self.orphans: list[Operation] = []
        self.redrives: list[Operation] = []
        self._rewind_wanted = False
        self._started = 0
        self.topic = self._create_topic([self._below(3) for _ in range(PARTITIONS)])
        for _ in range(6):
            self._produce()

    def run(self) -> None:
        """Run the schedule. Raise InvariantViolation if the consumer breaks a promise."""
        for _ in range(1 + self._below(PROCESSES)):
            self._start()
        failures = [
            self._crash,
            self._cut,
            self._conflict,
            self._freeze,
            self._lose_heartbeats,
            self._lose,
            self._stall,
            self._postgres_outage,
            self._kafka_outage,
            self._request_stop,
            self._rebalance,
            self._recreate_topic,
            self._rewind,
            self._redrive,
            self._break,
        ]
        self.rng.shuffle(failures)
        ordinary = [self._turn] * 20 + [self._advance] * 20 + [self._produce] * 4 + [self._restore, self._start_anew]
        table = ordinary + failures[:FAILURES_AT_ONCE]
        size, chance = len(table), self._chance
        for _ in range(STEPS + self._below(MORE_STEPS)):
            self.now_s += chance() * 0.05
            table[int(chance() * size)]()
        self._heal()

    # What the processes call.

    def note(self, *words: object) -> None:
        """Print a line, in a replay."""
        if self._print is not None:
            self._print(f"{self.now_s:8.3f}  {' '.join(map(str, words))}")

    def count(self, name: str, *words: object) -> None:
        """Record that this occurred."""
        self.occurred.add(name)
        if self._print is not None:
            self.note("!", name, *words)

    def leave(self, process: Process) -> None:
        """A process exits by itself. It may leave a store task behind."""
        self.note(process.name, "leaves")
        self._abandon(process)
        self._remove(process)

    def on_end_reached(self, process: Process) -> None:
        """A process reports that it has reached the offsets to stop at."""
        self.count("end reached")
        reached = self.invariants.reached
        until = process.until or {}
        behind = [p for p, end in until.items() if reached[self.topic.topic_id, p.partition] < end]
        if behind and self.topic.number == 0:
            raise InvariantViolation(f"{process.name} reports that the end is reached, but not in {behind}")

    def on_fatal(self, process: Process, error: Exception) -> None:
        """A process receives an error that a retry cannot correct."""
        if isinstance(error, TopicRecreated):
            self.count("topic id differs")
        elif str(error) not in FATAL and self.topic.number == 0:
            raise InvariantViolation(f"{process.name} stops because of {error!r}")

    # Steps without failures.

    def _below(self, bound: int) -> int:
        return int(self._chance() * bound)

    def _any_process(self) -> Process | None:
        return self.processes[int(self._chance() * len(self.processes))] if self.processes else None

    def _create_topic(self, earliest: list[int]) -> Topic:
        number = len(self.invariants.topics)
        topic = Topic(number, earliest)
        self.invariants.on_topic_created(topic)
        return topic

    def _produce(self) -> None:
        """Append a few records, some with old contents, and gaps."""
        chance = self._chance
        for _ in range(1 + int(chance() * 4)):
            uid = _UIDS[int(chance() * len(_UIDS))]
            partition = uid % PARTITIONS if uid < KEYED_UIDS else int(chance() * PARTITIONS)
            log = self.topic.logs[partition]
            if chance() < 0.15:
                log.append(None)
                self.occurred.add("gap in the log")
            kind = _KINDS[int(chance() * len(_KINDS))]
            self.occurred.add(_NAMES[kind])
            log.append(Entry(uid, int(chance() * 3), kind, self.topic.number))
            if chance() < 0.1:
                log.append(log[-1])
                self.occurred.add("duplicate")
            if chance() < 0.1:
                log.append(Entry(uid, int(chance() * 3), kind, self.topic.number))
                self.occurred.add("version")
            if chance() < 0.1:
                log.append(None)
                self.occurred.add("gap at the end")

    def _turn(self) -> None:
        process = self._any_process()
        if process is not None and not process.frozen:
            process.turn()
            if process.core.stopping and process.operation is not None and self._chance() < 0.3:
                self.count("no answer while it stops")
                self.now_s += 6

    def _advance(self) -> None:
        busy = [process for process in self.processes if process.operation is not None and not process.frozen]
        which = self._below(len(busy) + len(self.redrives))
        if which < len(busy):
            self._advance_process(busy[which])
        elif self.redrives:
            self._advance_redrive(self.redrives[which - len(busy)])

    def _advance_process(self, process: Process) -> None:
        step = process.advance()
        if step is Step.WAITING and self._chance() < 0.3:
            self._terminate_blockers(process)
        elif isinstance(process.result, FenceLost):
            self.count("zombie at the fence" if process.kafka.is_zombie else "fence lost")

    def _terminate_blockers(self, process: Process) -> None:
        """A process has waited 5 s for a lock: the other consumers' backends that hold locks are terminated."""
        self.now_s += 5
        ended = self.orphans[:]
        self._end_orphans()
        for other in self.processes:
            if other is not process and other.operation is not None and other.operation.step is Step.WORKING:
                ended.append(other.operation)
                self._throw(other, DatabaseUnavailable("terminated"))
        if ended:
            self.count("blocker ended")
        self._throw(process, TransactionConflict("ended blockers") if ended else DatabaseUnavailable("a lock is held"))

    def _advance_redrive(self, operation: Operation) -> None:
        try:
            if self.store.unavailable:
                raise DatabaseUnavailable("down")
            operation.step = next(operation.steps)
        except (StopIteration, DatabaseUnavailable):
            operation.steps.close()
            self.redrives.remove(operation)

    def _start_anew(self) -> None:
        if self._rewind_wanted:
            self._rewind()
        elif len(self.processes) < PROCESSES:
            self._start()

    def _start(self) -> None:
        until = self.topic.ends() if self._chance() < 0.2 and not self.healing else None
        self._started += 1
        process = Process(self, f"consumer-{self._started}", self.rng, until)
        self.note(process.name, "starts", "" if until is None else f"until {until}")
        self.processes.append(process)
        self.group.join(process)

    def _restore(self) -> None:
        """End one failure."""
        choice = self._chance()
        self.revoked = False
        if choice < 0.3:
            self.store.unavailable = False
        elif choice < 0.5:
            self.kafka_unavailable = False
        elif choice < 0.6:
            self._end_orphans()
        else:
            self._wake()

    def _wake(self) -> None:
        for process in self.processes:
            if process.kafka.is_zombie:
                self.note(process.name, "is back")
                process.frozen = process.kafka.is_zombie = False
                process.kafka.inbox = [("revoked", partition.partition) for partition in sorted(process.kafka.assigned)]
                self.group.join(process)
                return

    # Failures.

    def _abandon(self, process: Process) -> None:
        """The process no longer waits for its store task. PostgreSQL may still continue it."""
        operation, process.operation = process.operation, None
        if operation is None:
            return
        if operation.step in {Step.COMMITTING, Step.WORKING} and self._chance() < 0.7:
            self.orphans.append(operation)
        else:
            operation.steps.close()

    def _end_orphans(self) -> None:
        """Roll abandoned transactions back, or let the COMMIT take effect if it was sent."""
        orphans, self.orphans = self.orphans, []
        for operation in orphans:
            if operation.step is Step.COMMITTING and self._chance() < 0.6:
                self.count("COMMIT took effect late")
                next(operation.steps)
            operation.steps.close()

    def _remove(self, process: Process) -> None:
        self.processes.remove(process)
        if not process.kafka.is_zombie:
            self.group.drop(process)

    def _throw(self, process: Process, error: OrderlibError) -> None:
        """The store task in progress fails now."""
        if process.operation is not None:
            process.operation.steps.close()
            process.finish(error)

    def _crash(self) -> None:
        """SIGKILL at any step of a store task, or between tasks."""
        process = self._any_process()
        if process is None:
            return
        step = process.operation.step if process.operation is not None else None
        when = {
            None: "between batches",
            Step.COMMITTING: "in COMMIT",
            Step.ANSWERING: "after COMMIT",
        }.get(step, "before COMMIT")
        self.count(f"killed {when}", process.name)
        self._abandon(process)
        self._remove(process)

    def _cut(self) -> None:
        """The connection is lost."""
        process = self._any_process()
        if process is None or process.operation is None or process.frozen:
            return
        after = process.operation.step in {Step.COMMITTING, Step.ANSWERING}
        self.count("COMMIT without an answer" if after else "connection cut", process.name)
        self._abandon(process)
        process.finish(DatabaseUnavailable("cut"))

    def _conflict(self) -> None:
        """The transaction in progress conflicts with another one."""
        process = self._any_process()
        if process is None or process.operation is None or process.frozen:
            return
        if process.operation.step is Step.WORKING:
            self.count("transaction conflict", process.name)
            self._throw(process, TransactionConflict("deadlock"))

    def _stall(self) -> None:
        """Nothing responds for a long time."""
        self.count("stall")
        self.now_s += 3 + 4 * self._chance()

    def _freeze(self) -> None:
        """SIGSTOP, until the group has removed the process."""
        process = self._any_process()
        if process is not None and not process.frozen:
            in_transaction = process.operation is not None and process.operation.step is Step.WORKING
            self.count("frozen in its transaction" if in_transaction else "frozen", process.name)
            process.frozen = True
            self._remove_from_group(process)

    def _lose_heartbeats(self) -> None:
        """The group receives no heartbeat and removes the process, which continues to work."""
        process = self._any_process()
        if process is not None and not process.kafka.is_zombie:
            self.count("zombie", process.name)
            self._remove_from_group(process)

    def _remove_from_group(self, process: Process) -> None:
        if not process.kafka.is_zombie:
            process.kafka.is_zombie = True
            process.kafka.inbox.clear()
            self.group.drop(process)

    def _lose(self) -> None:
        """The group has removed the process, which learns it at once."""
        process = self._any_process()
        if process is not None and not process.kafka.is_zombie:
            self.count("partitions lost", process.name)
            self._remove_from_group(process)
            self._wake()

    def _postgres_outage(self) -> None:
        self.count("PostgreSQL unavailable")
        self.store.unavailable = True
        self._end_orphans()
        for process in self.processes:
            if process.operation is not None:
                self._abandon(process)
                process.finish(DatabaseUnavailable("down"))
        self._end_orphans()

    def _kafka_outage(self) -> None:
        self.count("Kafka unavailable")
        self.kafka_unavailable = True

    def _request_stop(self) -> None:
        process = self._any_process()
        if process is not None and not process.stop_event.is_set():
            self.count("stopped in a batch" if process.operation is not None else "stopped", process.name)
            process.stop_event.set()

    def _rebalance(self) -> None:
        self.count("rebalance")
        self.group.rebalance()

    def _recreate_topic(self) -> None:
        """The topic is recreated, and has records at once."""
        if len(self.invariants.topics) < 3:
            self.count("topic recreated")
            self.topic = self._create_topic([0] * PARTITIONS)
            for _ in range(self._below(8)):
                self._produce()

    def classify(self, record: Record) -> Classified:
        """Return what a record is by the rules of now."""
        assert isinstance(record, Fetched)
        return record.redriven or record.classified if self._rules_relaxed else record.classified

    def _rewind(self) -> None:
        """An operator stops the group and moves offsets back when it has no members. Zombies are no members.

        The rules may be relaxed at the same time, so that some rejects are handled again and accepted.
        """
        if not self._rewind_wanted:
            self._rewind_wanted = True
            for process in self.group.members:
                process.stop_event.set()
            return
        if self.group.members:
            return
        moved = [key for key in self.store.offsets if key[0] == self.topic.topic_id and key not in self.store.locks]
        for topic_id, partition in moved:
            earliest, now = self.topic.earliest[partition], self.store.offsets[topic_id, partition]
            if now > earliest and self._chance() < 0.7:
                to = earliest + self._below(now - earliest)
                self.count("offsets rewound", partition, "to", to)
                self.store.offsets[topic_id, partition] = to
                self.invariants.on_rewind(topic_id, partition, to)
        self._rewind_wanted = False
        self._rules_relaxed = self._rules_relaxed or self._chance() < 0.7
        self._start()

    def _break(self) -> None:
        """Cause an error that a retry cannot correct."""
        kind = self._below(3)
        process = self._any_process()
        if kind == 0:
            self.count("privilege revoked")
            self.revoked = True
        elif kind == 1:
            self.count("not authorized by Kafka")
            self.refusing = True
        elif process is not None and process.operation is not None and not process.frozen:
            self.count("mistake in the program", process.name)
            self._abandon(process)
            process.finish(MistakeError(MISTAKE))

    def _redrive(self) -> None:
        if len(self.redrives) < 2 and self.store.rejects:
            self.count("two redrives at once" if self.redrives else "redrive")
            self.redrives.append(Operation(self.store.redrive()))

    # The end.

    def _heal(self) -> None:
        """End all failures. Then the consumers must handle everything correctly."""
        self.note("everything heals")
        self.healing, self.store.unavailable, self.kafka_unavailable, self._rewind_wanted = True, False, False, False
        self.revoked = self.refusing = False
        self._end_orphans()
        for _ in list(self.processes):
            self._wake()
        for _ in range(ROUNDS):
            if not self.processes:
                self._start()
            self._round()
            quiet = not self.redrives and not self.orphans and all(process.core.idle for process in self.processes)
            if quiet and self.invariants.all_handled(self.topic):
                break
        else:
            raise InvariantViolation(f"not everything is handled: {self.invariants.handled}, {self.topic.ends()}")
        for _ in range(2):
            self.redrives.append(Operation(self.store.redrive()))
            while self.redrives:
                self._advance_redrive(self.redrives[0])
        if any(process.kafka.paused for process in self.processes):
            raise InvariantViolation("the outage is over, and a consumer is still paused")
        self._stop_all()
        self.invariants.check_end(self.topic, self.store.orders, self.store.rejects, self.store.offsets)

    def _round(self) -> None:
        self.now_s += 0.06
        self._end_orphans()
        for process in self.processes[:]:
            process.turn()
            while process.operation is not None and process in self.processes:
                if process.advance() is Step.WAITING:
                    break
        for operation in self.redrives[:]:
            self._advance_redrive(operation)

    def _stop_all(self) -> None:
        for process in self.processes:
            process.stop_event.set()
        for _ in range(3):
            self._round()
        if self.processes:
            raise InvariantViolation(f"{[process.name for process in self.processes]} did not stop")
