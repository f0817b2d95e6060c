-- Orders, each in four tables joined by order_uid.
--
-- The CHECKs repeat the contract of orderlib/models.py, because only the database can refuse what other programs write;
-- tests/integration/test_contract.py compares both. order_uid is in every key, so that Citus can distribute the tables
-- by it.

CREATE TABLE orders (
    order_uid text COLLATE "C" PRIMARY KEY
        CHECK (char_length(order_uid) BETWEEN 1 AND 128 AND order_uid ~ '^(?!\.{1,2}$)[A-Za-z0-9._:-]+$(?!\n)'),
    track_number text NOT NULL CHECK (char_length(track_number) BETWEEN 1 AND 255),
    entry text NOT NULL CHECK (char_length(entry) BETWEEN 1 AND 255),
    locale text NOT NULL CHECK (char_length(locale) BETWEEN 1 AND 35),
    internal_signature text NOT NULL CHECK (char_length(internal_signature) <= 4096),
    customer_id text NOT NULL CHECK (char_length(customer_id) BETWEEN 1 AND 255),
    delivery_service text NOT NULL CHECK (char_length(delivery_service) BETWEEN 1 AND 255),
    shardkey text NOT NULL CHECK (char_length(shardkey) <= 255),
    sm_id bigint NOT NULL CHECK (sm_id >= 0),
    date_created timestamptz NOT NULL
        CHECK (date_created >= '0001-01-01 00:00:00+00' AND date_created < '10000-01-01 00:00:00+00'),
    oof_shard text NOT NULL CHECK (char_length(oof_shard) <= 255),

    -- SHA-256 of the canonical JSON. It identifies equal content and is the ETag; reading it is one primary key lookup.
    content_sha256 bytea NOT NULL CHECK (octet_length(content_sha256) = 32),
    -- The Kafka record that last confirmed this content; all null for an order saved from Python.
    source_topic_id text,
    source_partition integer,
    source_offset bigint,
    source_time timestamptz,
    -- When this order_uid was stored for the first time (never changed), and when this version was stored.
    first_stored_at timestamptz NOT NULL,
    stored_at timestamptz NOT NULL,
    CONSTRAINT orders_source_whole
        CHECK (num_nulls(source_topic_id, source_partition, source_offset, source_time) IN (0, 4))
);

-- The list of orders, newest first: all, of one customer, of one track number.
CREATE INDEX orders_newest ON orders (first_stored_at DESC, order_uid DESC);
CREATE INDEX orders_newest_of_customer ON orders (customer_id, first_stored_at DESC, order_uid DESC);
CREATE INDEX orders_newest_of_track ON orders (track_number, first_stored_at DESC, order_uid DESC);

CREATE TABLE delivery (
    order_uid text COLLATE "C" PRIMARY KEY REFERENCES orders ON DELETE CASCADE,
    name text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 255),
    phone text NOT NULL CHECK (char_length(phone) BETWEEN 1 AND 64),
    zip text NOT NULL CHECK (char_length(zip) <= 32),
    city text NOT NULL CHECK (char_length(city) BETWEEN 1 AND 255),
    address text NOT NULL CHECK (char_length(address) BETWEEN 1 AND 1024),
    region text NOT NULL CHECK (char_length(region) <= 255),
    email text NOT NULL CHECK (char_length(email) <= 320)
);

CREATE TABLE payment (
    order_uid text COLLATE "C" PRIMARY KEY REFERENCES orders ON DELETE CASCADE,
    transaction text NOT NULL CHECK (char_length(transaction) BETWEEN 1 AND 255),
    request_id text NOT NULL CHECK (char_length(request_id) <= 255),
    currency text NOT NULL CHECK (char_length(currency) BETWEEN 3 AND 3 AND currency ~ '^[A-Z]{3}$(?!\n)'),
    provider text NOT NULL CHECK (char_length(provider) BETWEEN 1 AND 255),
    amount bigint NOT NULL CHECK (amount >= 0),
    payment_dt bigint NOT NULL CHECK (payment_dt BETWEEN 0 AND 253402300799),
    bank text NOT NULL CHECK (char_length(bank) <= 255),
    delivery_cost bigint NOT NULL CHECK (delivery_cost >= 0),
    goods_total bigint NOT NULL CHECK (goods_total >= 0),
    custom_fee bigint NOT NULL CHECK (custom_fee >= 0)
);

CREATE TABLE items (
    order_uid text COLLATE "C" NOT NULL REFERENCES orders ON DELETE CASCADE,
    -- The item's position in its order, from 0 without gaps.
    line integer NOT NULL CHECK (line BETWEEN 0 AND 999),
    chrt_id bigint NOT NULL CHECK (chrt_id >= 0),
    track_number text NOT NULL CHECK (char_length(track_number) <= 255),
    price bigint NOT NULL CHECK (price >= 0),
    rid text NOT NULL CHECK (char_length(rid) BETWEEN 1 AND 255),
    name text NOT NULL CHECK (char_length(name) <= 1024),
    sale integer NOT NULL CHECK (sale BETWEEN 0 AND 100),
    size text NOT NULL CHECK (char_length(size) <= 64),
    total_price bigint NOT NULL CHECK (total_price >= 0),
    nm_id bigint NOT NULL CHECK (nm_id >= 0),
    brand text NOT NULL CHECK (char_length(brand) <= 255),
    status integer NOT NULL CHECK (status >= 0),
    PRIMARY KEY (order_uid, line)
);

-- A replaced order is deleted and inserted again, so the writer needs UPDATE on the source only.
GRANT SELECT ON orders, delivery, payment, items TO orders_reader, orders_writer;
GRANT INSERT ON orders, delivery, payment, items TO orders_writer;
GRANT DELETE ON orders TO orders_writer;
GRANT UPDATE (source_topic_id, source_partition, source_offset, source_time) ON orders TO orders_writer;
