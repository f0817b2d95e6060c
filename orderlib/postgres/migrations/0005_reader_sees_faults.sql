-- Let the reader see why a record was rejected: `position_state` returns the faults.
--
-- Faults have paths, rules and kinds of values, never a value of the record. Key, value and headers stay hidden.

GRANT SELECT (faults) ON rejects TO orders_reader;
