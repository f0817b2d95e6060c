"""The consumer: from Kafka to PostgreSQL."""
