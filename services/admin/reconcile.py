"""``reconcile``: the proof that every record is accounted for."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

from orderlib.config import KafkaSettings, database_url, max_record_bytes
from orderlib.errors import BrokenSetup
from orderlib.ingest import Record, judge
from orderlib.postgres.connection import connect
from orderlib.postgres.operations import stored_offsets
from orderlib.postgres.snapshot import snapshot
from orderlib.program import EXIT_DONE, EXIT_FAILED
from orderlib.reconcile import Finding, Reconciliation
from services.admin.log import Log
from services.admin.output import Progress, add_json_option
from services.admin.schema import APPLICATION_NAME, Commands

#: Findings printed; all are counted.
_SHOWN = 100


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "reconcile",
        help="prove that every record is accounted for",
        description="Read the topic below the stored offsets, and compare it with one consistent look at the store "
        "(ORDERS_READER_URL): every refused record is kept, every order equals the last valid record of one of its "
        "partitions. Exits 1 and lists what does not hold. The consumer may run meanwhile. An order that was forgotten "
        "counts as not stored while Kafka still holds it.",
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="a sender's manifest: each record in it must be there, unchanged; reads from its first offsets on",
    )
    add_json_option(parser)
    parser.set_defaults(command=_reconcile)


@attrs.frozen(kw_only=True)
class _Acknowledged:
    """A line of a sender's manifest."""

    order_uid: str | None
    sha256: str


Manifest = dict[tuple[int, int], _Acknowledged]


def _read_manifest(path: Path, topic: str) -> Manifest:
    manifest: Manifest = {}
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, text in enumerate(lines, start=1):  # noqa: B007  named in the error
                line = json.loads(text)
                if line["topic"] == topic:
                    place = int(line["partition"]), int(line["offset"])
                    manifest[place] = _Acknowledged(order_uid=line["order_uid"], sha256=line["sha256"])
    except OSError as exc:
        raise BrokenSetup(f"{path}: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise BrokenSetup(f"{path}: line {number} is not of a manifest") from exc
    return manifest


def _reconcile(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    url = database_url(environ, "ORDERS_READER_URL")
    log = Log(KafkaSettings.from_mapping(environ))
    manifest = _read_manifest(options.manifest, log.topic) if options.manifest else None
    with connect(url, application_name=APPLICATION_NAME) as connection:
        groups = {offset.group for offset in stored_offsets(connection) if offset.topic_id == log.topic_id}
    if len(groups) != 1:
        raise BrokenSetup(f"no consumer group has stored offsets of topic {log.topic!r} yet")
    with snapshot(url, APPLICATION_NAME) as look:
        next_offsets = look.next_offsets(groups.pop(), log.topic_id)
        earliest = log.earliest()
        first = _first(earliest, next_offsets, manifest)
        proof = Reconciliation(log.topic_id, first, next_offsets, look.rejects(log.topic_id))
        progress = Progress("records read")
        missing = dict(manifest or {})
        findings: list[Finding] = []
        for record in log.records(first, next_offsets):
            proof.on_record(record, judge(record, max_record_bytes(environ)))
            findings += _compare(record, missing)
            progress.at(proof.counts["records"])
        progress.end()
        several = list(proof.several_partitions())
        for kept in look.orders():
            proof.on_stored(kept.order, kept.order_uid, kept.content_sha256, kept.source)
    findings += proof.findings()
    findings += _unaccounted(missing, earliest, next_offsets)
    _report(options, proof, findings, several)
    return EXIT_FAILED if findings else EXIT_DONE


def _first(earliest: Mapping[int, int], next_offsets: Mapping[int, int], manifest: Manifest | None) -> dict[int, int]:
    """Where to begin reading each partition: at its earliest record, or at the manifest's first."""
    if manifest is None:
        return dict(earliest)
    first = {partition: next_offsets.get(partition, offset) for partition, offset in earliest.items()}
    for partition, offset in manifest:
        first[partition] = max(earliest.get(partition, 0), min(first.get(partition, offset), offset))
    return first


def _compare(record: Record, missing: Manifest) -> Iterator[Finding]:
    acknowledged = missing.pop((record.source.partition, record.source.offset), None)
    if acknowledged and hashlib.sha256(record.value or b"").hexdigest() != acknowledged.sha256:
        yield Finding(
            what="Kafka holds another value than was acknowledged",
            order_uid=acknowledged.order_uid,
            partition=record.source.partition,
            offset=record.source.offset,
        )


def _unaccounted(missing: Manifest, earliest: Mapping[int, int], next_offsets: Mapping[int, int]) -> Iterator[Finding]:
    for (partition, offset), acknowledged in missing.items():
        if offset >= next_offsets.get(partition, 0):
            what = "acknowledged, and not handled yet"
        elif offset < earliest.get(partition, 0):
            what = "acknowledged, and not held by Kafka any more: its value cannot be read again"
        else:
            what = "acknowledged, and not in the topic"
        yield Finding(what=what, order_uid=acknowledged.order_uid, partition=partition, offset=offset)


def _report(
    options: argparse.Namespace,
    proof: Reconciliation,
    findings: list[Finding],
    several: list[str],
) -> None:
    unread = [{"partition": p, "first": first, "next": last} for p, first, last in proof.unread_ranges()]
    if options.json:
        result = {
            "holds": not findings,
            "counts": proof.counts,
            "findings": [attrs.asdict(finding) for finding in findings],
            "several_partitions": several,
            "not_read": unread,
        }
        print(json.dumps(result, indent=2))
        return
    print(", ".join(f"{count:,} {what}" for what, count in proof.counts.items()) or "nothing to compare")
    why = "they come before the manifest's" if options.manifest else "Kafka holds them no more"
    for gap in unread:
        print(f"[{gap['partition']}] {gap['first']:,} to {gap['next'] - 1:,} not proved: {why}")
    for order_uid in several[:_SHOWN]:
        print(f"{order_uid}: seen in several partitions; its sender does not key by order_uid")
    for finding in findings[:_SHOWN]:
        print(finding)
    if len(findings) > _SHOWN:
        print(f"… and {len(findings) - _SHOWN:,} more")
    print(f"{len(findings):,} things do not hold" if findings else "everything is accounted for", file=sys.stderr)
