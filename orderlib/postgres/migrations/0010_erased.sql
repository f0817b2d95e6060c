-- The orders that a tombstone erased: a record with an order_uid as key and no value (ORDERS_TOMBSTONES=erase).
--
-- The position of the tombstone stays, so that older records of its partition do not store the order again. A newer
-- record does, and then the row is deleted. The programs of the previous release do not read this table: replace all
-- consumers before the first tombstone.

CREATE TABLE erased (
    order_uid text COLLATE "C" PRIMARY KEY
        CHECK (char_length(order_uid) BETWEEN 1 AND 128 AND order_uid ~ '^(?!\.{1,2}$)[A-Za-z0-9._:-]+$(?!\n)'),
    topic_id text NOT NULL,
    partition integer NOT NULL,
    record_offset bigint NOT NULL,
    erased_at timestamptz NOT NULL DEFAULT now()
);

GRANT SELECT ON erased TO orders_reader;
-- A later position replaces the row, so the writer needs no UPDATE.
GRANT SELECT, INSERT, DELETE ON erased TO orders_writer;

-- A redrive may erase the order of a reject.
ALTER TABLE rejects DROP CONSTRAINT rejects_redrive_outcome_check;
ALTER TABLE rejects ADD CONSTRAINT rejects_redrive_outcome_check
    CHECK (redrive_outcome IN ('stored', 'duplicate', 'superseded', 'rejected', 'erased', 'forgotten')) NOT VALID;
