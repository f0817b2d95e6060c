"""Decisions about records, batches and errors. No I/O and no clock."""
