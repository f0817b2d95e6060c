-- Find orders by what a caller knows, and list the newest rejects.
--
-- No index is unique: several orders may match. orderlib/postgres/queries.py has the same expressions. Each lookup is by
-- one value, so the order of the index does not matter, and "C" is the fastest collation and the same everywhere.

-- An order by its order_uid or the beginning of it, in any case. Small letters are found by the primary key.
CREATE INDEX orders_by_lower_uid ON orders (lower(order_uid)) WHERE order_uid <> lower(order_uid);
-- Orders by the digits of the phone number.
CREATE INDEX delivery_by_phone ON delivery (regexp_replace(phone COLLATE "C", '[^0-9]+', '', 'g'));
-- Orders by the e-mail address, in any case.
CREATE INDEX delivery_by_email ON delivery (lower(email COLLATE "C"));
-- The order of an item.
CREATE INDEX items_by_rid ON items (rid COLLATE "C");

-- The list of rejects, newest first.
CREATE INDEX rejects_newest ON rejects (rejected_at, topic_id, partition, record_offset);

-- The planner has no statistics of an expression before its table is analyzed, and would guess.
ANALYZE orders, delivery;
