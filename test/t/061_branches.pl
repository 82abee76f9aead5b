# Are answers and questions replaced without being lost, and does the model
# see the branch that counts?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);

# The contents of a session as "sequence role content", those set aside with
# what took their place.
sub branches
{
	my ($session) = @_;
	return map {
		my $by = $_->{active} ? '' : " < $_->{superseded_by}";
		"$_->{sequence} $_->{role} $_->{content}$by"
	  } rows($node,
		"SELECT * FROM chat.get_chat_messages('$session', all_branches => true)");
}

# Calls a function and waits for the end of the task that it returns.
sub turn
{
	my ($call) = @_;
	my $task = $node->safe_psql('postgres', "SELECT chat.$call");
	my $row = wait_for_task($node, $task);
	is($row->{status}, 'completed', "$call completes");
	return $row;
}

# The messages of the last request, without the system prompt.
sub sent
{
	return map { "$_->{role} $_->{content}" }
	  grep { $_->{role} ne 'system' }
	  @{ $fake->last_request->{body}{messages} };
}

# SQLSTATE, text and detail of what a call raises.
sub raised
{
	my ($call) = @_;
	my ($rc, $out, $err) = $node->psql('postgres', "SELECT chat.$call",
		extra_params => [ '-v', 'VERBOSITY=verbose' ]);
	return $err =~ /ERROR:  (\w+): (.*?)\n(?:DETAIL:  (.*?)\n)?/
	  ? join(' | ', grep { defined } $1, $2, $3) : "no error: $out";
}

my $session = create_session($node, user_id => 'ada')->{id};
turn("stream_chat_completion('$session', 'one [[tokens=1]]')");
turn("stream_chat_completion('$session', 'two [[tokens=1]]')");
foreach my $call ("edit_message('$session', 1, 'other')", "regenerate('$session')")
{
	like($node->safe_psql('postgres', <<"EOS"), qr/^t$/m, "$call sets updated_at");
BEGIN;
UPDATE chat.chat_session SET updated_at = '2001-01-01' WHERE id = '$session';
DO \$\$ BEGIN PERFORM chat.$call; END \$\$;
SELECT updated_at = now() FROM chat.chat_session WHERE id = '$session';
ROLLBACK;
EOS
}

# regenerate: the last answer
my $task = turn("regenerate('$session')");
is_deeply(
	[ branches($session) ],
	[
		'1 user one [[tokens=1]]',
		'2 assistant t0 ',
		'3 user two [[tokens=1]]',
		'4 assistant t0  < 5',
		'5 assistant t0 ',
	],
	'the first answer is set aside, the second one is there');
is_deeply(
	[ sent() ],
	[
		'user one [[tokens=1]]', 'assistant t0 ',
		'user two [[tokens=1]]'
	],
	'the model is asked the question again and sees no answer to it');
is( row($node, "SELECT task_id FROM chat.chat_message"
		  . " WHERE session_id = '$session' AND sequence = 5")->{task_id},
	$task->{id},
	'the new answer is of the new task');

# regenerate: by the sequence of an answer, of its question
turn("regenerate('$session', sequence => 2)");
is_deeply([ sent() ], ['user one [[tokens=1]]'],
	'an earlier answer: the model sees nothing of what came after it');
is_deeply(
	[ branches($session) ],
	[
		'1 user one [[tokens=1]]',
		'2 assistant t0  < 6',
		'3 user two [[tokens=1]] < 6',
		'4 assistant t0  < 5',
		'5 assistant t0  < 6',
		'6 assistant t0 ',
	],
	'all that came after is set aside with it');
turn("regenerate('$session', 1, options => '{\"model\": \"other\"}')");
is($fake->last_request->{body}{model}, 'other', 'by the question, and with another model');
is((branches($session))[-1], '7 assistant t0 ', 'the answer is appended');

# a fork up to an answer that was set aside has it
my $fork = $node->safe_psql('postgres',
	"SELECT id FROM chat.fork_chat_session('$session', 5)");
is_deeply(
	[ branches($fork) ],
	[
		'1 user one [[tokens=1]]', '2 assistant t0 ',
		'3 user two [[tokens=1]]', '4 assistant t0 '
	],
	'a fork goes back to what was set aside');
turn("stream_chat_completion('$fork', 'three [[tokens=1]]')");
is(scalar(sent()), 5, 'and goes on from there');

# edit
$task = turn("edit_message('$session', 1, 'changed [[tokens=2]]')");
is_deeply([ sent() ], ['user changed [[tokens=2]]'],
	'the model sees the question as it is now');
is_deeply(
	[ (branches($session))[ 0, 6 .. 8 ] ],
	[
		'1 user one [[tokens=1]] < 8',
		'7 assistant t0  < 8',
		'8 user changed [[tokens=2]]',
		'9 assistant t0 t1 ',
	],
	'the question before it is kept');
is( row($node, "SELECT task_id FROM chat.chat_message"
		  . " WHERE session_id = '$session' AND sequence = 8")->{task_id},
	$task->{id},
	'the question is of the task that answers it');
is( row($node, "SELECT next_sequence FROM chat.chat_session WHERE id = '$session'")
	  ->{next_sequence},
	10, 'no sequence is left out');

# edit: what else the message holds stays
my $parts = create_session($node)->{id};
$node->safe_psql('postgres', "SELECT chat.add_chat_messages_batch('$parts', "
	  . literal(encode([ { role => 'user', name => 'ann',
				parts => [
					{ type => 'text', text => 'see' },
					{ type => 'image_url', image_url => { url => 'data:,x' } },
					{ type => 'text', text => 'there' }
				],
				metadata => { context => { url => 'https://example.com/' } } } ]))
	  . ')');
turn("edit_message('$parts', 1, 'look [[tokens=1]]')");
my $edited = row($node, "SELECT content, name, parts, metadata FROM chat.chat_message"
	  . " WHERE session_id = '$parts' AND sequence = 2");
is_deeply(
	$edited,
	{
		content => 'look [[tokens=1]]',
		name => 'ann',
		parts => [
			{ type => 'text', text => 'look [[tokens=1]]' },
			{ type => 'image_url', image_url => { url => 'data:,x' } }
		],
		metadata => { context => { url => 'https://example.com/' } }
	},
	'an edited message keeps its pictures, its author and its page');

# a question without an answer, an answer without a question
my $open = create_session($node)->{id};
$node->safe_psql('postgres', "SELECT chat.add_chat_message('$open', 'user', 'open [[tokens=1]]')");
turn("regenerate('$open')");
is_deeply([ branches($open) ], [ '1 user open [[tokens=1]]', '2 assistant t0 ' ],
	'a question without an answer gets one, and nothing is set aside');
my $alone = create_session($node)->{id};
like(raised("regenerate('$alone')"), qr/^55000 \| there is no message/, 'an empty session has nothing to answer');
$node->safe_psql('postgres', "SELECT chat.add_chat_message('$alone', 'assistant', 'hello')");
like(raised("regenerate('$alone')"), qr/^55000 \| there is no message/, 'nor has a greeting');

# the steps of a task without a question of its own are one answer
my $step = create_session($node)->{id};
turn("stream_chat_completion('$step', 'first [[tokens=1]]')");
turn("stream_chat_completion('$step', NULL)");
turn("regenerate('$step')");
is_deeply(
	[ branches($step) ],
	[ '1 user first [[tokens=1]]', '2 assistant t0 ', '3 assistant t0  < 4', '4 assistant t0 ' ],
	'a task that went on without a question is answered again by itself');

# what is refused
my $none = '00000000-0000-4000-8000-00000000dead';
foreach my $case (
	[ "regenerate('$none')", 'P0002 | session does not exist | ' ],
	[ "regenerate(NULL)", 'P0002 | session does not exist | ' ],
	[ "regenerate('$session', 99)", 'P0002 | message does not exist | .* 99' ],
	[ "regenerate('$session', 2)", 'P0002 | message does not exist | .* 2' ],
	[ "regenerate('$session', options => '{\"x\": 1}')", '22023 | ' ],
	[ "regenerate('$session', server => 'nowhere')", '42704 | ' ],
	[ "edit_message('$none', 1, 'x')", 'P0002 | session does not exist | ' ],
	[ "edit_message(NULL, 1, 'x')", 'P0002 | session does not exist | ' ],
	[ "edit_message('$session', NULL, 'x')", '22004 | sequence must not be null' ],
	[ "edit_message('$session', 8, NULL)", '22004 | content must not be null' ],
	[ "edit_message('$session', 99, 'x')", 'P0002 | message does not exist | ' ],
	[ "edit_message('$session', 1, 'x')", 'P0002 | message does not exist | ' ],
	[ "edit_message('$session', 9, 'x')", '22023 | only messages of a user .* | .* 9 is assistant' ],
	[ "edit_message('$session', 8, repeat('x', 64001))", '22001 | message is too long' ])
{
	my ($call, $pattern) = @$case;
	$pattern =~ s/\|/\\|/g;
	like(raised($call), qr/^$pattern/, "refused: $call");
}
is((branches($session))[-1], '9 assistant t0 t1 ', 'and nothing was set aside');

# somebody else's session is none
$node->safe_psql('postgres', "CREATE ROLE mallory; SELECT chat.grant_usage('mallory')");
foreach my $call ("regenerate('$session')", "edit_message('$session', 8, 'x')")
{
	my ($rc, $out, $err) = $node->psql('postgres', "SET ROLE mallory; SELECT chat.$call",
		extra_params => [ '-v', 'VERBOSITY=verbose' ]);
	like($err, qr/P0002/, "a stranger: $call");
}

# a session at work is not touched
my $running = ask($node, $session, 'busy [[gate=g]]');
$fake->wait_at_gate('g');
like(raised("regenerate('$session')"), qr/^55000 \| session is busy \| Task $running is running/,
	'a running task is named');
like(raised("edit_message('$session', 8, 'x')"), qr/^55000 \| session is busy \| Task $running is running/,
	'and nothing can be edited');
my $queued = ask($node, $session, 'behind [[tokens=1]]');
$fake->open_gate('g');
wait_for_task($node, $queued);
turn("regenerate('$session')");

# one that waits for an operation is busy only where its messages are
my $wait = create_session($node)->{id};
turn("stream_chat_completion('$wait', 'one [[tokens=1]]')");
turn("stream_chat_completion('$wait', 'two [[tokens=1]]')");
my $waiting = $node->safe_psql('postgres', <<"EOF");
UPDATE chat.chat_task SET status = 'waiting', detached = true, finished_at = NULL
WHERE id = (SELECT task_id FROM chat.chat_message WHERE session_id = '$wait' AND sequence = 2)
RETURNING id
EOF
$waiting =~ s/\n.*//s;
like(raised("regenerate('$wait', 2)"), qr/^55000 \| session is busy \| Task $waiting is waiting/,
	'a waiting task keeps its messages');
turn("regenerate('$wait', 4)");

# a transaction that is rolled back sets nothing aside
$node->safe_psql('postgres', "BEGIN; SELECT chat.regenerate('$fork'); ROLLBACK");
is(scalar(grep { / < / } branches($fork)), 0, 'rolled back: nothing is set aside');

# export and import of all of it
my $document = $node->safe_psql('postgres', "SELECT chat.export_chat_session('$session')");
$node->safe_psql('postgres', "SELECT chat.delete_chat_session('$session');"
	  . ' SELECT chat.import_chat_session(' . literal($document) . ')');
is($node->safe_psql('postgres', "SELECT chat.export_chat_session('$session')"), $document,
	'export and import bring back every branch');
is(scalar(rows($node, "SELECT 1 FROM chat.chat_task WHERE session_id = '$session'")), 0,
	'and no task');
turn("stream_chat_completion('$session', 'after [[tokens=1]]')");

done_testing();
