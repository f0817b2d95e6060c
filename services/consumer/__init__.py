"""Kafka to PostgreSQL."""
