-- Digests of rejects, which reconcile compares with Kafka's records without reading the rejects.
--
-- A view, because it computes the digests from the current rows, costs inserts nothing, and needs no lock on rejects. It
-- has the rights of its owner on rejects; the reader has only the right to read the view.

CREATE VIEW reject_digests AS
SELECT
    topic_id, partition, record_offset, topic, record_time,
    -- Null stays null, and an empty value has a digest.
    sha256(key) AS key_sha256,
    sha256(value) AS value_sha256,
    sha256(convert_to(headers::text, 'UTF8')) AS headers_sha256,
    code,
    -- Without the wording, which may differ between releases. Paths never contain a value of the record.
    faults -> 'total' AS faults_total,
    jsonb_path_query_array(faults, '$.first[*].path') AS fault_paths,
    rejected_at, redriven_at, redrive_outcome
FROM rejects;

GRANT SELECT ON reject_digests TO orders_reader;
