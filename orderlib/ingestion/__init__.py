"""What becomes of a record, and of the consumer. No I/O, no clock, no chance."""
