#!/bin/bash
# What the real image's entrypoint does for the variables that docker-compose.yml sets: on the first start it makes the
# cluster, the password and the database, with a server that only a socket in the file system leads to; then it becomes
# the command. It refuses to be root, where the real one steps down by itself. The sandbox's server has no lz4,
# so its write-ahead log is not compressed.
set -Eeuo pipefail

test "$(id -u)" != 0 || { echo "this stand-in must be started with --user postgres" >&2; exit 1; }
if [ ! -s "$PGDATA/PG_VERSION" ]; then
	: "${POSTGRES_PASSWORD:?Database is uninitialized and superuser password is not specified}"
	export PGPASSWORD=$POSTGRES_PASSWORD PGUSER=${POSTGRES_USER:-postgres}
	mkdir -p "$PGDATA"
	chmod 700 "$PGDATA"
	eval 'initdb --username="$PGUSER" --pwfile=<(echo "$POSTGRES_PASSWORD")' "${POSTGRES_INITDB_ARGS:-}"
	printf '\nhost all all all %s\n' "${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}" >> "$PGDATA/pg_hba.conf"
	printf "\nlisten_addresses = '*'\nunix_socket_directories = '/var/run/postgresql'\n" >> "$PGDATA/postgresql.conf"
	pg_ctl --wait -o "-c listen_addresses=''" start
	createdb --host=/var/run/postgresql --maintenance-db=postgres "${POSTGRES_DB:-$PGUSER}"
	pg_ctl --wait --mode=fast stop
	unset PGPASSWORD PGUSER
fi
exec "${@/#wal_compression=lz4/wal_compression=off}"
