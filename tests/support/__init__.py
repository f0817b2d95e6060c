"""Everything the tests share."""
