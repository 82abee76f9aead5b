# Do several messages to a busy session run one after the other, each knowing
# the answer to the one before?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use JSON::PP ();
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake, retries => 0);
my $session = create_session($node);
my $id = $session->{id};
my $listener = listener($node, $session->{channel});

# three messages, while the first answer stands at a gate
my @text = map { "q$_ [[text=a$_ gate=g$_]]" } 1 .. 3;
my @tasks = (ask($node, $id, $text[0]));
$fake->wait_at_gate('g1');
push @tasks, ask($node, $id, $_) foreach @text[ 1, 2 ];
is(scalar $fake->completions, 1, 'one request at a time');
is_deeply(
	[
		map { $_->{status} } rows($node,
			"SELECT status FROM chat.chat_task WHERE session_id = '$id'"
			  . ' ORDER BY place')
	],
	[qw(running queued queued)],
	'the others are queued');
is( row($node, "SELECT count(*) AS n FROM chat.chat_message"
		  . " WHERE session_id = '$id'")->{n},
	1, 'T52: a queued message takes its place when its turn starts');
my $document = decode(
	$node->safe_psql('postgres', "SELECT chat.get_chat_session('$id')"));
is_deeply([ map { $_->{content} } @{ $document->{queued} } ],
	[ @text[ 1, 2 ] ], 'get_chat_session shows them');
is( row($node, "SELECT (chat.get_active_task('$id')).id")->{id},
	$tasks[0], 'get_active_task: the one that runs');

# other sessions do not wait
my ($other) = run_turns($node, '[[tokens=1]]');
is($other->{status}, 'completed', 'another session is answered meanwhile');

$fake->forget;
foreach my $n (1 .. 3)
{
	$fake->wait_at_gate("g$n");
	$fake->open_gate("g$n");
}
my @turns = map { turn_of($node, $_) } @tasks;
is_deeply([ map { $_->{answer}{content} } @turns ],
	[qw(a1 a2 a3)], 'each gets its answer');
my @requests = map {
	[ map { $_->{content} } @{ $_->{body}{messages} } ]
} $fake->completions;
is_deeply(
	\@requests,
	[
		[ $text[0], 'a1', $text[1] ],
		[ $text[0], 'a1', $text[1], 'a2', $text[2] ]
	],
	'the second request holds user1, assistant1, user2; and so on');
is_deeply(
	[
		map { [ $_->{sequence}, $_->{content} ] } rows($node,
			"SELECT sequence, content FROM chat.chat_message"
			  . " WHERE session_id = '$id' ORDER BY sequence")
	],
	[
		[ 1, $text[0] ], [ 2, 'a1' ], [ 3, $text[1] ],
		[ 4, 'a2' ], [ 5, $text[2] ], [ 6, 'a3' ]
	],
	'the history is question, answer, question, answer');

# the streams come one after the other, too
my @seen = map { $_->{event} } $listener->until(
	sub { $_[0]{taskId} eq $tasks[2] && $_[0]{type} eq 'finish' });
my @order;
foreach my $event (grep { defined $_->{seq} } @seen)
{
	push @order, $event->{taskId}
	  unless @order && $order[-1] eq $event->{taskId};
}
is_deeply(\@order, \@tasks, 'their events do not mix');

# the one before fails: the next still runs, after its error
@tasks = map { ask($node, $id, $_) } '[[tokens=1 gate=h]]', '[[status=400]]',
  'last [[tokens=2]]';
$fake->open_gate('h');
@turns = map { turn_of($node, $_) } @tasks;
is_deeply([ map { $_->{status} } @turns ],
	[qw(completed failed completed)], 'an error does not stop the queue');

# twenty calls of one transaction run in their order
@tasks = split /\n/, $node->safe_psql('postgres',
	"SELECT chat.stream_chat_completion('$id', format('n%s [[text=r%s]]', n, n))"
	  . ' FROM generate_series(1, 20) AS n');
wait_for_task($node, $tasks[-1]);
my @answers = map { $_->{content} } rows($node,
	"SELECT content FROM chat.chat_message WHERE session_id = '$id'"
	  . " AND role = 'assistant' ORDER BY sequence DESC LIMIT 20");
is_deeply([ reverse @answers ],
	[ map { "r$_" } 1 .. 20 ], 'twenty queued at once run in order');
is( row($node, 'SELECT count(*) AS n FROM chat.chat_job')->{n},
	0, 'no job is left');
$listener->stop;

done_testing();
