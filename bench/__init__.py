"""Benchmarks: measure every published figure, side by side with what it is compared with."""
