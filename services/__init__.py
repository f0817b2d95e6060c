"""Thin programs that import orderlib and hold no knowledge of their own."""
