"""Partitions move to other members: in a rebalance, in an outage, and while their consumer is frozen."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.support.accounting import assert_all_accounted_for, next_offsets, wait_until_handled
from tests.support.consumer_process import Consuming, consuming, consuming_through_proxy
from tests.support.databases import Database
from tests.support.locking import TABLE, locked
from tests.support.sending import Sender, uids
from tests.support.tcp_proxy import Moment
from tests.support.waiting import wait_for


def assigned(consumer: Consuming) -> set[str]:
    """Return every partition that was ever assigned to a consumer."""
    return {p for event in consumer.events("partitions_assigned") for p in event["next_offsets"]}


@pytest.mark.parametrize("members", [2, pytest.param(3, marks=pytest.mark.faults)])
def test_consumers_that_join_and_leave_under_load_share_the_work_and_duplicate_nothing(
    members: int, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with ExitStack() as running:
        first = running.enter_context(consuming(environ))
        others: list[Consuming] = []
        for version in range(1, 4 * members):
            sender.send_orders(uids("order", 600), version)
            if version < members:
                others.append(running.enter_context(consuming(environ)))
            elif version == 2 * members:
                wait_for(lambda: all(assigned(other) for other in others), 20)
                assert others[0].stop() == 0
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert sum(consumer.metric('orders_records_total{outcome="stored"}') for consumer in (first, *others[1:])) > 0
        for consumer in (first, *others[1:]):
            assert consumer.stop() == 0


@pytest.mark.faults
def test_the_partitions_of_a_killed_consumer_are_assigned_to_another(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with consuming(environ) as survivor, consuming(environ) as doomed:
        sender.send_orders(uids("order", 100))
        wait_for(lambda: bool(assigned(doomed)), 20)
        wait_until_handled(sender.manifest, database)
        doomed.kill()
        sender.send_orders(uids("order", 1000), version=2)
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert survivor.stop() == 0


@pytest.mark.faults
def test_a_frozen_consumer_is_replaced_and_does_no_harm_when_it_continues(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    """It holds the locks of its offset rows, in the middle of a COPY. Only the end of its backend releases them."""
    sender.send_orders(uids("order", 300))
    with consuming_through_proxy(environ, database) as (proxy, frozen):
        wait_until_handled(sender.manifest, database)
        before = next_offsets(database)
        proxy.set_trap(Moment.COPY)
        sender.send_orders(uids("order", 300), version=2)
        assert proxy.trapped.wait(30)
        frozen.freeze()
        proxy.thaw()
        with consuming(environ) as heir:
            sender.send_orders(uids("order", 100), version=3)
            wait_until_handled(sender.manifest, database)
            assert next_offsets(database).items() != before.items()
            assert heir.metric('orders_retries_total{cause="TransactionConflict"}') >= 1
            assert "frozen consumer" in heir.events("transaction_conflict")[0]["reason"]
            frozen.thaw()
            sender.send_orders(uids("order", 50), version=4)
            wait_until_handled(sender.manifest, database)
            wait_for(lambda: frozen.ready, 30)
            sender.send_orders(uids("order", 300), version=5)
            wait_until_handled(sender.manifest, database)
            assert_all_accounted_for(sender.manifest, database, environ)
            assert frozen.stop() == 0
            assert heir.stop() == 0


@pytest.mark.faults
def test_a_partition_revoked_and_assigned_again_in_an_outage_is_read(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    """Fetching is paused in an outage, and librdkafka keeps a partition paused that is revoked and assigned again."""
    sender.send_orders(uids("order", 50))
    with consuming(environ) as consumer:
        wait_until_handled(sender.manifest, database)
        with locked(database, TABLE):
            sender.send_orders(uids("order", 50), version=2)
            wait_for(lambda: bool(consumer.events("retrying")), 10)
            with consuming(environ) as visitor:
                wait_for(lambda: bool(assigned(visitor)), 20)
                visited = assigned(visitor)
                assert visitor.stop() == 0
        assert visited
        sender.send_orders(uids("order", 50), version=3)
        wait_until_handled(sender.manifest, database, within_s=20)
        assert_all_accounted_for(sender.manifest, database, environ)
        wait_for(lambda: consumer.ready, 20)
        assert consumer.stop() == 0
