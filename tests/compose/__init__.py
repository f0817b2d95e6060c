"""``docker-compose.yml`` on a real engine; ``make test-compose``. See README.md beside this file."""
