-- Which version of an order is stored: 1, 2, … per order_uid. Orders that are stored already count as version 1.
--
-- A constant default adds the column without writing a row. The CHECK holds for new rows and scans no old ones.

ALTER TABLE orders ADD COLUMN version bigint NOT NULL DEFAULT 1;
ALTER TABLE orders ADD CONSTRAINT orders_version_positive CHECK (version >= 1) NOT VALID;
