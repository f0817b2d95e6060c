"""Settings of a role, a database, a server or an environment cannot change what programs and library do."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import Iterator

import attrs
import psycopg
import pytest
from confluent_kafka import Producer
from psycopg import postgres, pq, sql
from psycopg.adapt import AdaptersMap, Buffer, Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import set_json_loads
from psycopg.types.string import StrDumper

from orderlib import (
    ConfigurationError,
    Order,
    OrderRepository,
    Outcome,
    connect,
    connect_async,
    decode_order,
    encode_order,
    using,
    using_async,
)
from orderlib.postgres import queries
from orderlib.postgres.connections import open_connection
from orderlib.testing import SAMPLE
from tests.integration.test_postgres_repository import KafkaRecords
from tests.support.api_process import serving
from tests.support.databases import Database
from tests.support.over_asyncio import event_loop, over_asyncio
from tests.support.programs import run, succeed
from tests.support.repository_contract import REJECTED, REJECTION

#: An unusual value of every setting that we set and that its own session may change.
UNUSUAL = {
    "TimeZone": "America/St_Johns",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "client_encoding": "LATIN1",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "array_nulls": "off",
    "standard_conforming_strings": "off",
    "backslash_quote": "off",
    "transform_null_equals": "on",
    "quote_all_identifiers": "on",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "gin_fuzzy_search_limit": "1",
    "row_security": "off",
    "restrict_nonsystem_relation_kind": "view, foreign-table",
    "exit_on_error": "on",
    "check_function_bodies": "off",
    "createrole_self_grant": "set, inherit",
    "client_min_messages": "debug5",
    "synchronous_commit": "off",
}
#: Settings that none of the roles may change back: a program names the setting and stops.
FORBIDDEN = {
    "session_replication_role": "replica",
    "ignore_checksum_failure": "on",
    "zero_damaged_pages": "on",
}

#: Every other setting that a session may change, and why it is left alone.
LEFT_ALONE = {
    "plans, caches and parallel work": """
        constraint_exclusion cpu_index_tuple_cost cpu_operator_cost cpu_tuple_cost cursor_tuple_fraction
        debug_discard_caches debug_parallel_query default_statistics_target effective_cache_size
        effective_io_concurrency enable_async_append enable_bitmapscan enable_distinct_reordering enable_gathermerge
        enable_group_by_reordering enable_hashagg enable_hashjoin enable_incremental_sort enable_indexonlyscan
        enable_indexscan enable_material enable_memoize enable_mergejoin enable_nestloop enable_parallel_append
        enable_parallel_hash enable_partition_pruning enable_partitionwise_aggregate enable_partitionwise_join
        enable_presorted_aggregate enable_self_join_elimination enable_seqscan enable_sort enable_tidscan
        from_collapse_limit geqo geqo_effort geqo_generations geqo_pool_size geqo_seed geqo_selection_bias
        geqo_threshold hash_mem_multiplier io_combine_limit jit jit_above_cost jit_dump_bitcode jit_expressions
        jit_inline_above_cost jit_optimize_above_cost jit_tuple_deforming join_collapse_limit maintenance_io_concurrency
        maintenance_work_mem max_parallel_maintenance_workers max_parallel_workers max_parallel_workers_per_gather
        min_parallel_index_scan_size min_parallel_table_scan_size parallel_leader_participation parallel_setup_cost
        parallel_tuple_cost plan_cache_mode random_page_cost recursive_worktable_factor seq_page_cost
        synchronize_seqscans temp_buffers work_mem
    """,
    "logs and statistics": """
        application_name backtrace_functions compute_query_id debug_pretty_print debug_print_parse debug_print_plan
        debug_print_rewritten lc_messages log_duration log_error_verbosity log_executor_stats log_lock_failures
        log_lock_waits log_min_duration_sample log_min_duration_statement log_min_error_statement log_min_messages
        log_parameter_max_length log_parameter_max_length_on_error log_parser_stats log_planner_stats
        log_replication_commands log_statement log_statement_sample_rate log_statement_stats log_temp_files
        log_transaction_sample_rate md5_password_warnings stats_fetch_consistency trace_notify trace_sort
        track_activities track_cost_delay_timing track_counts track_functions track_io_timing track_wal_io_timing
        update_process_title
    """,
    "limits of an administrator: they end or refuse a statement and change none": """
        client_connection_check_interval deadlock_timeout idle_in_transaction_session_timeout idle_session_timeout
        lock_timeout max_stack_depth statement_timeout temp_file_limit transaction_timeout
    """,
    "where and how data is kept": """
        allow_in_place_tablespaces backend_flush_after commit_delay commit_siblings default_table_access_method
        default_tablespace default_toast_compression file_copy_method gin_pending_list_limit search_path
        synchronous_commit temp_tablespaces vacuum_buffer_usage_limit vacuum_cost_delay vacuum_cost_limit
        vacuum_cost_page_dirty vacuum_cost_page_hit vacuum_cost_page_miss vacuum_failsafe_age vacuum_freeze_min_age
        vacuum_freeze_table_age vacuum_max_eager_freeze_failure_rate vacuum_multixact_failsafe_age
        vacuum_multixact_freeze_min_age vacuum_multixact_freeze_table_age vacuum_truncate wal_compression
        wal_consistency_checking wal_init_zero wal_recycle wal_skip_threshold
    """,
    "what we do not use: text search, XML, locales, large objects, functions, event triggers, replication commands": """
        allow_system_table_mods debug_logical_replication_streaming default_text_search_config dynamic_library_path
        escape_string_warning event_triggers extension_control_path icu_validation_level lc_monetary lc_numeric lc_time
        lo_compat_privileges local_preload_libraries logical_decoding_work_mem output_plugin_libraries
        session_preload_libraries timezone_abbreviations wal_sender_timeout xmlbinary xmloption
    """,
    "the connection: set by its arguments": """
        tcp_keepalives_count tcp_keepalives_idle tcp_keepalives_interval tcp_user_timeout
    """,
    "passwords: bootstrap sends verifiers": "password_encryption scram_iterations",
    "the current transaction: its own BEGIN decides": """
        transaction_deferrable transaction_isolation transaction_read_only
    """,
}

ENVIRONMENT = {
    "PGDATESTYLE": "German",
    "PGTZ": "Asia/Kathmandu",
    "PGCLIENTENCODING": "SJIS",
    "PGAPPNAME": "another program",
    "PGOPTIONS": "-c bytea_output=escape -c array_nulls=off -c intervalstyle=iso_8601 -c exit_on_error=on",
    "PGGEQO": "off",
}


def set_everywhere(database: Database, settings: dict[str, str]) -> None:
    name = str(conninfo_to_dict(database.superuser_url)["dbname"])
    with psycopg.connect(database.superuser_url, autocommit=True) as connection:
        for setting, value in settings.items():
            connection.execute(
                sql.SQL("ALTER DATABASE {} SET {} = {}").format(
                    sql.Identifier(name),
                    sql.SQL(setting),
                    sql.SQL(", ").join(map(sql.Literal, value.split(", "))),
                )
            )


@pytest.fixture
def hostile(empty_database: Database) -> Database:
    """A database whose every session begins with unusual settings."""
    set_everywhere(empty_database, UNUSUAL)
    return empty_database


@pytest.fixture
def programs(environ: dict[str, str], hostile: Database) -> dict[str, str]:
    """Settings of programs for that database, in an environment that asks for unusual ones too."""
    return {**environ, **hostile.environ(), **ENVIRONMENT}


def some_orders() -> list[Order]:
    """Orders whose text and times depend on each of the settings."""
    order = decode_order(SAMPLE)
    edges = [
        dt.datetime(1, 1, 1, tzinfo=dt.UTC),
        dt.datetime(2024, 2, 3, 4, 5, 6, 789, tzinfo=dt.UTC),
        dt.datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=dt.UTC),
    ]
    return [
        attrs.evolve(
            order,
            order_uid=f"edge-{number}",
            date_created=edge,
            delivery=attrs.evolve(order.delivery, name='Ж \\ "NULL" \' 語 😀'),
        )
        for number, edge in enumerate(edges)
    ]


def test_every_setting_that_a_session_may_change_was_reviewed(empty_database: Database) -> None:
    with psycopg.connect(empty_database.superuser_url) as connection:
        # A dot: the setting of an extension.
        rows = connection.execute(
            "SELECT name FROM pg_settings WHERE context IN ('user', 'superuser') AND strpos(name, '.') = 0"
        ).fetchall()
    left_alone = [name for names in LEFT_ALONE.values() for name in names.split()]
    assert len(left_alone) == len(set(left_alone))
    required = set(queries.SESSION_SETTINGS)
    assert not required & set(left_alone)
    assert {name for (name,) in rows} == required | set(left_alone)
    assert required | {"synchronous_commit"} == UNUSUAL.keys() | FORBIDDEN.keys()


def test_a_new_session_has_the_required_settings(hostile: Database) -> None:
    with open_connection(hostile.superuser_url, application_name="tests") as connection:
        for name, wanted in queries.SESSION_SETTINGS.items():
            row = connection.execute("SELECT current_setting(%s)", [name]).fetchone()
            assert row == (wanted,), name
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)


def test_a_stronger_synchronous_commit_is_kept(empty_database: Database) -> None:
    set_everywhere(empty_database, {"synchronous_commit": "remote_apply"})
    with open_connection(empty_database.superuser_url, application_name="tests") as connection:
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("remote_apply",)


def test_every_program_works_with_any_initial_settings(programs: dict[str, str]) -> None:
    succeed("admin bootstrap", programs)
    succeed("admin migrate", programs)
    succeed("admin topics", programs)
    orders = some_orders()
    producer = Producer({"bootstrap.servers": programs["ORDERS_KAFKA_BOOTSTRAP_SERVERS"]})
    for order in orders:
        producer.produce(programs["ORDERS_TOPIC"], encode_order(order), key=order.order_uid, partition=0)
    # Keys, values and headers that read as something else, and a key and a value that are null.
    producer.produce(programs["ORDERS_TOPIC"], b"NULL", key=b"NULL", partition=0, headers=[("a\\'", b"NULL")])
    producer.produce(programs["ORDERS_TOPIC"], None, key=None, partition=1)
    producer.produce(programs["ORDERS_TOPIC"], b"\\x00\0", key=b"", partition=2, headers=[("", None)])
    assert producer.flush(30) == 0

    done = run("consumer --exit-at-end", programs)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

    for order in orders:
        assert decode_order(succeed(f"admin get {order.order_uid}", programs).encode()) == order
    assert len(json.loads(succeed("admin rejects list --json", programs))) == 3
    with open_connection(programs["ORDERS_BOOTSTRAP_URL"], application_name="tests") as connection:
        stored = connection.execute("SELECT key, value FROM rejects ORDER BY partition").fetchall()
    assert stored == [(b"NULL", b"NULL"), (None, None), (b"", b"\\x00\0")]
    with serving(programs) as api:
        for order in orders:
            assert decode_order(api.get(f"/orders/{order.order_uid}").body) == order
        assert len(api.get("/orders").json["orders"]) == len(orders)
    succeed("admin rejects redrive --all", programs)
    succeed("admin lag", programs)
    succeed("admin reconcile", programs)
    succeed("admin forget --yes edge-0", programs)
    succeed("admin rejects purge --older-than 1m --yes", programs)


@pytest.mark.parametrize("with_environment", [False, True])
def test_the_library_works_with_any_initial_settings(
    database: Database, monkeypatch: pytest.MonkeyPatch, with_environment: bool
) -> None:
    set_everywhere(database, UNUSUAL)
    if with_environment:
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
    orders = some_orders()
    with connect(database.writer_url) as repository:
        assert repository.save_many(orders) == {Outcome.STORED: 3}
        assert repository.save_many(orders) == {Outcome.DUPLICATE: 3}
        assert [repository.get(order.order_uid) for order in orders] == orders
        assert [found.order for found in reversed(repository.list_orders().orders)] == orders

    async def read() -> list[Order]:
        async with connect_async(database.reader_url) as reader:
            await reader.check()
            return [await reader.get(order.order_uid) for order in orders]

    assert asyncio.run(read()) == orders


class ReversedText(StrDumper):
    def dump(self, obj: str) -> bytes:
        return obj[::-1].encode()


class AnyText(Loader):
    format = pq.Format.BINARY

    def load(self, data: Buffer) -> str:
        return f"loaded {len(data)}"


@pytest.fixture
def with_own_adapters(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A database, for a program that has changed psycopg for all its connections."""
    adapters = AdaptersMap(postgres.adapters)
    adapters.register_dumper(str, ReversedText)
    for name in ("text", "int4", "int8", "bool", "timestamptz", "bytea", "float8", "json", "jsonb"):
        adapters.register_loader(name, AnyText)
        adapters.register_loader(name, type("AnyTextAsText", (AnyText,), {"format": pq.Format.TEXT}))
    monkeypatch.setattr(postgres, "adapters", adapters)
    set_json_loads(lambda data: f"JSON of {len(data)}")
    yield database
    set_json_loads(json.loads)


def test_adapters_that_a_program_registers_do_not_change_what_is_read(with_own_adapters: Database) -> None:
    database = with_own_adapters
    orders = some_orders()
    records = KafkaRecords(database)
    records.begin(5)
    records.handle(error=REJECTION)
    records.close()

    def use(repository: OrderRepository) -> None:
        assert set(repository.save_many(orders)) <= {Outcome.STORED, Outcome.DUPLICATE}
        assert [repository.get(order.order_uid) for order in orders] == orders
        assert {type(stored.order.date_created) for stored in repository.list_orders().orders} == {dt.datetime}
        assert [match.order.order_uid for match in repository.find(orders[0].order_uid)] == [orders[0].order_uid]
        assert repository.position_state("orders", 0, 5) == REJECTED
        assert repository.count(since=orders[0].date_created) == len(orders)
        assert repository.stats().rejects_by_code["invalid_order"] == 1
        repository.check()

    with connect(database.writer_url) as repository:
        use(repository)
    with psycopg.connect(database.writer_url) as connection:
        use(using(connection))
        # The program's own statements use its adapters.
        assert connection.execute("SELECT true, %s", ["ab"]).fetchone() == ("loaded 1", "loaded 2")
    with event_loop() as in_loop:

        async def open_connection_async() -> psycopg.AsyncConnection:
            return await psycopg.AsyncConnection.connect(database.writer_url)

        reader = connect_async(database.writer_url)
        use(over_asyncio(reader, in_loop))
        in_loop(reader.close())
        own = in_loop(open_connection_async())
        use(over_asyncio(using_async(own), in_loop))
        in_loop(own.close())


@pytest.mark.parametrize(("setting", "value"), FORBIDDEN.items())
def test_a_setting_that_only_a_superuser_may_change_back_is_refused_by_name(
    database: Database, environ: dict[str, str], setting: str, value: str
) -> None:
    set_everywhere(database, {setting: value})
    with pytest.raises(ConfigurationError, match=setting):
        open_connection(database.writer_url, application_name="tests")
    done = run("consumer", environ)
    assert done.returncode == 2
    assert setting in done.stderr
    assert "Traceback" not in done.stderr
