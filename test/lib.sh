# shellcheck shell=bash
#
# lib.sh: a private installation and private clusters, for the test runner,
# the demo and the benchmark
#
# Sourced by bash scripts that stand in test/ (set -euo pipefail first):
#
#	. "$(dirname "$0")/lib.sh"
#	workdir_open demo			makes $WORK; removed at exit, however it comes
#	build all tools				make in the source tree, as whoever calls
#	stage						installs into $WORK/stage, writes $WORK/temp.conf
#	cluster_start main "x = 1"	a cluster with temp.conf and these lines;
#								sets PGHOST PGPORT PGUSER PGDATABASE
#	as_user CMD ...				runs CMD as the unprivileged user
#	run_group CMD ...			the same in a process group of its own, so that
#								an interrupt ends all of it; returns CMD's code
#	background CMD ...			starts CMD as the unprivileged user; sets
#								BACKGROUND_PID; ended at exit
#
# Nothing of PostgreSQL runs as root: as root, the user is postgres (or
# nobody), who owns $WORK/run and everything below it.  At exit every process
# group that was started and every postmaster below $WORK is stopped.

SRC=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PG_CONFIG=${PG_CONFIG:-pg_config}
MAKE=${MAKE:-make}
WORK=
GROUPS_STARTED=()
BACKGROUND_PID=

# Ends the script with a message.
die()
{
	echo "${0##*/}: $*" >&2
	exit 1
}

# Sets what the chosen PostgreSQL is and where its parts are.
pg_setup()
{
	BINDIR=$("$PG_CONFIG" --bindir)
	PKGLIBDIR=$("$PG_CONFIG" --pkglibdir)
	SHAREDIR=$("$PG_CONFIG" --sharedir)
	# shellcheck disable=SC2034	# for the scripts
	PGXS_TEST=$(cd "$(dirname "$("$PG_CONFIG" --pgxs)")/../test" && pwd)
	PG_VERSION=$("$PG_CONFIG" --version)
	PG_MAJOR=${PG_VERSION#* }
	PG_MAJOR=${PG_MAJOR%%[!0-9]*}
}

# Makes the temporary directory and arranges for its removal.
workdir_open()
{
	pg_setup
	umask 022
	RUN_USER=
	if [ "$(id -u)" = 0 ]; then
		RUN_USER=nobody
		if id postgres >/dev/null 2>&1; then
			RUN_USER=postgres
		fi
	fi
	trap workdir_close EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
	WORK=$(mktemp -d "${TMPDIR:-/tmp}/chat-$1.XXXXXX")
	chmod 755 "$WORK"
	mkdir "$WORK/run" "$WORK/run/tmp"
	if [ -n "$RUN_USER" ]; then
		chown "$RUN_USER:" "$WORK/run" "$WORK/run/tmp"
	fi
}

# Becomes a command as the unprivileged user, in a clean environment.
exec_as_user()
{
	local drop=()

	if [ -n "$RUN_USER" ]; then
		drop=(setpriv "--reuid=$RUN_USER" "--regid=$(id -g "$RUN_USER")"
			--init-groups --)
	fi
	cd "$WORK/run" || exit 1
	exec env -i "PATH=$BINDIR:$PATH" "HOME=$WORK/run" LANG=C.UTF-8 \
		"TERM=${TERM:-dumb}" "TMPDIR=$WORK/run/tmp" \
		${PGHOST+"PGHOST=$PGHOST"} ${PGPORT+"PGPORT=$PGPORT"} \
		${PGUSER+"PGUSER=$PGUSER"} ${PGDATABASE+"PGDATABASE=$PGDATABASE"} \
		${TEST_PRELOAD+"LD_PRELOAD=$TEST_PRELOAD"} \
		${ASAN_OPTIONS+"ASAN_OPTIONS=$ASAN_OPTIONS"} \
		"${drop[@]}" "$@"
}

# Runs a command as the unprivileged user.
as_user()
{
	(exec_as_user "$@")
}

# Runs a command as the user, in its own process group, and waits for it.
run_group()
{
	local pid rc=0

	set -m
	exec_as_user "$@" &
	pid=$!
	set +m
	GROUPS_STARTED+=("$pid")
	wait "$pid" || rc=$?
	return $rc
}

# Starts a command as the user that runs until the end of the script.
background()
{
	set -m
	exec_as_user "$@" &
	BACKGROUND_PID=$!
	set +m
	GROUPS_STARTED+=("$BACKGROUND_PID")
}

# Waits until none of the given processes is there, or gives up after 10 s.
gone()
{
	local pid i

	for pid; do
		for ((i = 0; i < 200; i++)); do
			kill -0 -- "$pid" 2>/dev/null || break
			sleep 0.05
		done
	done
}

# Stops everything that was started; keeps exit codes as they are.
processes_stop()
{
	local pid file pids=()

	for pid in "${GROUPS_STARTED[@]}"; do
		kill -TERM -- "-$pid" 2>/dev/null || true
	done
	while IFS= read -r file; do
		pid=$(head -n 1 "$file" 2>/dev/null) || continue
		case $pid in
			'' | *[!0-9]*) continue ;;
		esac
		# its own data directory is on the second line: no recycled pid
		[ "/proc/$pid/cwd" -ef "${file%/*}" ] || continue
		kill -QUIT "$pid" 2>/dev/null || true
		pids+=("$pid")
	done < <(find "$WORK" -name postmaster.pid 2>/dev/null)
	gone "${pids[@]}"
	for pid in "${GROUPS_STARTED[@]}"; do
		kill -KILL -- "-$pid" 2>/dev/null || true
	done
}

# Ends all processes and removes the directory, unless KEEPING is set.
workdir_close()
{
	local rc=$?

	trap '' HUP INT TERM
	set +e
	if [ -z "$WORK" ] || [ -n "${KEEPING:-}" ]; then
		exit $rc
	fi
	processes_stop 2>/dev/null
	if [ -n "${KEEP_WORK:-}" ]; then
		echo "kept: $WORK"
	else
		rm -rf "$WORK"
	fi
	exit $rc
}

# Runs make in the source tree; silent unless it fails.
build()
{
	"$MAKE" --no-print-directory -s -C "$SRC" PG_CONFIG="$PG_CONFIG" "$@"
}

# Prints the server's settings that find the staged extension.
stage_settings()
{
	local lib=$WORK/stage$PKGLIBDIR settings

	# not into grep -q: it would end the pipe early, which is an error here
	settings=$("$BINDIR/postgres" --describe-config)
	if [ "$PG_MAJOR" -ge 18 ]; then
		echo "extension_control_path = '$WORK/stage$SHAREDIR:\$system'"
	elif grep -q '^extension_destdir' <<<"$settings"; then
		echo "extension_destdir = '$WORK/stage'"
	else
		return 1
	fi
	echo "dynamic_library_path = '$lib:\$libdir'"
}

# Installs into $WORK/stage and writes the settings of all test clusters.  A
# server that finds extensions in its own directories only gets a real
# installation, but only when the caller allows that.
stage()
{
	if stage_settings >"$WORK/temp.conf"; then
		build DESTDIR="$WORK/stage" install
	else
		if [ -z "${SYSTEM_INSTALL:-}" ]; then
			die "this PostgreSQL $PG_MAJOR has no extension_destdir (Debian's have)
and can only be tested with the extension installed into
	$PKGLIBDIR
	$SHAREDIR/extension
Allow that with SYSTEM_INSTALL=1; \"make uninstall\" takes it back."
		fi
		echo "SYSTEM_INSTALL: installing into $PKGLIBDIR and $SHAREDIR"
		: >"$WORK/temp.conf"
		build install
	fi
	cat >>"$WORK/temp.conf" <<-'EOF'
		shared_preload_libraries = 'chat'
		shared_buffers = 16MB
		max_connections = 60
		max_worker_processes = 32
		max_prepared_transactions = 10
		max_wal_size = 1GB
		fsync = off
		log_line_prefix = '%m [%p] %b %q%a '
		log_min_messages = info
		log_checkpoints = off
	EOF
}

# Starts a private cluster $1 with the further settings $2.
cluster_start()
{
	local dir=$WORK/run/$1

	mkdir -p "$WORK/sock"
	chmod 700 "$WORK/sock"
	[ -z "$RUN_USER" ] || chown "$RUN_USER:" "$WORK/sock"
	unset PGSERVICE PGPASSWORD PGOPTIONS
	PGHOST=$WORK/sock
	PGUSER=postgres
	PGDATABASE=postgres
	as_user "$BINDIR/initdb" -D "$dir" -U postgres -A trust -N \
		--encoding=UTF8 --locale=C >"$WORK/initdb.log" 2>&1 ||
		{ cat "$WORK/initdb.log" >&2; die "initdb failed"; }
	# the port only names the socket, whose directory is ours
	PGPORT=5432
	{
		cat "$WORK/temp.conf"
		printf '%s\n' "listen_addresses = ''" \
			"unix_socket_directories = '$PGHOST'" "port = $PGPORT" "${2:-}"
	} | as_user tee -a "$dir/postgresql.conf" >/dev/null
	if ! as_user "$BINDIR/pg_ctl" -D "$dir" -l "$dir.log" -w -t 60 start \
		>"$WORK/pg_ctl.log" 2>&1; then
		tail -n 40 "$WORK/pg_ctl.log" "$dir.log" >&2 || true
		die "the server did not start"
	fi
}
