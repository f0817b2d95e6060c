"""Settings: an error names the missing or wrong variable, and no secret is shown."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import pytest

from orderlib import ConfigurationError
from orderlib.ingestion.records import Tombstones
from services.admin.__main__ import main as admin
from services.settings import (
    RESERVED_KAFKA_PROPERTIES,
    Address,
    ApiSettings,
    ConsumerSettings,
    KafkaSettings,
    database_url,
    max_record_bytes,
    misspelt_settings,
)
from tests.support.programs import run

SECRET = "s3cr3t-9"

KAFKA = {"ORDERS_KAFKA_BOOTSTRAP_SERVERS": "kafka:9092"}
CONSUMER = {**KAFKA, "ORDERS_DATABASE_URL": f"postgresql://orders_writer:{SECRET}@db/orders"}
API = {"ORDERS_READER_URL": f"postgresql://orders_reader:{SECRET}@db/orders", "ORDERS_API_TOKENS": f"shop:{SECRET}"}

Read = Callable[[Mapping[str, str]], object]


def test_the_consumer_needs_two_settings_and_has_defaults_for_the_rest() -> None:
    settings = ConsumerSettings.from_mapping(CONSUMER)
    assert settings.kafka.client_properties() == {
        "bootstrap.servers": "kafka:9092",
        "allow.auto.create.topics": "false",
    }
    assert (settings.kafka.topic, settings.group) == ("orders", "order-consumer")
    assert settings.max_record_bytes == 8 * 1024 * 1024
    assert str(settings.metrics_bind) == "127.0.0.1:9101"
    assert settings.breaker_fraction == 0.95
    assert settings.database_url == CONSUMER["ORDERS_DATABASE_URL"]


def test_every_setting_of_the_consumer_is_read() -> None:
    settings = ConsumerSettings.from_mapping(
        {
            **CONSUMER,
            "ORDERS_TOPIC": "other",
            "ORDERS_CONSUMER_GROUP": "other-group",
            "ORDERS_MAX_RECORD_BYTES": "1000",
            "ORDERS_METRICS_BIND": "[::1]:0",
            "ORDERS_BREAKER_FRACTION": "0",
            "ORDERS_TOMBSTONES": "erase",
        }
    )
    assert settings.tombstones is Tombstones.ERASE
    assert (settings.kafka.topic, settings.group, settings.max_record_bytes) == ("other", "other-group", 1000)
    assert (settings.metrics_bind, settings.breaker_fraction) == (Address(host="[::1]", port=0), 0)


def test_an_empty_setting_counts_as_not_set() -> None:
    empty = dict.fromkeys(("ORDERS_TOPIC", "ORDERS_MAX_RECORD_BYTES", "ORDERS_KAFKA_SSL_CA_LOCATION"), "")
    settings = ConsumerSettings.from_mapping({**CONSUMER, **empty})
    assert (settings.kafka.topic, settings.max_record_bytes) == ("orders", 8 * 1024 * 1024)
    assert "ssl.ca.location" not in settings.kafka.properties


@pytest.mark.parametrize(
    "servers",
    [
        *("kafka", "kafka_1:9092,", "a.example.com:9093,b.example.com:9093", "a:1, b:2", "10.0.0.1:9092", "[::1]:9092"),
        *("SASL_SSL://kafka:9093", "ssl://kafka:9093,plaintext://kafka:9092"),
    ],
)
def test_the_servers_of_kafka_are_what_librdkafka_accepts(servers: str) -> None:
    settings = KafkaSettings.from_mapping({"ORDERS_KAFKA_BOOTSTRAP_SERVERS": servers})
    assert settings.client_properties()["bootstrap.servers"] == servers


@pytest.mark.parametrize("name", ["SASL_MECHANISM", "SASL_MECHANISMS"])
def test_oauthbearer_without_a_source_of_tokens_is_a_configuration_error(name: str) -> None:
    """librdkafka would wait for a token that nobody gives it, as in an outage."""
    without = {**KAFKA, f"ORDERS_KAFKA_{name}": "OAUTHBEARER"}
    with pytest.raises(ConfigurationError, match="ORDERS_KAFKA_SASL_OAUTHBEARER_METHOD"):
        KafkaSettings.from_mapping(without)
    KafkaSettings.from_mapping({**without, "ORDERS_KAFKA_SASL_OAUTHBEARER_METHOD": "oidc"})


def test_any_property_of_librdkafka_can_be_set() -> None:
    settings = KafkaSettings.from_mapping(
        {**KAFKA, "ORDERS_KAFKA_SASL_PASSWORD": SECRET, "ORDERS_KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "PATH": "/bin"}
    )
    assert settings.client_properties() == {
        "bootstrap.servers": "kafka:9092",
        "sasl.password": SECRET,
        "security.protocol": "SASL_SSL",
        "allow.auto.create.topics": "false",
    }


@pytest.mark.parametrize("name", sorted(RESERVED_KAFKA_PROPERTIES))
def test_a_property_that_a_promise_depends_on_cannot_be_set(name: str) -> None:
    variable = f"ORDERS_KAFKA_{name.upper().replace('.', '_')}"
    with pytest.raises(ConfigurationError, match=variable) as error:
        KafkaSettings.from_mapping({**KAFKA, variable: SECRET})
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "name", ["group.id", "enable.auto.commit", "isolation.level", "auto.offset.reset", "acks", "enable.idempotence"]
)
def test_the_most_important_properties_are_reserved(name: str) -> None:
    assert name in RESERVED_KAFKA_PROPERTIES


@pytest.mark.parametrize(
    ("read", "complete", "variable"),
    [
        (ConsumerSettings.from_mapping, CONSUMER, "ORDERS_DATABASE_URL"),
        (ConsumerSettings.from_mapping, CONSUMER, "ORDERS_KAFKA_BOOTSTRAP_SERVERS"),
        (ApiSettings.from_mapping, API, "ORDERS_READER_URL"),
        (ApiSettings.from_mapping, API, "ORDERS_API_TOKENS"),
        (lambda environ: database_url(environ, "ORDERS_MIGRATOR_URL"), CONSUMER, "ORDERS_MIGRATOR_URL"),
    ],
)
@pytest.mark.parametrize("nothing", [{}, {"": ""}])
def test_an_error_names_the_missing_setting(
    read: Read, complete: Mapping[str, str], variable: str, nothing: Mapping[str, str]
) -> None:
    without = {name: value for name, value in complete.items() if name != variable}
    with pytest.raises(ConfigurationError, match=f"{variable} is not set"):
        read({**without, **({variable: ""} if nothing else {})})


@pytest.mark.parametrize(
    ("read", "variable"),
    [
        (ConsumerSettings.from_mapping, "ORDERS_DATABASE_URL"),
        (ApiSettings.from_mapping, "ORDERS_READER_URL"),
        (lambda environ: database_url(environ, "ORDERS_MIGRATOR_URL"), "ORDERS_MIGRATOR_URL"),
        (lambda environ: admin(["migrate"], environ), "ORDERS_MIGRATOR_URL"),
        (lambda environ: admin(["bootstrap"], environ), "ORDERS_BOOTSTRAP_URL"),
        (lambda environ: admin(["bootstrap"], environ), "ORDERS_READER_URL"),
    ],
)
def test_an_error_names_the_variable_of_an_invalid_or_blank_url_and_shows_no_part_of_it(
    read: Read, variable: str
) -> None:
    urls = {
        f"ORDERS_{name}_URL": f"postgresql://orders_{role}:{SECRET}@db/orders"
        for name, role in (("MIGRATOR", "migrator"), ("DATABASE", "writer"), ("READER", "reader"), ("BOOTSTRAP", "x"))
    }
    environ = {**API, **CONSUMER, **urls}
    for url in (f"postgresql://user:{SECRET}@db:{SECRET}/orders", f"{SECRET} x", f"postgresql://u:{SECRET}@@db/orders"):
        with pytest.raises(ConfigurationError, match=f"^{variable}[:,] ") as error:
            read({**environ, variable: url})
        assert SECRET not in str(error.value)
    with pytest.raises(ConfigurationError, match=f"^{variable} is not set$"):
        read({**environ, variable: " "})


@pytest.mark.parametrize("group", ["", " ", "group ", "\tgroup"])
def test_a_group_is_not_renamed_to_one_that_the_consumer_refuses(group: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^GROUP must not be blank, nor begin or end with white space$"):
        admin(["offsets", "set-group", group], {"ORDERS_MIGRATOR_URL": "postgresql://orders_migrator@db/orders"})


@pytest.mark.parametrize(
    "variable",
    [
        *("ORDERS_KAFKA_SSL_CA_LOCATION", "ORDERS_KAFKA_SSL_CERTIFICATE_LOCATION", "ORDERS_KAFKA_SSL_KEY_LOCATION"),
        *("ORDERS_KAFKA_SSL_KEYSTORE_LOCATION", "ORDERS_KAFKA_HTTPS_CA_LOCATION"),
    ],
)
def test_an_error_names_the_variable_of_a_file_that_cannot_be_read(variable: str, tmp_path: Path) -> None:
    for path in (str(tmp_path / "missing.pem"), *([] if "_CA_" in variable else [str(tmp_path)])):
        with pytest.raises(ConfigurationError, match=f"^{variable} does not name a readable file: "):
            KafkaSettings.from_mapping({**KAFKA, variable: path})
    present = tmp_path / "present.pem"
    present.touch()
    for path in (str(present), *(["probe", str(tmp_path)] if "_CA_" in variable else [])):
        assert path in KafkaSettings.from_mapping({**KAFKA, variable: path}).properties.values()


@pytest.mark.parametrize(
    ("read", "complete", "message", "values"),
    [
        (
            max_record_bytes,
            {},
            "ORDERS_MAX_RECORD_BYTES must be an integer of at least 1",
            ["0", "-1", "1.5", "8 MiB", "1e6", "9" * 16, "\N{ARABIC-INDIC DIGIT ONE}"],
        ),
        (
            ConsumerSettings.from_mapping,
            CONSUMER,
            "ORDERS_TOMBSTONES must be reject or erase",
            ["on", "ERASE", "deletes", "erase "],
        ),
        (
            ConsumerSettings.from_mapping,
            CONSUMER,
            "ORDERS_BREAKER_FRACTION must be a number from 0 to 1",
            ["2", "-0.1", "95%", "nan", ".", "1.01"],
        ),
        (
            ConsumerSettings.from_mapping,
            CONSUMER,
            "ORDERS_METRICS_BIND must be host:port",
            ["9101", ":9101", "::1:9101", "host:", "host:65536", "host:-1", "a b:1", "http://host:1/"],
        ),
        *(
            (
                ConsumerSettings.from_mapping,
                CONSUMER,
                f"{variable} must not be blank, nor begin or end with white space",
                [" ", "\t", "orders ", " orders", "orders\n", "\N{NO-BREAK SPACE}"],
            )
            for variable in ("ORDERS_TOPIC", "ORDERS_CONSUMER_GROUP")
        ),
        (ApiSettings.from_mapping, API, "ORDERS_API_BIND must be host:port", ["8080", "host:port", SECRET]),
        (
            KafkaSettings.from_mapping,
            KAFKA,
            "ORDERS_KAFKA_BOOTSTRAP_SERVERS must be host:port, several separated by commas",
            [
                *(f"http://user:{SECRET}@kafka:9092", f"user:{SECRET}@kafka:9092", f"kafka:9092/{SECRET}", "a b:9092"),
                *(",", " , ", "kafka:0", "kafka:65536", "kafka:99999", "kafka:", ":9092", "[::1", "::1"),
                *("kafka:9092;other:9092", "kafka:9092 other:9092", "http://kafka:9092", "kafka:\u0661"),
            ],
        ),
        *(
            (ApiSettings.from_mapping, API, f"ORDERS_API_TOKENS: {message}", values)
            for message, values in [
                (
                    "token 1 must be printable ASCII",
                    [f"a:{SECRET}é", f"a:{SECRET}\x1b", f"é:{SECRET}", f"a:\x7f{SECRET}"],
                ),
                ("token 1 is not name:token", [SECRET]),
                ("token 1 has no name", [f":{SECRET}"]),
                ("token 1 has no token", ["name:"]),
                ("token 2 has the same name as an earlier token", [f"a:{SECRET},a:other"]),
                ("token 2 is empty", [f"a:{SECRET},", f"a:{SECRET}, ,b:c", f"a:{SECRET},\n"]),
                ("token 1 is empty", [",", " "]),
                (
                    "token 1 contains white space; separate tokens with commas",
                    [
                        *(f"a:{SECRET}\nb:{SECRET}", f"a:{SECRET}\r\nb:{SECRET}", f"a:{SECRET} b:{SECRET}"),
                        *(f"a:\t{SECRET}", f"a b:{SECRET}", f"a:{SECRET}\u2028{SECRET}", f"a:{SECRET}\x85b:c"),
                    ],
                ),
            ]
        ),
        (
            ApiSettings.from_mapping,
            API,
            "ORDERS_API_KEEPALIVE_S must be an integer from 1 to 3600",
            ["0", "-1", "3601", "2.5", "75s", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 15],
        ),
        (
            ApiSettings.from_mapping,
            API,
            "ORDERS_API_STATUS_WORDS must be code:word, several separated by commas",
            ["202", "202:", ":accepted", "x:accepted", "202:accepted,404", "-1:x"],
        ),
        (ApiSettings.from_mapping, API, "ORDERS_API_AUTH must be on or off", ["OFF", "0", "no", SECRET]),
    ],
)
def test_an_error_names_the_wrong_setting_without_its_value(
    read: Read, complete: Mapping[str, str], message: str, values: list[str]
) -> None:
    variable = message.partition(" ")[0].rstrip(":")
    for value in values:
        with pytest.raises(ConfigurationError) as error:
            read({**complete, variable: value})
        assert str(error.value) == message, value


@pytest.mark.parametrize(
    "name", ["ORDERS_TOPIC", "ORDERS_CONSUMER_GROUP", "ORDERS_DATABASE_URL", "ORDERS_KAFKA_SASL_PASSWORD"]
)
def test_a_setting_that_is_not_utf8_is_named(name: str) -> None:
    """confluent_kafka would raise SystemError, or end the process."""
    with pytest.raises(ConfigurationError, match=f"^{name} is not UTF-8$"):
        ConsumerSettings.from_mapping({**CONSUMER, name: os.fsdecode(b"s3cret\xff")})


def test_tokens_and_auth_off_contradict_each_other() -> None:
    without_tokens = {**API, "ORDERS_API_TOKENS": ""}
    assert ApiSettings.from_mapping({**without_tokens, "ORDERS_API_AUTH": "off"}).tokens == {}
    with pytest.raises(ConfigurationError, match="ORDERS_API_TOKENS and ORDERS_API_AUTH=off contradict"):
        ApiSettings.from_mapping({**API, "ORDERS_API_AUTH": "off"})


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("[::1]", True),
        ("127.0.0.9", False),
        ("192.0.2.1", False),
        ("[::]", False),
        ("shop", False),
    ],
)
def test_without_tokens_the_api_serves_localhost_only(host: str, is_allowed: bool) -> None:
    environ = {**API, "ORDERS_API_TOKENS": "", "ORDERS_API_AUTH": "off", "ORDERS_API_BIND": f"{host}:1"}
    if is_allowed:
        assert ApiSettings.from_mapping(environ).bind.host == host
    else:
        with pytest.raises(ConfigurationError, match="ORDERS_API_BIND must be localhost"):
            ApiSettings.from_mapping(environ)


def test_the_keep_alive_time_is_75_seconds_unless_set() -> None:
    assert ApiSettings.from_mapping(API).keepalive_s == 75
    assert ApiSettings.from_mapping({**API, "ORDERS_API_KEEPALIVE_S": "5"}).keepalive_s == 5


def test_status_codes_have_the_words_that_are_set() -> None:
    assert ApiSettings.from_mapping(API).status_words == {}
    words = ApiSettings.from_mapping({**API, "ORDERS_API_STATUS_WORDS": "202:accepted, 404 : not found,"}).status_words
    assert words == {202: "accepted", 404: "not found"}


def test_the_tokens_may_end_with_a_line_break() -> None:
    assert ApiSettings.from_mapping({**API, "ORDERS_API_TOKENS": f"shop:{SECRET}\n"}).name_of(SECRET) == "shop"


def test_a_token_is_found_by_its_exact_text() -> None:
    settings = ApiSettings.from_mapping({**API, "ORDERS_API_TOKENS": f"shop:{SECRET}, old:with:colon"})
    assert settings.name_of(SECRET) == "shop"
    assert settings.name_of("with:colon") == "old"
    assert settings.name_of("") is None
    assert settings.name_of(SECRET + "\ufffd") is None


@pytest.mark.parametrize(
    "settings",
    [
        ConsumerSettings.from_mapping({**CONSUMER, "ORDERS_KAFKA_SASL_PASSWORD": SECRET}),
        ApiSettings.from_mapping(API),
    ],
)
def test_settings_are_frozen_and_show_no_secret(settings: ConsumerSettings | ApiSettings) -> None:
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        settings.metrics_bind = Address(host="elsewhere", port=1)  # type: ignore[misc] # assigning must fail


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("ORDERS_TOPICS", "ORDERS_TOPIC"),
        ("ORDERS_DATABSE_URL", "ORDERS_DATABASE_URL"),
        ("ORDERS_DB_URL", "ORDERS_DATABASE_URL"),
        ("ORDER_READER_URL", "ORDERS_READER_URL"),
        ("orders_api_bind", "ORDERS_API_BIND"),
        ("ORDERS_TOMBSTONE", "ORDERS_TOMBSTONES"),
        ("ORDERS_KAFKA_BOOTSTRAP_SERVER", "ORDERS_KAFKA_BOOTSTRAP_SERVERS"),
        ("ORDERS_KAKFA_BOOTSTRAP_SERVERS", "ORDERS_KAFKA_BOOTSTRAP_SERVERS"),
    ],
)
def test_a_misspelt_variable_is_found_with_its_nearest_setting(variable: str, nearest: str) -> None:
    assert misspelt_settings({**CONSUMER, **API, variable: SECRET}) == {variable: nearest}


@pytest.mark.parametrize(
    "variable",
    [
        *("ORDERS_KAFKA_SASL_PASSWORD", "ORDERS_KAFKA_SESSION_TIMEOUT_MS", "ORDERS_KAFKA_BROKER_ADDRESS_TTL"),
        *("ORDERS_BACKUP_FOLDER", "PATH", "TOPIC", "DATABASE_URL", "REORDERS_TOPIC"),
    ],
)
def test_other_variables_are_not_taken_for_misspelt_settings(variable: str) -> None:
    assert misspelt_settings({**CONSUMER, **API, variable: SECRET}) == {}


@pytest.mark.parametrize("program", ["admin lag", "api", "consumer", "sender --count 1"])
def test_every_program_warns_of_a_misspelt_setting_at_its_start(program: str) -> None:
    done = run(program, {"PATH": os.defpath, "ORDERS_TOPICS": SECRET})
    first, second = done.stderr.splitlines()
    warning = json.loads(first)
    assert (warning["event"], warning["variable"], warning["nearest"]) == (
        "unknown_setting",
        "ORDERS_TOPICS",
        "ORDERS_TOPIC",
    )
    assert "is not set" in second
    assert SECRET not in done.stderr
    assert done.returncode == 2
