-- The example's own table, in the database of the orders. An administrator creates it once.
-- It has no foreign key to orders: a new version of an order replaces its row there.
CREATE TABLE gift_messages (
    order_uid text PRIMARY KEY,
    message text NOT NULL CHECK (length(message) BETWEEN 1 AND 500)
);
GRANT SELECT, INSERT, UPDATE ON gift_messages TO orders_writer;
