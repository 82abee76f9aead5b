#!/bin/bash
#
# sanitize.sh: test suites under AddressSanitizer and
# UndefinedBehaviorSanitizer
#
#	test/sanitize.sh [SUITE | TEST-FILE ...]
#
# Takes what test/run takes; without arguments, the suites regress, isolation
# and unit, and the TAP files of requests, answers and tools.  Builds in a copy
# of the tree.  Every process of the tests runs with the sanitizers, the
# server's, too; what they report is printed at the end and fails the run.
# Leaks are not looked for: the server leaves its memory to the end of the
# process.

set -euo pipefail

cd "$(dirname "$0")/.."
DIR=$(mktemp -d "${TMPDIR:-/tmp}/chat-sanitize.XXXXXX")
trap 'rm -rf "$DIR"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
chmod 755 "$DIR"
mkdir -m 1777 "$DIR/reports"
mkdir "$DIR/tree"
for path in .ci Makefile META.json README.md CHANGELOG.md LICENSE chat.control \
	sql expected src test; do
	cp -r "$path" "$DIR/tree/"
done
rm -f "$DIR"/tree/src/*.[od]

# libasan looks this name up, and on Debian 12 the server then waits for itself
echo 'char *swift_demangle(void); char *swift_demangle(void) { return 0; }' |
	gcc -shared -fPIC -x c -o "$DIR/stub.so" -

# Undefined behaviour traps, and AddressSanitizer tells where: two runtimes in
# a process would contend for the file of the report.
TEST_PRELOAD="$(gcc -print-file-name=libasan.so) $DIR/stub.so"
ASAN_OPTIONS="detect_leaks=0:handle_sigill=1:log_path=$DIR/reports/asan"
COPT="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined"
COPT+=" -fsanitize-undefined-trap-on-error"
export TEST_PRELOAD ASAN_OPTIONS COPT

[ $# != 0 ] || set -- regress isolation unit test/t/001_main_job.pl \
	test/t/02[0-9]_*.pl test/t/046_nologin.pl
rc=0
"$DIR/tree/test/run" "$@" || rc=$?
reports=$(find "$DIR/reports" -type f | wc -l)
find "$DIR/reports" -type f -exec head -n 60 {} +
echo "$reports reports of the sanitizers"
[ "$rc" = 0 ] && [ "$reports" = 0 ]
