# Beyond a hundred streams their answers are read together, at the next flush,
# and by batches: is each of them whole, and is the rest as quick to end?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

use constant STREAMS => 600;    # more than two batches
use constant TOKENS => 40;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);
$node->safe_psql('postgres',
	server_sql($fake->port, name => 'brief', idle_timeout => '1s', retries => '0'));
my $text = join '', map { "t$_ " } 0 .. TOKENS - 1;

# the socket of an answer is held back with those of others; so it is again
# when its transfer was paused because too much of it was not yet stored
foreach my $size (1, 700_000)
{
	my $task = ask($node, create_session($node)->{id}, "[[tokens=3 size=$size gateat=2:paused]]");

	$fake->wait_at_gate('paused');
	wait_for($node, "SELECT count(*) > 2 FROM chat.chat_event WHERE task_id = '$task'"
		  . " AND payload->>'type' = 'text-delta'") if $size > 1;
	is(join(' ', sockets_of_sets(wait_for_worker($node))), '0 1',
		"an answer in pieces of $size bytes is held back with others");
	$fake->open_gate('paused');
	wait_for_task($node, $task);
}

# answers that run side by side, some slow, some without any delay, some that
# stop at a gate, one that falls silent
my @turns = start_turns($node, STREAMS, 'run [[tokens=' . TOKENS . ' delay=20]]');
my @fast = start_turns($node, 20, 'run [[tokens=' . TOKENS . ']]');
my @held = start_turns($node, 3, 'held [[tokens=4 gateat=2:g]]');
my $silent = ask($node, create_session($node, server => 'brief')->{id},
	'silent [[tokens=4 stall=2]]');
$fake->wait_at_gate('g', 3);
my $left = wait_for_task($node, $silent);
is($left->{error}{code}, 'idle_timeout', 'one that falls silent is noticed');
is($node->safe_psql('postgres', "SELECT chat.cancel_task('$held[0]{task}')"),
	't', 'one is cancelled');
is(wait_for_task($node, $held[0]{task})->{status}, 'cancelled', 'and ends');
$node->safe_psql('postgres', "SELECT chat.delete_chat_session('$held[1]{session}')");
$fake->open_gate('g', 3);
is(turn_of($node, $held[2]{task})->{answer}{content}, 't0 t1 t2 t3 ',
	'one that was at a gate goes on');

my $ids = join ',', map { "'$_->{task}'" } @turns, @fast;
wait_for($node, "SELECT count(*) = 0 FROM chat.chat_task WHERE id IN ($ids) AND finished_at IS NULL");
is_deeply(rows_of($ids, 'SELECT t.status, m.content, count(*)::int AS n FROM chat.chat_task AS t'
		. ' JOIN chat.chat_message AS m ON m.task_id = t.id AND m.role = \'assistant\''
		. ' WHERE t.id IN (%s) GROUP BY 1, 2'),
	[ { status => 'completed', content => $text, n => STREAMS + 20 } ],
	'each answer is whole');
is_deeply(rows_of($ids, 'SELECT text, count(*)::int AS n FROM (SELECT e.task_id,'
		. ' string_agg(e.payload->>\'delta\', \'\' ORDER BY e.seq) AS text'
		. ' FROM chat.chat_event AS e WHERE e.task_id IN (%s) GROUP BY 1) AS t GROUP BY 1'),
	[ { text => $text, n => STREAMS + 20 } ], 'so is what listeners get');
is_deeply(rows_of($ids, 'SELECT DISTINCT count(*) FILTER (WHERE e.payload->>\'type\''
		. ' IN (\'finish\', \'abort\'))::int AS ends, max(e.seq) - min(e.seq) + 1 = count(*) AS gapless'
		. ' FROM chat.chat_event AS e WHERE e.task_id IN (%s) GROUP BY e.task_id'),
	[ { ends => 1, gapless => JSON::PP::true } ], 'with one end, and without a gap');
is(row($node, "SELECT count(*) AS n FROM chat.chat_event WHERE task_id = '$held[1]{task}'")->{n},
	0, 'nothing is left of a session that was deleted');

# however many connections are in use, one that is free is used again
my @open = start_turns($node, 200, 'held [[tokens=2 gateat=1:many]]');
$fake->wait_at_gate('many', 200);
my $other = create_session($node)->{id};
wait_for_task($node, ask($node, $other, 'the first [[tokens=1]]'));
my $before = $fake->get_json('/stats')->{connections};
wait_for_task($node, ask($node, $other, "next $_ [[tokens=1]]")) foreach 1 .. 5;
is($fake->get_json('/stats')->{connections} - $before, 1,
	'turns beside two hundred open streams need no new connection, only we do');
$fake->open_gate('many', 200);
wait_for_task($node, $_->{task}) foreach @open;

# however seldom is stored, a stream whose answer is held back is not silent
$node->safe_psql('postgres', "ALTER SYSTEM SET chat.flush_interval = '3s'");
$node->reload;
$node->safe_psql('postgres', "SELECT chat.stream_chat_completion(id, '[[tokens=60 delay=50]]')"
	  . " FROM (SELECT (chat.create_chat_session(server => 'brief', title => 'brief')).id"
	  . ' FROM generate_series(1, 120)) AS s');
wait_for($node, 'SELECT count(*) = 0 FROM chat.chat_task WHERE finished_at IS NULL');
is_deeply([ rows($node, "SELECT t.status, count(*)::int AS n FROM chat.chat_task AS t"
		  . " JOIN chat.chat_session AS s ON s.id = t.session_id WHERE s.title = 'brief' GROUP BY 1") ],
	[ { status => 'completed', n => 120 } ], 'answers that are held back are not silent');
done_testing();

# Returns how many sockets are members of the worker's epoll descriptors that
# hold nothing but sockets and each other: of those to be looked at, and of
# those that may be held back.
sub sockets_of_sets
{
	my ($pid) = @_;
	my %members;

	foreach my $file (glob "/proc/$pid/fdinfo/*")
	{
		my ($fd) = $file =~ /(\d+)$/;
		my $info = eval { slurp_file($file) } // '';

		$members{$fd} = [ $info =~ /^tfd:\s*(\d+)/mg ]
		  if (readlink("/proc/$pid/fd/$fd") // '') eq 'anon_inode:[eventpoll]';
	}
	# the worker's set holds the first, the first holds the second
	foreach my $outer (keys %members)
	{
		my ($inner) = grep { $members{$_} } @{ $members{$outer} } or next;

		return map { my $set = $_;
			scalar grep { (readlink("/proc/$pid/fd/$_") // '') =~ /^socket:/ } @{ $members{$set} } }
		  $outer, $inner if !grep { $members{$_} } @{ $members{$inner} };
	}
	return;
}

# Returns the rows of a query about tasks.
sub rows_of
{
	my ($list, $sql) = @_;
	return [ rows($node, sprintf $sql, $list) ];
}
