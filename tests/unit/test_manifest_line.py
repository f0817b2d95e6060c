"""Lines of the sender's manifest, as ``admin reconcile`` reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from orderlib.errors import ConfigurationError
from services.admin.reconcile import _read_manifest

LINE = b'{"topic":"orders","partition":1,"offset":5,"order_uid":"a","sha256":"00"}\n'


def test_the_lines_of_a_topic_are_read_by_position_and_those_without_an_offset_apart(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    path.write_bytes(LINE + LINE.replace(b"orders", b"others") + LINE.replace(b":5", b":null"))
    manifest, without_offset, other_topics = _read_manifest(path, "orders")
    assert [(key, acknowledged.order_uid) for key, acknowledged in manifest.items()] == [((1, 5), "a")]
    assert [(finding.order_uid, finding.partition) for finding in without_offset] == [("a", 1)]
    assert other_topics == 1


def test_a_manifest_of_other_topics_only_is_a_configuration_error(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    path.write_bytes(LINE)
    with pytest.raises(ConfigurationError, match="none of its lines is of topic 'others'"):
        _read_manifest(path, "others")
    path.write_bytes(b"")
    assert _read_manifest(path, "others") == ({}, [], 0)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"null",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        LINE.replace(b'"topic":"orders",', b""),
        LINE.replace(b"1", b"1.5"),
        LINE.replace(b":5", b":true"),
        LINE.replace(b'"00"', b"null"),
        LINE.replace(b'"a"', b"7"),
    ],
    ids=lambda line: line[:70],
)
def test_anything_else_is_named_with_its_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "manifest"
    path.write_bytes(LINE + line + (b"" if line else b"\n"))
    with pytest.raises(ConfigurationError, match=r": line 2 is not a line of a manifest$"):
        _read_manifest(path, "orders")
