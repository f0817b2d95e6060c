"""The sender: it generates or reads orders and publishes them, for demos, tests and load."""
