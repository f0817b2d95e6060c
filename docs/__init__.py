"""The documents; only ``reference.py`` is made to be run."""
