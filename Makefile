# chat: durable chat runtime in PostgreSQL
#
#   make demo           watch an answer stream out of PostgreSQL
#   make check          build and run every test in private clusters
#   make bench          throughput and latency, beside a bare client
#   make chaos          half an hour of random turns, faults and crashes
#   make && make install && make installcheck      the usual PGXS way
#
# The first four install what they miss (apt, as root on Debian; otherwise
# they say what to install), leave the installed server and its clusters
# alone, and clean up.  PG_CONFIG chooses another PostgreSQL, COPT adds
# compiler flags.

PG_CONFIG ?= pg_config

# Goals that work without any PostgreSQL; the rest is PGXS's.
FRONT = check check-aimock check-asan chaos demo bench

ifneq (,$(filter $(FRONT),$(MAKECMDGOALS)))

# As typed: make would expand a dollar sign in the message or the key.
override MESSAGE := $(value MESSAGE)
override CHAT_API_KEY := $(value CHAT_API_KEY)
export MESSAGE CHAT_API_KEY CHAT_BASE_URL CHAT_MODEL KEEP
export PG_CONFIG COPT FUZZ_SECONDS CHAOS_SECONDS CHAOS_SEED SYSTEM_INSTALL MAKE

check:
	@test/install-deps check
	@test/run $(SUITES)

# the runtime against another implementation of the API, from npm
check-aimock:
	@test/install-deps check
	@test/run aimock

chaos:
	@test/install-deps check
	@CHAOS_SECONDS=$${CHAOS_SECONDS:-1200} CHAOS_RUNS=200 SUITE_TIMEOUT=3600 \
	  test/run chaos test/t/086_tool_chaos.pl

# suites under AddressSanitizer and UndefinedBehaviorSanitizer
check-asan:
	@test/install-deps check
	@test/sanitize.sh $(SUITES)

demo:
	@test/install-deps demo
	@test/demo.sh

bench:
	@test/install-deps bench
	@test/bench.sh $(LOADS)

# make clean check
$(filter-out $(FRONT),$(MAKECMDGOALS)):
	@$(MAKE) --no-print-directory $@

.PHONY: $(MAKECMDGOALS)

else

MODULE_big = chat
EXTENSION = chat
CHAT_VERSION := $(shell sed -n "s/^default_version = '\(.*\)'/\1/p" chat.control)
DATA = $(wildcard sql/chat--*.sql)
SRCS = $(wildcard src/*.c)
OBJS = $(SRCS:.c=.o)

PG_CPPFLAGS = $(shell curl-config --cflags) -Isrc \
	-isystem $(includedir_server) -DCHAT_VERSION='"$(CHAT_VERSION)"'
PG_CFLAGS = -Wextra -Wno-unused-parameter
SHLIB_LINK = $(shell curl-config --libs)

# Bitcode would serve inlining into queries; nothing here is that hot.
override with_llvm := no

# Only what the server looks up is exported.  16 and later see to it.
EXPORTS = $(if $(filter 15-linux,$(MAJORVERSION)-$(PORTNAME)),build/chat.exports)
EXPORTS_FLAG = -Wl,--version-script=$(EXPORTS)
SHLIB_LINK += $(if $(EXPORTS),$(EXPORTS_FLAG))

# Regression tests, in this order; the first one creates the extension.
# Inputs are sql/NAME.sql, expected output is in expected/NAME.out.
REGRESS = install endpoint session message upsert prompt branch tool operation access
REGRESS_OPTS = --encoding=UTF8

# Isolation specs: test/isolation/specs/NAME.spec
ISOLATION = $(notdir $(basename $(wildcard test/isolation/specs/*.spec)))
ISOLATION_OPTS = --inputdir=$(srcdir)/test/isolation --encoding=UTF8

TAP_TESTS = 1
PROVE_TESTS = $(wildcard test/t/*.pl)

EXTRA_CLEAN = build

PGXS := $(shell $(PG_CONFIG) --pgxs 2>/dev/null)

ifneq (,$(and $(wildcard $(PGXS)),$(shell command -v curl-config)))

include $(PGXS)

$(OBJS): $(wildcard src/*.h) chat.control Makefile

$(shlib): $(EXPORTS)

build/chat.exports: $(SRCS)
	@mkdir -p build
	{ echo '{ global: Pg_magic_func; _PG_init;'; \
	  sed -n 's/^PG_FUNCTION_INFO_V1(\([a-z0-9_]*\)).*/\1; pg_finfo_\1;/p' \
	  $(SRCS); \
	  sed -n 's/^extern PGDLLEXPORT void \([a-z_]*\)(.*/\1;/p' \
	  src/*.h; echo 'local: *; };'; } >$@

#
# What the tests need beside the extension, all of it in build/
#

# Programs of one file: the fake endpoint, the listener, the demo, the bench
TOOLS = $(patsubst test/%.c,build/%,$(wildcard test/*.c))
UNIT = $(patsubst test/%.c,build/%,$(wildcard test/unit/test_*.c))
FUZZ = $(patsubst test/%.c,build/%,$(wildcard test/fuzz/fuzz_*.c))

TOOL_CFLAGS = -O2 -g -Wall -Wextra -D_GNU_SOURCE $(COPT)
FRONTEND_CFLAGS = -g -Wall -Wextra -Wno-unused-parameter -D_GNU_SOURCE \
	-DFRONTEND -fno-strict-aliasing -fwrapv $(COPT) -Isrc \
	-isystem $(includedir_server) -isystem $(includedir)
FRONTEND_LIBS = -L$(pkglibdir) -L$(libdir) -lpgcommon -lpgport -lm
FUZZ_CC = $(or $(CLANG),clang)

# Libraries that a server of a test loads before all others
PRELOAD = $(patsubst test/preload/%.c,build/%.so,$(wildcard test/preload/*.c))

tools: $(TOOLS) $(PRELOAD)
unit: $(UNIT)
fuzz: $(FUZZ)

$(TOOLS): build/%: test/%.c
	@mkdir -p $(@D)
	$(CC) $(TOOL_CFLAGS) -I$(includedir) $(shell curl-config --cflags) \
	  -o $@ $< -L$(libdir) -Wl,--as-needed -lpq \
	  $(shell curl-config --libs) -lpthread -lm

$(PRELOAD): build/%.so: test/preload/%.c
	@mkdir -p $(@D)
	$(CC) $(TOOL_CFLAGS) -fPIC -shared -o $@ $<

# They include the source that they test.
$(UNIT) $(FUZZ): $(wildcard src/*.[ch] test/unit/*.h test/fuzz/*.h)

$(UNIT): build/%: test/%.c
	@mkdir -p $(@D)
	$(CC) -O2 $(FRONTEND_CFLAGS) -o $@ $< $(FRONTEND_LIBS)

$(FUZZ): build/%: test/%.c
	@mkdir -p $(@D)
	$(FUZZ_CC) -O1 -fsanitize=fuzzer,address,undefined \
	  -fno-sanitize-recover=undefined $(FRONTEND_CFLAGS) -o $@ $< \
	  $(FRONTEND_LIBS)

installcheck: tools

# What test/run and the scripts ask
print-%:
	@echo $($*)

.PHONY: tools unit fuzz

else

all install installcheck uninstall tools unit fuzz:
	@test/install-deps --tell build

clean:
	rm -rf $(OBJS) chat.so $(EXTRA_CLEAN)

print-CHAT_VERSION:
	@echo $(CHAT_VERSION)

.PHONY: all install installcheck uninstall tools unit fuzz clean

endif
endif
