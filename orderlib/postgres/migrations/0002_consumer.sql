-- What the consumer stores in the same transaction as the orders: its offsets and its rejects.

CREATE TABLE consumer_offsets (
    consumer_group text NOT NULL,
    -- Kafka's id of the topic. A recreated topic has the same name and another id.
    topic_id text NOT NULL,
    partition integer NOT NULL CHECK (partition >= 0),
    topic text NOT NULL,
    -- The next record to handle. The fence: a batch moves it from the value that it expects, or is rolled back.
    next_offset bigint NOT NULL CHECK (next_offset >= 0),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer_group, topic_id, partition)
);

CREATE TABLE rejects (
    topic_id text NOT NULL,
    partition integer NOT NULL CHECK (partition >= 0),
    record_offset bigint NOT NULL CHECK (record_offset >= 0),
    topic text NOT NULL,
    record_time timestamptz NOT NULL,
    -- The record, unchanged; null differs from empty.
    key bytea,
    value bytea,
    -- [{"key": text, "value": base64 or null}, …] in the record's order with repeats; null if unreadable.
    headers json,
    code text NOT NULL CHECK (code IN ('malformed_json', 'invalid_order', 'too_large', 'refused_by_database')),
    -- {"total": n, "first": [{"path": …, "expected": …, "found": …}, …]}: never a value of the record.
    faults jsonb NOT NULL,
    rejected_at timestamptz NOT NULL DEFAULT now(),
    -- Both null until the first redrive.
    redriven_at timestamptz,
    redrive_outcome text CHECK (redrive_outcome IN ('stored', 'duplicate', 'superseded', 'rejected')),
    CONSTRAINT rejects_redriven_whole CHECK (num_nulls(redriven_at, redrive_outcome) IN (0, 2)),
    PRIMARY KEY (topic_id, partition, record_offset)
);

-- The list of rejects, and their count by code.
CREATE INDEX rejects_by_code ON rejects (code, rejected_at);

GRANT SELECT, INSERT ON consumer_offsets, rejects TO orders_writer;
GRANT UPDATE (next_offset, updated_at) ON consumer_offsets TO orders_writer;
GRANT UPDATE (redriven_at, redrive_outcome) ON rejects TO orders_writer;
GRANT SELECT ON consumer_offsets TO orders_reader;
-- A reject contains personal data: the reader sees its position, time and code, never its content.
GRANT SELECT (topic_id, partition, record_offset, topic, record_time, code, rejected_at, redriven_at, redrive_outcome)
    ON rejects TO orders_reader;
