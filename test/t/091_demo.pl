# Does "make demo" show what it promises, keep the key to itself, and leave
# nothing behind: when it ends, when it is interrupted, and when it was told to
# keep the cluster?  Built is everything already; make only copies here.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use IPC::Run ();
use PostgreSQL::Test::Utils;
use Test::More;

my $root = "$FindBin::RealBin/../..";
my $timeout = $PostgreSQL::Test::Utils::timeout_default;
my $tmp = PostgreSQL::Test::Utils::tempdir_short();
my $make = "$tmp/make";
my ($stage) = ($ENV{CHAT_LIBRARY} // '') =~ m{^(.*/stage)/};
my %clean = (%ENV, TMPDIR => "$tmp/work", MAKE => $make);

delete @clean{grep { /^PG(?!_CONFIG$)|^CHAT_(?!LIBRARY)|^TEST|^MESSAGE$|^KEEP/ } keys %clean};
mkdir "$tmp/work" or die $!;
append_to_file($make, <<"EOS");
#!/bin/sh
for argument; do
	case \$argument in
		DESTDIR=*) mkdir -p "\${argument#*=}" && cp -r "${\($stage // '')}/." "\${argument#*=}/" ;;
	esac
done
EOS
chmod 0755, $make;

# Starts the demo; returns what runs, and where its output goes.  With by_make,
# as one types it.
sub start_demo
{
	my (%set) = @_;
	my $out = '';
	my @command = ("$root/test/demo.sh");

	@command = ('make', '-C', $root, 'demo', "MAKE=$make", map { "$_=$set{$_}" } keys %set)
	  if delete $set{by_make};
	local %ENV = (%clean, @command > 1 ? () : %set);
	my $demo = IPC::Run::start([@command],
		'<', \undef, '>', \$out, '2>&1', IPC::Run::timer($timeout));
	return ($demo, \$out);
}

# Runs the demo to its end; returns what it printed.
sub run_demo
{
	my ($demo, $out) = start_demo(@_);

	ok($demo->finish, 'the demo succeeds') or diag($$out);
	return $$out;
}

# Returns the command line of a process; empty when it is gone.
sub cmdline
{
	my ($process) = @_;
	open my $in, '<', "$process/cmdline" or return '';
	return readline($in) // '';
}

# Checks that neither files nor processes are left.
sub is_clean
{
	my ($what) = @_;

	is_deeply([ glob "$tmp/work/*" ], [], "$what: no file is left");
	my @left = grep { /\Q$tmp\E\/work/ } map { cmdline($_) } glob '/proc/[0-9]*';
	is_deeply(\@left, [], "$what: no process is left");
	return;
}

# Ctrl-C, as a terminal sends it, while "make check" looks for a compiler that
# can fuzz: this one takes its time
{
	mkdir "$tmp/bin" or die $!;
	foreach my $name ('clang', map { "clang-$_" } 11 .. 30)
	{
		append_to_file("$tmp/bin/$name", "#!/bin/sh\n: >'$tmp/looking'\nexec sleep 600\n");
		chmod 0755, "$tmp/bin/$name";
	}
	local %ENV = (%clean, PATH => "$tmp/bin:$ENV{PATH}");
	my $deps = IPC::Run::start([ "$root/test/install-deps", 'check' ],
		'<', \undef, '>', \my $out, '2>&1', init => sub { setpgrp },
		IPC::Run::timer($timeout));
	wait_until('it looks', sub { -e "$tmp/looking" });
	kill 'INT', -$deps->{KIDS}[0]{PID};
	$deps->finish;
	isnt($deps->full_result, 0, 'it does not go on');
	is_clean('Ctrl-C while it looks what is missing');
}

# where nothing is there and nothing can be installed, it says what is wanted
{
	mkdir "$tmp/bare" or die $!;
	foreach my $name (qw(bash echo env id sed head xargs dirname rm mktemp cat perl))
	{
		my ($path) = grep { -x } map { "$_/$name" } split /:/, $ENV{PATH};
		symlink $path, "$tmp/bare/$name" or die "$name: $!" if $path;
	}
	local %ENV = (%clean, PATH => "$tmp/bare", PG_CONFIG => '/nowhere/pg_config');
	foreach my $goal (qw(demo check))
	{
		my $deps = IPC::Run::start([ "$root/test/install-deps", $goal ],
			'<', \undef, '>', \my $out, '2>', \my $err, IPC::Run::timer($timeout));
		$deps->finish;
		is($deps->full_result, 256, "$goal, with nothing to install by: an error");
		is($out, '', '  nothing is installed');
		like($err, qr/^chat: something is missing for "make $goal"\.$/m, '  which says so');
		like($err, qr/^By the names of Debian's packages: gcc libc6-dev libcurl4-openssl-dev libpq-dev postgresql-\d+ postgresql-server-dev-\d+/m,
			'  and what has to be there');
		(($goal eq 'check') ? \&like : \&unlike)->($err, qr/packages: .*clang/, '  for this goal');
	}

	# with apt-get, but without the right to use it
	symlink "$FindBin::RealBin/lib/shims/apt-get", "$tmp/bare/apt-get" or die $!;
	my $deps = IPC::Run::start([ "$root/test/install-deps", '--tell', 'demo' ],
		'<', \undef, '>', \my $out, '2>', \my $err, IPC::Run::timer($timeout));
	$deps->finish;
	is($deps->full_result, 256, 'with apt-get, but told not to use it: an error');
	like($err, qr/^    apt-get install --no-install-recommends gcc .*postgresql-\d+/m, '  that is the command');
	is_clean('install-deps');
}

SKIP:
{
	skip 'the extension is installed, not staged', 1 unless $stage;

	# with the bundled endpoint
	my $text = run_demo(by_make => 1, MESSAGE => 'Is $HOME "quoted"? [[text=Indeed%20it%20is.]]');
	my @steps = (
		qr/CREATE EXTENSION chat;\nCREATE EXTENSION/,
		qr/CREATE SERVER demo FOREIGN DATA WRAPPER chat_llm/,
		qr/CREATE USER MAPPING FOR PUBLIC SERVER demo\s+OPTIONS \(api_key_file/,
		qr/FROM chat\.create_chat_session\(user_id => 'ada'/,
		qr/LISTEN chat_[0-9a-f]{32};\nLISTEN/,
		qr/chat\.stream_chat_completion\(session_id => .*\s+message => 'Is \$HOME "quoted"\?/,
		qr/^Indeed it is\.$/m,
		qr/1 \| user +\| Is \$HOME "quoted"\? .*\n +2 \| assistant \| Indeed it is\./,
		qr/status +\| steps \| prompt_tokens \| completion_tokens *\n[-+]+\n completed +\| +1 \| +\d+ \| +\d+/,
		qr/first token \d+\.\d ms after the call/,
		qr/SET ROLE ada;\nSET\nchat=> CREATE TABLE/,
		qr/^calls order_status \{"order_id": 1042\}$/m,
		qr/-- play on\n\s*make demo .*\n\s*make demo .*\n\s*make demo KEEP=1/);
	my $at = 0;
	foreach my $step (@steps)
	{
		pos($text) = $at;
		ok($text =~ /$step/g, "it shows, in this order: $step") or diag($text);
		$at = pos($text) // $at;
	}
	unlike($text, qr/not-a-secret/, 'without the key');
	is_clean('a demo that has ended');

	# with an endpoint of somebody's own
	my $fake = start_fake('--api-key', 'sk-my-own-key-0123456789');
	$text = run_demo(
		CHAT_BASE_URL => 'http://127.0.0.1:' . $fake->port . '/v1',
		CHAT_MODEL => 'mine-1',
		CHAT_API_KEY => 'sk-my-own-key-0123456789',
		MESSAGE => 'Hello [[text=From%20elsewhere.]]');
	like($text, qr/^From elsewhere\.$/m, 'CHAT_BASE_URL answers');
	my ($first) = $fake->completions;
	is($first->{body}{model}, 'mine-1', 'CHAT_MODEL is asked');
	is($first->{headers}{authorization}, 'Bearer sk-my-own-key-0123456789',
		'CHAT_API_KEY is sent');
	unlike($text, qr/sk-my-own/, 'and is not shown');

	# with a key that is none there
	my ($demo, $out) = start_demo(
		CHAT_BASE_URL => 'http://127.0.0.1:' . $fake->port . '/v1',
		CHAT_API_KEY => 'sk-wrong-key-0123456789');
	ok(!$demo->finish, 'with a wrong key it fails');
	like($$out, qr/^Incorrect API key provided: \[redacted\]/m, 'and says why');
	unlike($$out, qr/LOG:/, 'without the log of its server');
	is_clean('a demo that has failed');

	# interrupted in the middle of an answer
	foreach my $signal (qw(INT TERM))
	{
		my ($demo, $out) = start_demo(
			MESSAGE => 'x [[tokens=100 delay=1000 text=one%20two%20three]]');
		$demo->pump until $$out =~ /one/;
		$demo->signal($signal);
		$demo->finish;
		isnt($demo->full_result, 0, "$signal: it says that it did not end");
		is_clean("$signal in the middle");
	}

	# kept, played with, and stopped as it says
	$text = run_demo(KEEP => 1, MESSAGE => 'Hi [[text=Still%20here.]]');
	my ($connect) = $text =~ /^\s*connect +(.*)$/m;
	my ($try) = $text =~ /^\s*try +(.*)$/m;
	my ($stop) = $text =~ /^\s*stop +(.*)$/m;
	my $answer = '';
	ok(IPC::Run::run([ 'sh', '-c', "$connect -XAt" ], '<', \$try, '>', \$answer,
			IPC::Run::timer($timeout)), 'KEEP=1: the line that connects');
	like($answer, qr/\S/, "KEEP=1: $try");
	ok(!system('sh', '-c', "($stop) >/dev/null"), 'KEEP=1: the line that stops');
	wait_until('its processes end', sub { !glob "$tmp/work/*" });
	is_clean('KEEP=1, stopped');
}

done_testing();
