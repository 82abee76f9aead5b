#!/bin/bash
#
# demo.sh: two turns in a private cluster, from CREATE EXTENSION to the answer
# and to a function of the database that the model calls
#
#	make demo [MESSAGE="..."] [KEEP=1]
#	          [CHAT_BASE_URL=... CHAT_MODEL=... CHAT_API_KEY=...]
#
# Without CHAT_BASE_URL the bundled fake endpoint answers.  KEEP=1 leaves the
# cluster running and says how to connect and how to stop it.

set -euo pipefail
. "$(dirname "$0")/lib.sh"

MESSAGE=${MESSAGE:-How can an answer stream out of a database?}
CHAT_BASE_URL=${CHAT_BASE_URL:-}
CHAT_MODEL=${CHAT_MODEL:-}
KEEP=${KEEP:-}
KEEPING=
KEY_FILE=
FAKE_PID=
SCRIPT=

# Starts the bundled endpoint and takes its address.
start_fake()
{
	local out=$WORK/run/fake.out line=

	background sh -c \
		'exec "$1" --delay 40 >"$2" 2>"$2.err" </dev/null' sh \
		"$WORK/fake_llm" "$out"
	FAKE_PID=$BACKGROUND_PID
	while ! line=$(grep '^port=' "$out" 2>/dev/null); do
		kill -0 "$FAKE_PID" 2>/dev/null || die "the fake endpoint did not start"
		sleep 0.02
	done
	CHAT_BASE_URL=http://127.0.0.1:${line#port=}/v1
	CHAT_MODEL=fake-1
	# percent-encoded where a directive has no blanks and JSON no quotes
	SCRIPT='[[at=0 tool=order_status args={%22order_id%22:1042}]]'
	SCRIPT+=' [[text=Your%20order%201042%20has%20been%20shipped.]]'
}

# Puts the key where only the server's user reads it; no log ever sees it.
store_key()
{
	KEY_FILE=$WORK/run/key
	(
		umask 077
		printf '%s\n' "$1" >"$KEY_FILE"
	)
	[ -z "$RUN_USER" ] || chown "$RUN_USER:" "$KEY_FILE"
}

# Prints the three lines with which to play on.
play_on()
{
	cat <<-'EOF'

		-- play on
		make demo MESSAGE="Tell me about write-ahead logging"
		make demo CHAT_BASE_URL=https://api.openai.com/v1 CHAT_MODEL=gpt-4o-mini CHAT_API_KEY=...
		make demo KEEP=1        keeps the cluster, to try more SQL in it
	EOF
}

# Prints how to use the cluster that stays, and how to end it.
tell_kept()
{
	local run='' stop

	[ -z "$RUN_USER" ] || run="runuser -u $RUN_USER -- "
	stop="$run$BINDIR/pg_ctl -D $WORK/run/demo -m fast stop"
	[ -z "$FAKE_PID" ] || stop="kill $FAKE_PID; $stop"
	cat <<-EOF

		-- the cluster is still running; play on
		connect   $run$BINDIR/psql -h $WORK/sock -U postgres chat
		try       CALL chat.ask('What else can you do?', NULL, NULL);
		stop      $stop; rm -rf $WORK
	EOF
}

# The key must not stay in the environment of what is started below.
key=${CHAT_API_KEY:-}
unset CHAT_API_KEY MAKEFLAGS MFLAGS MAKEOVERRIDES

workdir_open demo
echo "building ..."
build all build/fake_llm build/demo
stage
cp "$SRC/build/fake_llm" "$SRC/build/demo" "$WORK/"
if [ -n "$CHAT_BASE_URL" ]; then
	CHAT_MODEL=${CHAT_MODEL:-gpt-4o-mini}
else
	start_fake
	key=${key:-not-a-secret}
fi
[ -z "$key" ] || store_key "$key"
unset key
cluster_start demo "chat.default_server = 'demo'"
as_user createdb chat
PGDATABASE=chat
echo "$PG_VERSION in a private cluster; the model is $CHAT_MODEL at $CHAT_BASE_URL"
run_group "$WORK/demo" "$CHAT_BASE_URL" "$CHAT_MODEL" "$KEY_FILE" "$MESSAGE" \
	"$SCRIPT" || {
	rc=$?
	# why a turn failed is told already
	[ $rc = 3 ] || tail -n 20 "$WORK/run/demo.log" >&2
	exit $rc
}
if [ -n "$KEEP" ]; then
	tell_kept
	KEEPING=1
else
	play_on
fi
