# P8: does a key stay where its owner put it?  Keys from a user mapping, from
# a file and from the environment; looked for in every table, in the log with
# everything switched on, in pg_stat_activity, in notifications and in errors
# (T59).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

my %key = map { $_ => "sk-$_-KEYOF\U$_\E0123456789" } qw(mapping file env wrong);
$ENV{CHAT_TEST_KEY} = $key{env};

my $fake = start_fake();
my $strict = start_fake('--api-key', 'the-right-one');
my $node = chat_cluster('main');
delete $ENV{CHAT_TEST_KEY};
my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/key", "$key{file}\n");
chmod 0600, "$dir/key";

create_server($node, $fake, key => $key{mapping});
$node->safe_psql('postgres',
	    server_sql($fake->port, name => 'from_file', key => undef)
	  . server_sql($fake->port, name => 'from_env', key => undef)
	  . server_sql($strict->port, name => 'refused', key => $key{wrong})
	  . server_sql($fake->port, name => 'down', key => $key{wrong},
		base_url => 'http://127.0.0.1:1/v1', retries => 0)
	  . 'CREATE USER MAPPING FOR PUBLIC SERVER from_file OPTIONS'
	  . " (api_key_file '$dir/key');"
	  . 'CREATE USER MAPPING FOR PUBLIC SERVER from_env OPTIONS'
	  . " (api_key_env 'CHAT_TEST_KEY');");
# the user's own statements are over: from here on everything is logged
$node->append_conf('postgresql.conf', <<'EOF');
log_min_error_statement = debug5
log_statement = all
log_min_duration_statement = 0
log_error_verbosity = verbose
log_parameter_max_length = -1
log_parameter_max_length_on_error = -1
debug_print_parse = on
debug_print_plan = on
track_activity_query_size = 100000
EOF
{
	local $ENV{CHAT_TEST_KEY} = $key{env};
	$node->restart;
}
# the postmaster itself logs its environment at this level when it starts
$node->append_conf('postgresql.conf', 'log_min_messages = debug5');
$node->reload;
wait_for_worker($node);

my @seen;

# Sends a message to a server; returns the session's row.
sub send_to
{
	my ($server, $message) = @_;
	my $session = create_session($node, server => $server);
	my $listener = listener($node, $session->{channel});
	my $task = ask($node, $session->{id}, $message);

	if ($message =~ /gate=/)
	{
		$fake->wait_at_gate('g');
		push @seen, $node->safe_psql('postgres',
			'SELECT * FROM pg_stat_activity');
		$fake->open_gate('g');
	}
	push @seen, map { $_->{payload} } $listener->until(
		sub { ($_[0]{type} // '') =~ /^(finish|abort)$/ });
	$listener->stop;
	return wait_for_task($node, $task);
}

foreach my $server (qw(fake from_file from_env))
{
	is(send_to($server, 'hello [[tokens=3 gate=g]]')->{status},
		'completed', "server $server answers");
}
is_deeply(
	[ map { $_->{headers}{authorization} } $fake->completions ],
	[ map { "Bearer $key{$_}" } qw(mapping file env) ],
	'the endpoint got each of the keys');
my $failed = send_to('refused', 'hello');
is($failed->{error}{code}, 'authentication_failed', 'a wrong key is refused');
my ($echo) = map { $_->{headers}{authorization} } $strict->last_request;
is($echo, "Bearer $key{wrong}", 'though it was sent');
like($failed->{error}{message}, qr/\S/,
	"the error says: $failed->{error}{message}");
push @seen, encode($failed);
push @seen, encode(send_to('down', 'hello'));
push @seen, encode(send_to('from_file', "x [[error_at=1 errmsg=bad%20request]]"));

# a file that goes before the worker reads it, a variable that is not there
my $worker = wait_for_worker($node);
pause_worker($node, $worker);
my $gone = ask($node, create_session($node, server => 'from_file')->{id}, 'x');
unlink "$dir/key";
kill 'CONT', $worker;
$failed = wait_for_task($node, $gone);
is($failed->{status}, 'failed', 'a key file that is gone fails the task');
push @seen, encode($failed);
$node->restart;
foreach my $server (qw(from_file from_env))
{
	my $id = create_session($node)->{id};
	my ($ret, $out, $err) = $node->psql('postgres',
		"SELECT chat.stream_chat_completion('$id', 'x', server => '$server')");
	like($err, qr/key/, "the call says that the key of $server is missing");
	push @seen, $err;
}
push @seen,
  join ' ', $node->psql('postgres', "SELECT * FROM chat.test_server('$_')")
  foreach qw(fake refused down from_env);
push @seen, $node->safe_psql('postgres', 'SELECT * FROM chat.check_installation()');
push @seen, $node->safe_psql('postgres',
	'SELECT chat.get_chat_session(id), chat.to_openai_messages(id)'
	  . ' FROM chat.chat_session');
# while it streams, also what is in the queue
my $task = ask($node, create_session($node)->{id}, 'queue [[gate=q]]');
$fake->wait_at_gate('q');
foreach my $table (rows($node, "SELECT c.oid::regclass::text AS name"
	  . " FROM pg_class AS c WHERE relnamespace = 'chat'::regnamespace"
	  . " AND relkind IN ('r', 'v')"))
{
	push @seen, $node->safe_psql('postgres', "SELECT * FROM $table->{name}");
}
push @seen, $node->safe_psql('postgres', 'SELECT * FROM pg_locks, pg_stat_activity');
$fake->open_gate('q');
wait_for_task($node, $task);
my $log = slurp_file($node->logfile);
cmp_ok(length($log), '>', 100000, 'the log is long');
like($log, qr/chat worker DEBUG/, 'and tells of the worker');

foreach my $name (sort keys %key)
{
	my $secret = $key{$name};
	my ($line) = grep { index($_, $secret) >= 0 } @seen;
	is($line, undef, "P8: the key ($name) is in no table, view, event or error");
	my $at = index($log, $secret);
	is($at < 0 ? undef : substr($log, $at > 300 ? $at - 300 : 0, 700),
		undef, "P8: the key ($name) is not in the log");
}

done_testing();
