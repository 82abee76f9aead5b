#!/bin/bash
#
# bench.sh: throughput and latency in a private cluster, beside a bare client
#
#	make bench [LOADS="W1 W3 idle"] [BENCH_SCALE=0.5]
#
# Loads: W1 1000 streams of 200 tokens 20 ms apart, W2 100 streams of 500
# tokens without delay, W3 one stream, W4 5000 streams 50 ms apart, W5 and W6
# 64 sessions with turns of 1 and 10 tokens, cancel the time from cancel_task
# to the end of the connection beside 200 streams, idle a minute of nothing.
# In W1 and W4 all streams begin together, and go on in bursts; W1s and W4s (the
# latter runs when named) are the same begun one after the other.
# BENCH_SCALE makes the measured times longer or shorter.  BENCH_CONF holds
# further settings of the server.  The endpoint, the clients and the server
# share the machine; before each load the server is restarted and cleans up what
# the one before has left.  It commits as durably as it does by default.

set -euo pipefail
. "$(dirname "$0")/lib.sh"

BENCH_SCALE=${BENCH_SCALE:-1}
FAKE_URL=

# Starts the bundled endpoint and takes its address.
start_fake()
{
	local out=$WORK/run/fake.out line=

	background sh -c 'exec "$1" >"$2" 2>"$2.err" </dev/null' sh \
		"$WORK/fake_llm" "$out"
	while ! line=$(grep '^port=' "$out" 2>/dev/null); do
		kill -0 "$BACKGROUND_PID" 2>/dev/null ||
			die "the fake endpoint did not start"
		sleep 0.02
	done
	FAKE_URL=http://127.0.0.1:${line#port=}/v1
}

# Makes the database, the role and the server that bench.c works with.
prepare()
{
	as_user psql -Xq -v ON_ERROR_STOP=1 >/dev/null <<-EOF
		CREATE EXTENSION chat;
		CREATE ROLE bench LOGIN;
		SELECT FROM chat.grant_usage('bench');
		CREATE SERVER fake FOREIGN DATA WRAPPER chat_llm
			OPTIONS (base_url '$FAKE_URL', model 'fake-1');
		CREATE USER MAPPING FOR PUBLIC SERVER fake
			OPTIONS (api_key 'not-a-secret');
		GRANT USAGE ON FOREIGN SERVER fake TO bench;
		ALTER ROLE bench SET chat.default_server = 'fake';
	EOF
}

# Starts the cluster anew and waits until its worker is there.
restart()
{
	local dir=$WORK/run/bench

	as_user pg_ctl -D "$dir" -l "$dir.log" -m fast -w -t 120 restart \
		>"$WORK/pg_ctl.log" 2>&1 ||
		{ tail -n 20 "$dir.log" >&2; die "the server did not restart"; }
	POSTMASTER=$(head -n 1 "$dir/postmaster.pid")
	as_user psql -Xqc VACUUM -c CHECKPOINT
	until [ "$(as_user psql -XAtc \
		'SELECT count(pid) > 0 FROM chat.worker_status()')" = t ]; do
		sleep 0.1
	done
}

# Runs one load on both sides.
run_load()
{
	local conninfo="host=$PGHOST port=$PGPORT dbname=$PGDATABASE"

	restart
	if [ "$1" = idle ]; then
		echo "idle: $2 s without work"
		run_group "$WORK/bench" idle "$conninfo" "$2" "$POSTMASTER" \
			>>"$WORK/results"
		return
	fi
	if [ "$1" = cancel ]; then
		echo "cancel: streams are cancelled while others go on"
		run_group "$WORK/bench" cancel "$conninfo" "${FAKE_URL%/v1}" \
			"$BENCH_SCALE" >>"$WORK/results" ||
			{ tail -n 20 "$WORK/run/bench.log" >&2; die "load cancel failed"; }
		return
	fi
	echo "$1: bare client"
	run_group "$WORK/bench" bare "$FAKE_URL/chat/completions" "$1" \
		"$BENCH_SCALE" >>"$WORK/results"
	echo "$1: chat"
	run_group "$WORK/bench" chat "$conninfo" "$1" "$BENCH_SCALE" \
		"$POSTMASTER" >>"$WORK/results" ||
		{ tail -n 20 "$WORK/run/bench.log" >&2; die "load $1 failed"; }
}

workdir_open bench
echo "building ..."
build all build/fake_llm build/bench
stage
cp "$SRC/build/fake_llm" "$SRC/build/bench" "$WORK/"
ulimit -n "$(ulimit -Hn)"
start_fake
cluster_start bench "fsync = on
shared_buffers = 256MB
max_wal_size = 4GB
log_min_messages = warning
chat.generate_titles = off
${BENCH_CONF:-}"
prepare
echo "$PG_VERSION, $(nproc) processors, $(sed -n \
	's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
[ $# -gt 0 ] || set -- W1 W1s W2 W3 W4 W5 W6 cancel idle
for load; do
	run_load "$load" 60
done
"$WORK/bench" table "$WORK/results"
