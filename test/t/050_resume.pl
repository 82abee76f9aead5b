# Can a reader that comes late, or comes back, have the whole stream and
# nothing twice, and the message so far at any point?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);
my $session = create_session($node, user_id => 'ada');

# Returns task_snapshot() of a task.
sub snapshot
{
	my ($task) = @_;
	return decode($node->safe_psql('postgres',
		"SELECT chat.task_snapshot('$task')"));
}

# Returns the text of a message's text parts.
sub text_of_message
{
	my ($message) = @_;
	return join '', map { $_->{text} }
	  grep { $_->{type} eq 'text' } @{ $message->{parts} };
}

# a stream that stands in the middle
my $task = ask($node, $session->{id},
	'go [[reasoning=2 tokens=6 gateat=4:mid]]');
$fake->wait_at_gate('mid');
wait_for($node,
	"SELECT chat.task_snapshot('$task')->'message'->>'parts' LIKE '%t1 %'");
my $half = snapshot($task);
is($half->{status}, 'running', 'a snapshot tells the status');
is($half->{message}{role}, 'assistant', 'it has a message');
my ($start) = events($node, $task);
is($half->{message}{id}, $start->{messageId}, 'with the id of the stream');
is_deeply(
	[ map { $_->{type} } @{ $half->{message}{parts} } ],
	[qw(step-start reasoning text)],
	'of the parts so far');
is($half->{message}{parts}[1]{state}, 'done', 'the reasoning is over');
is($half->{message}{parts}[2]{state}, 'streaming', 'the text is not');
is(text_of_message($half->{message}), 't0 t1 ', 'T41: the text so far');

# from the snapshot on
$fake->open_gate('mid');
my $row = wait_for_task($node, $task);
my @rest = events($node, $task, $half->{seq});
is( text_of_message($half->{message}) . text_of(@rest),
	't0 t1 t2 t3 t4 t5 ',
	'T41: snapshot and the events after it are the whole, nothing twice');
my $whole = snapshot($task);
is($whole->{status}, 'completed', 'the snapshot of a task that has ended');
is($whole->{seq}, $rest[-1]{seq}, 'reaches its last event');
is_deeply(
	[ map { $_->{state} // '-' } @{ $whole->{message}{parts} } ],
	[qw(- done done)], 'all parts are done');
ok($whole->{message}{metadata}{usage}, 'with the usage');

# pages
my @all = events($node, $task);
my @paged;
my $after = 0;
while (1)
{
	my @page = map { $_->{payload} } rows($node,
		"SELECT payload FROM chat.get_task_events('$task', $after, 3)");
	last unless @page;
	cmp_ok(scalar @page, '<=', 3, 'a page has no more rows than asked for');
	push @paged, @page;
	$after = $page[-1]{seq};
}
is_deeply(\@paged, \@all, 'T44: the pages are the stream');
my ($code, undef, $error) = $node->psql('postgres',
	"SELECT * FROM chat.get_task_events('$task', 0, -1)");
isnt($code, 0, 'a negative number of rows is refused');
like($error, qr/max_rows must not be negative/, 'with a clear error');

# what was taken back
my $other = create_session($node);
my $again = ask($node, $other->{id},
	'again [[tokens=8 cutafter=5 times=1 rst=1]]');
wait_for_task($node, $again);
my @events = events($node, $again);
ok((grep { $_->{type} eq 'reset-step' } @events),
	'a second attempt opens with reset-step');
is(text_of_message(snapshot($again)->{message}),
	't0 t1 t2 t3 t4 t5 t6 t7 ', 'T48: the snapshot has one attempt');

# a failed one
my $failed = ask($node, $other->{id}, 'no [[status=400 errmsg=nope]]');
wait_for_task($node, $failed);
my $broken = snapshot($failed);
is($broken->{status}, 'failed', 'the snapshot of a task that failed');
like($broken->{error}{message}, qr/nope/, 'says why');

# tools that nobody knows are part of the message, too
my $called = ask($node, $other->{id},
	'call [[tool=nothing args={"a":1} argsplit=2 thentext=done]]');
wait_for_task($node, $called);
my ($tool) = grep { $_->{type} eq 'tool-nothing' }
  @{ snapshot($called)->{message}{parts} };
is_deeply($tool->{input}, { a => 1 }, 'a tool call has its input')
  or diag(encode(snapshot($called)));

# unknown and foreign tasks
my $nobody = '00000000-0000-4000-8000-000000000000';
is($node->safe_psql('postgres', "SELECT chat.task_snapshot('$nobody') IS NULL"),
	't', 'no snapshot of an unknown task');
is(scalar(events($node, $nobody)), 0, 'and no events');
$node->safe_psql('postgres',
	"CREATE ROLE mallory LOGIN; SELECT chat.grant_usage('mallory')");
foreach my $call ("chat.task_snapshot('$task')", "chat.sse('$task')")
{
	is($node->safe_psql('postgres', "SET ROLE mallory; SELECT $call IS NULL"),
		't', "T31: nobody else sees $call");
}
is($node->safe_psql('postgres',
		"SET ROLE mallory; SELECT count(*) FROM chat.get_task_events('$task')"),
	'0', 'T31: nor the events');
is($node->safe_psql('postgres',
		"SET chat.user_id = 'bob'; SELECT count(*) FROM chat.get_task_events('$task')"),
	'0', 'nor does another user of the application');
is($node->safe_psql('postgres',
		"SET chat.user_id = 'ada'; SELECT count(*) > 0 FROM chat.get_task_events('$task')"),
	't', 'but the right one');

# no lock stays behind
my $locks = $node->safe_psql('postgres', qq{
	BEGIN;
	SELECT (SELECT payload->>'type' FROM chat.get_task_events('$task')
			ORDER BY seq DESC LIMIT 1),
		(SELECT count(*) FROM pg_locks AS l
			JOIN pg_class AS c ON c.oid = l.relation
			WHERE l.pid = pg_backend_pid() AND c.relname LIKE 'chat_%');
	COMMIT;});
is($locks, 'finish|0', 'a reader keeps no lock on a table');

done_testing();
