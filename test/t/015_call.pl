# Does stream_chat_completion take what it should, once, and refuse the rest
# with an error at the call?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => <<'EOF');
chat.max_message_length = 100
EOF
create_server($node, $fake, retries => 0);
my $session = create_session($node, user_id => 'ada');
my $id = $session->{id};
my $unknown = '00000000-0000-0000-0000-000000000000';

# Checks that a call raises an error with this SQLSTATE.
sub refused
{
	my ($args, $state, $text, $label, $setup) = @_;
	my ($rc, $out, $err) = $node->psql(
		'postgres',
		'\set VERBOSITY verbose' . "\n"
		  . ($setup // '')
		  . ";SELECT chat.stream_chat_completion($args);");

	like($err, qr/ERROR:  \Q$state\E: /, "$label: $state");
	like($err, $text, "$label: text");
	return;
}

refused("'$unknown', 'hi'", 'P0002', qr/\Q$unknown\E/, 'unknown session');
refused("NULL, 'hi'", 'P0002', qr/session/, 'no session');
refused("'$id', 'hi', user_id => 'bob'", 'P0002', qr/\Q$id\E/, 'wrong user');
my $anonymous = create_session($node)->{id};
refused("'$anonymous', 'hi', user_id => 'ada'", 'P0002', qr/\Q$anonymous\E/,
	'a user for an anonymous session');
refused("'$anonymous', 'hi', user_id => ''", 'P0002', qr/\Q$anonymous\E/,
	'an empty user for it');
refused("'$id', repeat('x', 101)", '22001', qr/101.*100/s, 'too long');
refused("'$id', 'hi', context => '[]'", '22023', qr/context/, 'bad context');
refused("'$id', 'hi', context => '{\"x\": 1}'",
	'22023', qr/url/, 'unknown member of the context');
refused("'$id', 'hi', options => '{\"modle\": \"x\"}'",
	'22023', qr/modle.*Valid are.*model/s, 'unknown option');
refused("'$id', 'hi', options => '{\"temperature\": 3}'",
	'22023', qr/temperature/, 'option out of range');
refused("'$id', 'hi', server => 'nosuch'",
	'42704', qr/nosuch/, 'unknown server');
refused("'$id', 'hi'", '42704', qr/chat\.default_server/,
	'no server at all', "SET chat.default_server = ''");
$node->safe_psql('postgres',
	"CREATE SERVER keyless FOREIGN DATA WRAPPER chat_llm OPTIONS"
	  . " (base_url 'https://api.example.com/v1', model 'm');"
	  . "CREATE SERVER keyfile FOREIGN DATA WRAPPER chat_llm OPTIONS"
	  . " (base_url 'https://api.example.com/v1', model 'm');"
	  . "CREATE USER MAPPING FOR PUBLIC SERVER keyfile OPTIONS"
	  . " (api_key_file '/nonexistent/key');"
	  . "CREATE SERVER modelless FOREIGN DATA WRAPPER chat_llm OPTIONS"
	  . " (base_url 'http://127.0.0.1:1/v1')");
refused("'$id', 'hi', server => 'keyless'",
	'42704', qr/key/, 'no key where one is needed');
refused("'$id', 'hi', server => 'keyfile'",
	'F0000', qr/could not read the API key/, 'a key that cannot be read');
refused("'$id', 'hi', server => 'modelless'",
	'HV002', qr/has no model/, 'no model');
$node->safe_psql('postgres', <<'EOF');
CREATE ROLE app LOGIN;
SELECT chat.grant_usage('app');
EOF
my $own = $node->safe_psql('postgres',
	"SELECT (chat.create_chat_session(owner => 'app')).id");
refused("'$own', 'hi'", '42501', qr/fake/, 'no USAGE on the server',
	'SET ROLE app');
refused("'$id', 'hi'", 'P0002', qr/session/, 'somebody else\'s session',
	'SET ROLE app');
$node->safe_psql('postgres', 'GRANT USAGE ON FOREIGN SERVER fake TO app');
is(scalar $fake->completions, 0, 'no error was told by a request');
is( row($node, 'SELECT count(*) AS n FROM chat.chat_task')->{n},
	0, 'none has left a task');

# what is allowed
my $turn = turn_of($node,
	ask($node, $id, "\xc3\xa9" x 87 . '[[tokens=1]]', user_id => 'ada'));
is($turn->{status}, 'completed', 'characters count, not bytes; the user is right');
$turn = turn_of($node, $node->safe_psql('postgres',
	"SET ROLE app; SELECT chat.stream_chat_completion('$own', 'hi [[tokens=1]]')"));
is($turn->{status}, 'completed', 'a role with USAGE may');

# T49, T53: the same message id again is the same task, and no second request
my $message = '11111111-2222-3333-4444-555555555555';
$fake->forget;
my $task = ask($node, $id, 'once [[tokens=2 gate=g]]', message_id => $message);
$fake->wait_at_gate('g');
is(ask($node, $id, 'once [[tokens=2 gate=g]]', message_id => $message),
	$task, 'T53: the same task while it runs');
$fake->open_gate('g');
$turn = turn_of($node, $task);
is(ask($node, $id, 'once', message_id => $message),
	$task, 'T53: the same task when it is over');
is(scalar $fake->completions, 1, 'T53: one request');
my @stored = rows($node,
	"SELECT role, content FROM chat.chat_message WHERE id = '$message'");
is_deeply(\@stored, [ { role => 'user', content => 'once [[tokens=2 gate=g]]' } ],
	'T53: the message is stored once, under its id');
my $other = create_session($node)->{id};
isnt(ask($node, $other, '[[tokens=1]]', message_id => $message),
	$task, 'the id counts within its session only');
my $clash = '11111111-2222-3333-4444-666666666666';
$node->safe_psql('postgres',
	"SELECT chat.add_chat_message('$id', 'user', 'x', message_id => '$clash')");
refused("'$id', 'hi', message_id => '$clash'",
	'23505', qr/message id/, 'an id of a message that started no task');

# T53: a race of two calls with one id
my $raced = '11111111-2222-3333-4444-777777777777';
my $first = $node->background_psql('postgres');
$first->query_safe('BEGIN');
my $one = $first->query_safe("SELECT chat.stream_chat_completion('$id',"
	  . " 'r [[tokens=1]]', message_id => '$raced')");
$fake->forget;
$first->query_safe('COMMIT');
$first->quit;
is(ask($node, $id, 'r', message_id => $raced), $one,
	'T49: who lost the answer asks again and gets the task');
turn_of($node, $one);
is(scalar $fake->completions, 1, 'one request');

# worker_status
my $status = row($node, 'SELECT * FROM chat.worker_status()');
like($status->{pid}, qr/^\d+$/, 'worker_status: pid');
is($status->{state}, 'running', 'worker_status: state');
cmp_ok($status->{completed}, '>=', 4, 'worker_status: completed tasks');
cmp_ok($status->{requests}, '>=', 4, 'worker_status: requests');
cmp_ok($status->{events}, '>', 20, 'worker_status: events');
is($status->{open_streams}, 0, 'worker_status: nothing is open');
my $open = ask($node, create_session($node)->{id}, '[[tokens=1 gate=h]]');
$fake->wait_at_gate('h');
is( row($node, 'SELECT open_streams FROM chat.worker_status()')->{open_streams},
	1, 'worker_status: one stream is open');
$fake->open_gate('h');
turn_of($node, $open);

done_testing();
