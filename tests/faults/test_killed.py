"""The consumer is killed at any moment: each record of its batch is handled once, by it or by the next consumer."""

from __future__ import annotations

import pytest

from tests.support.accounting import assert_all_accounted_for, wait_until_handled
from tests.support.consumer_process import consuming
from tests.support.databases import Database
from tests.support.sending import Sender, uids
from tests.support.tcp_proxy import Moment, TcpProxy


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(Moment.BEGIN, id="after-poll", marks=pytest.mark.faults),
        pytest.param(Moment.COPY, id="in-the-transaction"),
        pytest.param(Moment.COMMIT, id="before-commit", marks=pytest.mark.faults),
        pytest.param(Moment.COMMITTED, id="after-commit", marks=pytest.mark.faults),
    ],
)
def test_the_batch_of_a_killed_consumer_is_handled_by_the_next(
    moment: Moment, member: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 300))
    with TcpProxy(database.writer_url) as proxy:
        with consuming({**member, "ORDERS_DATABASE_URL": proxy.url}) as consumer:
            wait_until_handled(sender.manifest, database)
            proxy.set_trap(moment)
            sender.send_orders(uids("order", 500), version=2)
            sender.send_bad(b"{")
            assert proxy.trapped.wait(30)
            consumer.kill()
        proxy.drop()
        sender.send_orders(uids("order", 100), version=3)
        with consuming(member) as successor:
            wait_until_handled(sender.manifest, database)
            assert_all_accounted_for(sender.manifest, database, member)
            assert successor.stop() == 0
