"""``reconcile``: prove that every record is accounted for."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import attrs

from orderlib.commands import APPLICATION_NAME, Commands
from orderlib.entry_point import EXIT_DONE, EXIT_FAILED
from orderlib.errors import ConfigurationError
from orderlib.ingestion.reconcile import MAX_EXAMPLES, MAX_FINDINGS, Finding, NotProved, Reconciliation, TopicState
from orderlib.ingestion.records import Record, classify_record
from orderlib.postgres.snapshot import snapshot
from services.admin.output import ProgressLine, add_json_option, count_of, printable
from services.admin.topic_reader import TopicReader
from services.manifest_line import ManifestLine
from services.settings import KafkaSettings, database_url, max_record_bytes

T = TypeVar("T")

#: How many discrepancies are printed for people, and how many orders with records in several partitions are named.
#: All are counted.
_SHOWN = 100


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "reconcile",
        help="prove that every record is accounted for",
        description="Read the topic below the stored offsets and compare it with one snapshot of the database "
        "(ORDERS_READER_URL), in both directions: every invalid record is a reject and every reject an invalid record; "
        "every order equals, field by field, the last valid record of one of its partitions. Exits 1 if there are "
        f"discrepancies. Counts all of them and lists the first {_SHOWN} (--json: {MAX_FINDINGS:,}). Also shows what "
        "cannot be proved, such as orders saved from Python. The consumer may run meanwhile. Records of forgotten "
        "orders are counted. A purged reject that no redrive has solved is a discrepancy while Kafka still has its "
        "record.",
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="a manifest of the sender: its records must be in Kafka unchanged; reading begins at its first records",
    )
    add_json_option(parser)
    parser.set_defaults(command=_reconcile)


@attrs.frozen(kw_only=True)
class _Acknowledged:
    """A record in a sender's manifest."""

    order_uid: str | None
    sha256: str


_Manifest = dict[tuple[int, int], _Acknowledged]

_WITHOUT_OFFSET = "acknowledged, but the sender could not know its offset"
_OF_OTHER_TOPICS = "lines of the manifest that are of other topics"
_COMPACTION_UNKNOWN = "that Kafka does not compact the topic: the ACL DescribeConfigs is missing"


def _read_manifest(path: Path, topic: str) -> tuple[_Manifest, list[Finding], int]:
    """Return the lines of this topic by partition and offset, those without an offset, and how many others there are.

    Raises ConfigurationError if there are others only.
    """
    manifest: _Manifest = {}
    without_offset: list[Finding] = []
    number = other_topics = 0
    try:
        with path.open("rb") as lines:
            for number, text in enumerate(lines, start=1):  # noqa: B007  the error names it
                line = ManifestLine.decode(text)
                if line.topic != topic:
                    other_topics += 1
                elif line.offset is None:
                    without_offset.append(
                        Finding(what=_WITHOUT_OFFSET, order_uid=line.order_uid, partition=line.partition)
                    )
                else:
                    acknowledged = _Acknowledged(order_uid=line.order_uid, sha256=line.sha256)
                    manifest[line.partition, line.offset] = acknowledged
    except OSError as exc:
        raise ConfigurationError(f"{path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConfigurationError(f"{path}: line {number} is not a line of a manifest") from exc
    if other_topics == number > 0:
        raise ConfigurationError(f"{path}: none of its lines is of topic {topic!r}")
    return manifest, without_offset, other_topics


@attrs.define
class _Bounded(Generic[T]):
    """The first elements that were added, and how many there were."""

    _limit: int
    listed: list[T] = attrs.field(factory=list, init=False)
    total: int = attrs.field(default=0, init=False)

    def add(self, elements: Iterable[T]) -> None:
        for element in elements:
            self.total += 1
            if len(self.listed) < self._limit:
                self.listed.append(element)


def _reconcile(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    url = database_url(environ, "ORDERS_READER_URL")
    max_bytes = max_record_bytes(environ)
    topic_reader = TopicReader(KafkaSettings.from_mapping(environ))
    manifest, without_offset, other_topics = (
        _read_manifest(options.manifest, topic_reader.topic) if options.manifest else (None, [], 0)
    )
    # Read before the snapshot: Kafka may delete more records while the consumer handles others.
    earliest = topic_reader.earliest()
    findings, several_partitions = _Bounded[Finding](MAX_FINDINGS), _Bounded[str](_SHOWN)
    with snapshot(url, APPLICATION_NAME) as stored:
        offsets = stored.offsets()
        next_offsets = {
            offset.partition: offset.next_offset for offset in offsets if offset.topic_id == topic_reader.topic_id
        }
        if not next_offsets and not stored.has_topic(topic_reader.topic_id):
            raise ConfigurationError(
                f"nothing to compare: no record of topic {topic_reader.topic!r} was handled yet (topic id "
                f"{topic_reader.topic_id}, no stored offsets)"
            )
        is_compacted = topic_reader.is_compacted()
        topic = TopicState(
            topic=topic_reader.topic,
            topic_id=topic_reader.topic_id,
            earliest=earliest,
            ends=topic_reader.ends(),
            is_compacted=is_compacted is True,
        )
        start_offsets = _start_offsets(topic_reader.earliest(), next_offsets, manifest)
        digests = stored.forgotten(), stored.original_digests()
        proof = Reconciliation(topic, start_offsets, stored.group(), offsets, stored.rejects(), *digests)
        missing = dict(manifest or {})
        with ProgressLine("records read") as progress:
            for record in topic_reader.records(start_offsets, next_offsets):
                proof.on_record(record, classify_record(record, max_bytes))
                findings.add(_compare(record, missing))
                progress.at(proof.counts["records"])
        if manifest is not None:
            proof.counts["lines of the manifest"] = len(manifest) - len(missing)
        several_partitions.add(proof.several_partitions())
        proof.on_stored(stored.erased(), stored.orders(), stored.orphans())
    findings.add(proof.findings())
    findings.total += proof.unlisted
    findings.add(_explain_missing(missing, start_offsets, next_offsets))
    not_proved = list(proof.not_proved())
    if without_offset:
        examples = tuple(without_offset[:MAX_EXAMPLES])
        not_proved.append(NotProved(what=_WITHOUT_OFFSET, count=len(without_offset), examples=examples))
    if other_topics:
        not_proved.append(NotProved(what=_OF_OTHER_TOPICS, count=other_topics, examples=()))
    if is_compacted is None:
        not_proved.append(NotProved(what=_COMPACTION_UNKNOWN, count=1, examples=()))
    _report(options, proof, findings, several_partitions, not_proved)
    return EXIT_FAILED if findings.total else EXIT_DONE


def _start_offsets(
    earliest: Mapping[int, int], next_offsets: Mapping[int, int], manifest: _Manifest | None
) -> dict[int, int]:
    """Return where to begin in each partition: at its earliest record, or at the first record of the manifest."""
    if manifest is None:
        return dict(earliest)
    start_offsets = {partition: next_offsets.get(partition, offset) for partition, offset in earliest.items()}
    for partition, offset in manifest:
        start_offsets[partition] = max(earliest.get(partition, 0), min(start_offsets.get(partition, offset), offset))
    return start_offsets


def _compare(record: Record, missing: _Manifest) -> Iterator[Finding]:
    acknowledged = missing.pop((record.position.partition, record.position.offset), None)
    if acknowledged and hashlib.sha256(record.value or b"").hexdigest() != acknowledged.sha256:
        yield Finding(
            what="the value in Kafka differs from the acknowledged one",
            order_uid=acknowledged.order_uid,
            partition=record.position.partition,
            offset=record.position.offset,
        )


def _explain_missing(
    missing: _Manifest, start_offsets: Mapping[int, int], next_offsets: Mapping[int, int]
) -> Iterator[Finding]:
    for (partition, offset), acknowledged in missing.items():
        if offset >= next_offsets.get(partition, 0):
            what = "acknowledged, but not handled yet"
        elif offset < start_offsets.get(partition, 0):
            what = "acknowledged, but Kafka no longer has the record: its value cannot be compared"
        else:
            what = "acknowledged, but not in the topic"
        yield Finding(what=what, order_uid=acknowledged.order_uid, partition=partition, offset=offset)


def _report(
    options: argparse.Namespace,
    proof: Reconciliation,
    findings: _Bounded[Finding],
    several_partitions: _Bounded[str],
    not_proved: Sequence[NotProved],
) -> None:
    unread = [{"partition": p, "first": first, "next": next_offset} for p, first, next_offset in proof.unread_ranges()]
    if options.json:
        result = {
            "holds": not findings.total,
            "counts": proof.counts,
            "findings": [attrs.asdict(finding) for finding in findings.listed],
            "findings_total": findings.total,
            "several_partitions": several_partitions.listed,
            "several_partitions_total": several_partitions.total,
            "not_read": unread,
            "not_proved": [attrs.asdict(kind) for kind in not_proved],
        }
        print(json.dumps(result, indent=2))
        return
    lines = [", ".join(f"{what}: {count:,}" for what, count in proof.counts.items()) or "nothing to compare"]
    why = "they come before the records of the manifest" if options.manifest else "Kafka no longer has them"
    lines += (
        f"not proved, partition {gap['partition']}, offsets {gap['first']:,} to {gap['next'] - 1:,}: {why}"
        for gap in unread
    )
    for kind in not_proved:
        lines.append(f"not proved, {kind.count:,}: {kind.what}")
        lines += (f"  {attrs.evolve(finding, what='not proved')}" for finding in kind.examples)
        lines += [f"  … and {kind.count - len(kind.examples):,} more"] if kind.count > len(kind.examples) else []
    for order_uid in several_partitions.listed:
        lines.append(
            f"{order_uid}: has records in several partitions; its producer does not key by order_uid, or "
            "partitions were added"
        )
    if (unlisted := several_partitions.total - len(several_partitions.listed)) > 0:
        lines.append(f"… and {unlisted:,} more with records in several partitions")
    lines += map(str, findings.listed[:_SHOWN])
    if findings.total > _SHOWN:
        lines.append(f"… and {findings.total - _SHOWN:,} more")
    # order_uids may come from a damaged database or a manifest.
    print(printable("\n".join(line.replace("\n", "\\n") for line in lines)))
    done = count_of(findings.total, "discrepancy", "discrepancies") if findings.total else "everything is accounted for"
    print(done, file=sys.stderr)
