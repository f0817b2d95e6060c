-- The orders that were forgotten, so that no later record and no `save` stores them again.
--
-- The order_uid itself may identify a person, so only its SHA-256 is kept. The programs of the previous release do not
-- read this table: stop them before the first `forget`.

CREATE TABLE forgotten (
    order_uid_sha256 bytea PRIMARY KEY CHECK (octet_length(order_uid_sha256) = 32),
    forgotten_at timestamptz NOT NULL DEFAULT now()
);

GRANT SELECT ON forgotten TO orders_reader, orders_writer;

-- A redrive may find that the order of a reject was forgotten.
ALTER TABLE rejects DROP CONSTRAINT rejects_redrive_outcome_check;
ALTER TABLE rejects ADD CONSTRAINT rejects_redrive_outcome_check
    CHECK (redrive_outcome IN ('stored', 'duplicate', 'superseded', 'rejected', 'forgotten')) NOT VALID;
