"""Makes or reads orders and publishes them, so that the rest can be shown, tested and loaded."""
