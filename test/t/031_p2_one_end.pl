# P2: does a task end once, and all of its end in one transaction: status,
# message, usage, terminal event, removal of the job, the next task's job
# (T46)?  Also when the database refuses the answer.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);

my $session = create_session($node);
my $id = $session->{id};
my $first = ask($node, $id, 'first [[tokens=3]]');
wait_for_task($node, $first);
$first = ask($node, $id, 'second [[tokens=3 gateat=1:one]]');
my $next = ask($node, $id, 'third [[gate=two]]');
$fake->wait_at_gate('one');
$fake->open_gate('one');
$fake->wait_at_gate('two');

# the third task's job has been claimed since, but keeps its created_at
my $end = row($node, <<"EOF");
SELECT t.status, t.xmin AS task, m.xmin AS message, t.finished_at AS time,
	m.created_at = t.finished_at AS message_time,
	(SELECT array_agg(DISTINCT e.xmin::text) FROM chat.chat_event AS e
		WHERE e.task_id = t.id AND e.payload->>'type' IN ('finish-step',
			'message-metadata', 'finish')) AS events,
	(SELECT count(*) FROM chat.chat_event AS e WHERE e.task_id = t.id
		AND e.payload->>'type' IN ('finish', 'abort')
		AND e.created_at = t.finished_at) AS terminal,
	(SELECT count(*) FROM chat.chat_job AS j WHERE j.task_id = t.id) AS job,
	(SELECT j.created_at = t.finished_at FROM chat.chat_job AS j
		WHERE j.task_id = '$next') AS next_job,
	(SELECT s.total_completion_tokens FROM chat.chat_session AS s
		WHERE s.id = t.session_id) AS usage
FROM chat.chat_task AS t
	JOIN chat.chat_message AS m ON m.task_id = t.id AND m.role = 'assistant'
WHERE t.id = '$first'
EOF
is($end->{status}, 'completed', 'a task has ended, the next one runs');
is($end->{message}, $end->{task}, 'its message has the task\'s transaction');
ok($end->{message_time}, 'and its time');
is_deeply($end->{events}, [ $end->{task} ], 'so have the events of the end');
is($end->{terminal}, 1, 'one of them is terminal');
is($end->{job}, 0, 'the job is gone');
ok($end->{next_job}, 'the next job was made in the same transaction');
cmp_ok($end->{usage}, '>', 0, 'usage is counted');
$fake->open_gate('two');
wait_for_task($node, $next);

# No snapshot sees a part of an end, in any of 200 turns.
my @turns = start_turns($node, 200, 'many [[tokens=3]]');
my ($looks, $torn, $left) = (0, 0, 1);
while ($left)
{
	my $seen = row($node, <<"EOF");
SELECT count(*) FILTER (WHERE t.finished_at IS NULL) AS left,
	count(*) FILTER (WHERE (t.finished_at IS NOT NULL) <> (m.id IS NOT NULL)
		OR (t.finished_at IS NOT NULL) <> (j.id IS NULL)
		OR (t.finished_at IS NOT NULL) <> (e.seq IS NOT NULL)
		OR (t.finished_at IS NOT NULL) <> (s.total_completion_tokens > 0))
		AS torn
FROM chat.chat_task AS t JOIN chat.chat_session AS s ON s.id = t.session_id
	LEFT JOIN chat.chat_message AS m ON m.id = t.answer_id
		AND m.session_id = t.session_id
	LEFT JOIN chat.chat_job AS j ON j.task_id = t.id
	LEFT JOIN chat.chat_event AS e ON e.task_id = t.id
		AND e.payload->>'type' = 'finish'
WHERE t.session_id <> '$id'
EOF
	$torn += $seen->{torn};
	$left = $seen->{left};
	$looks++;
}
is($torn, 0, "no snapshot sees half an end ($looks looks)");

# A message that the table refuses: the task fails, once, and nothing else.
$node->safe_psql('postgres', "ALTER TABLE chat.chat_message ADD CONSTRAINT"
	  . " refuse CHECK (role <> 'assistant' OR content NOT LIKE '%poison%')");
my $listener = listener($node, $session->{channel});
my $bad = ask($node, $id, 'bad [[text=poison]]');
my $after = ask($node, $id, 'after [[tokens=2]]');
my @events = $listener->turn($bad);
my $row = wait_for_task($node, $bad);
is($row->{status}, 'failed', 'an answer that cannot be stored fails its task');
like($row->{error}{message}, qr/could not be stored: .*"refuse"/,
	'the error says why');
is((grep { $_->{type} =~ /^(finish|abort)$/ } stored_events($node, $bad)), 1,
	'T46: one terminal event');
is_deeply([ grep { defined $_->{seq} } @events ],
	[ stored_events($node, $bad) ],
	'its events are those that were notified');
is( row($node,
		"SELECT count(*) FROM chat.chat_message WHERE task_id = '$bad'"
		  . " AND role = 'assistant'")->{count},
	0, 'no message');
is(wait_for_task($node, $after)->{status}, 'completed',
	'the next task of the session runs');
is(row($node, 'SELECT count(*) FROM chat.chat_job')->{count}, 0,
	'no job is left');

# T46: a status that is terminal without a time, or the other way round
my ($ret, $out, $err) = $node->psql('postgres',
	"UPDATE chat.chat_task SET status = 'running' WHERE id = '$bad'");
like($err, qr/violates check constraint/, 'T46: an end is not taken back');

# T44: an end does not overtake what came before it
foreach my $n (1001, 10001)
{
	my $task = ask($node, $id, "many [[tokens=$n]]");
	wait_for_task($node, $task);
	my $text = join '', map { "t$_ " } 0 .. $n - 1;
	ok(text_of(stored_events($node, $task)) eq $text,
		"T44: $n deltas are all there at the end");
	ok( row($node,
			"SELECT content FROM chat.chat_message WHERE task_id = '$task'"
			  . " AND role = 'assistant'")->{content} eq $text,
		'in the message as well');
}

# T33: deltas that are alike are not folded into one
my $same = ask($node, $id, 'same [[text=ha%20 repeat=50]]');
my @same = $listener->turn($same);
wait_for_task($node, $same);
is( text_of(@same),
	row($node,
		"SELECT content FROM chat.chat_message WHERE task_id = '$same'"
		  . " AND role = 'assistant'")->{content},
	'T33: what was notified is the answer, also when its pieces are alike');
$listener->stop;

done_testing();
