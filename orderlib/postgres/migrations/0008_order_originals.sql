-- The values of records with fields that orderlib did not know, unchanged: for as long as they are the current version.
--
-- The row disappears with its order, also when a consumer of the previous release replaces the order. order_uid is the
-- key, so that Citus can distribute the table with the others.

CREATE TABLE order_originals (
    order_uid text COLLATE "C" PRIMARY KEY REFERENCES orders ON DELETE CASCADE,
    -- JSON, byte for byte as it was sent.
    value bytea NOT NULL
);

-- Whether there is such a row, so that reading an order needs no other join. Consumers of the previous release leave the
-- default, which is right: they store no originals.
ALTER TABLE orders ADD COLUMN has_original boolean NOT NULL DEFAULT false;

GRANT SELECT ON order_originals TO orders_reader, orders_writer;
GRANT INSERT ON order_originals TO orders_writer;
