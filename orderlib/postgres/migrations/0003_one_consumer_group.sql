-- One consumer group per database. Two groups would each handle every record and overwrite each other's orders.

CREATE TABLE consumer_groups (
    -- Only true is allowed, so there is at most one row.
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    consumer_group text NOT NULL UNIQUE
);

-- Claim the database for the group that already has offsets. If two groups were accepted before, keep the one that
-- committed last. It keeps its own offsets, and takes those of the other group only for partitions that it never read.
-- Nothing is skipped: every record below either offset was handled in this database.
DO $$
DECLARE
    kept text;
    removed text;
BEGIN
    LOCK TABLE consumer_offsets IN SHARE ROW EXCLUSIVE MODE;
    SELECT consumer_group INTO kept FROM consumer_offsets ORDER BY updated_at DESC, consumer_group LIMIT 1;
    IF kept IS NULL THEN
        RETURN;
    END IF;
    INSERT INTO consumer_groups (consumer_group) VALUES (kept);
    SELECT string_agg(DISTINCT quote_literal(consumer_group), ', ') INTO removed
    FROM consumer_offsets WHERE consumer_group <> kept;
    IF removed IS NOT NULL THEN
        INSERT INTO consumer_offsets (consumer_group, topic_id, partition, topic, next_offset, updated_at)
        SELECT DISTINCT ON (topic_id, partition) kept, topic_id, partition, topic, next_offset, updated_at
        FROM consumer_offsets WHERE consumer_group <> kept ORDER BY topic_id, partition, next_offset
        ON CONFLICT DO NOTHING;
        DELETE FROM consumer_offsets WHERE consumer_group <> kept;
        RAISE WARNING 'the database had offsets of several consumer groups: kept %, removed %. '
            'To use another name: the admin command `offsets set-group`', quote_literal(kept), removed;
    END IF;
END $$;

ALTER TABLE consumer_offsets ADD CONSTRAINT consumer_offsets_one_group
    FOREIGN KEY (consumer_group) REFERENCES consumer_groups (consumer_group) ON UPDATE CASCADE;

-- For consumers of the previous release, which do not claim their group at their start.
CREATE FUNCTION claim_consumer_group() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format(
        'INSERT INTO %I.consumer_groups (consumer_group) VALUES ($1) ON CONFLICT DO NOTHING', TG_TABLE_SCHEMA
    ) USING NEW.consumer_group;
    RETURN NEW;
END $$;
REVOKE ALL ON FUNCTION claim_consumer_group() FROM PUBLIC;
CREATE TRIGGER claim_consumer_group BEFORE INSERT ON consumer_offsets
    FOR EACH ROW EXECUTE FUNCTION claim_consumer_group();

GRANT SELECT, INSERT ON consumer_groups TO orders_writer;
GRANT SELECT ON consumer_groups TO orders_reader;
