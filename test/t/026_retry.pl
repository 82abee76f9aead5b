# Is a request that failed for a passing reason tried again, as often and as
# late as settings and endpoint say, and are two attempts never joined?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use JSON::PP ();
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => <<'EOF');
chat.retry_base_delay = 5ms
chat.retry_max_delay = 20ms
chat.max_retries = 3
EOF
create_server($node, $fake);

# Returns how many requests held a text.
sub requests_with
{
	my ($text) = @_;
	return
	  scalar grep { index(encode($_->{body}{messages}), $text) >= 0 }
	  $fake->completions;
}

# what passes is tried again: two failures, then an answer
my @forms = (
	'status=429', 'status=408', 'status=409', 'status=500', 'html=1',
	'status=503 errbody=overloaded', 'reset=1', 'reset=2', 'cut=0',
	'cutafter=0', 'cutafter=0 rst=1', 'plain=1 cut=30', 'cut=100',
	'error_at=0', 'error_at=0 errcode=429');
my @turns = run_turns($node,
	map { "[[tokens=3 $forms[$_] times=2 key=p$_.]]" } 0 .. $#forms);
foreach my $i (0 .. $#forms)
{
	my $turn = $turns[$i];
	is($turn->{status}, 'completed', "$forms[$i]: tried again")
	  or diag(encode($turn->{error}));
	is($turn->{answer}{content}, 't0 t1 t2 ', '  until there is an answer');
	is(requests_with("key=p$i."), 3, '  by the third request');
	is((grep { $_->{type} eq 'start' } @{ $turn->{events} }),
		1, '  one start');
	is((grep { $_->{type} eq 'finish' } @{ $turn->{events} }),
		1, '  one finish');
	is((grep { $_->{type} eq 'error' } @{ $turn->{events} }),
		0, '  and no error is told');
	my @seq = map { $_->{seq} } @{ $turn->{events} };
	is_deeply(\@seq, [ 1 .. @seq ], '  seq counts on through the attempts');
	is( rows($node, "SELECT FROM chat.chat_message"
			  . " WHERE session_id = '$turn->{session}'"),
		2, '  question and answer are stored once');
}

# a job that is due as its server opens again is not left: it may be claimed
# just before and find the server closed, and nothing else looks
foreach my $round (1 .. 8)
{
	my @tasks = map { ask($node, create_session($node)->{id}, "[[tokens=1 status=429 times=2 key=o$round.$_.]]") } 1 .. 10;
	my @left = grep { wait_for_task($node, $_)->{status} ne 'completed' } @tasks;
	is(@left, 0, "a server that opens and closes, round $round");
}

# what stays fails at once
my @final = (
	'status=400', 'status=401', 'status=403', 'status=404',
	'status=422', 'status=302', 'garbage=0', 'tokens=0',
	'status=429 errcode=insufficient_quota');
@turns = run_turns($node, map { "[[tokens=3 $final[$_] key=f$_.]]" } 0 .. $#final);
foreach my $i (0 .. $#final)
{
	is($turns[$i]{status}, 'failed', "$final[$i]: failed");
	is(requests_with("key=f$i."), 1, '  after one request');
}

# attempts are bounded: by the setting, or the server's option
my ($turn) = run_turns($node, '[[status=500 key=bound.]]');
is($turn->{status}, 'failed', 'attempts are bounded');
is(requests_with('key=bound.'), 4, 'by chat.max_retries: one and three more');
is($turn->{steps}, 1, 'they are one step');
$node->safe_psql('postgres',
	server_sql($fake->port, name => 'once', retries => 1)
	  . server_sql($fake->port, name => 'never', retries => 0));
foreach my $server ('once', 'never')
{
	my $id = create_session($node, server => $server)->{id};
	turn_of($node, ask($node, $id, "[[status=500 key=$server.]]"));
	is(requests_with("key=$server."), $server eq 'once' ? 2 : 1,
		"or by the option \"retries\" of server $server");
}

# T48: a retry after content takes back what was seen, and joins nothing
my @partial = ('cutafter=2', 'cutafter=2 rst=1', 'error_at=2');
@turns = run_turns($node,
	map { "[[tokens=4 $partial[$_] times=1 key=c$_.]]" } 0 .. $#partial);
foreach my $i (0 .. $#partial)
{
	my $turn = $turns[$i];
	my @events = @{ $turn->{events} };

	is($turn->{answer}{content}, 't0 t1 t2 t3 ',
		"T48: $partial[$i]: the answer is one attempt's");
	is(text_of(@events), 't0 t1 t2 t3 ', 'T48:   so is what listeners have');
	is((grep { $_->{type} eq 'reset-step' } @events),
		1, 'T48:   after one reset-step');
	my @seq = map { $_->{seq} } @events;
	is_deeply(\@seq, [ 1 .. @seq ], '  seq counts on');
	is($turn->{answer}{metadata}{interrupted},
		undef, '  it is not marked as interrupted');
}
($turn) = run_turns($node, '[[tokens=4 cutafter=2]]');
is($turn->{status}, 'failed', 'T48: when each attempt breaks off');
is($turn->{answer}{content}, 't0 t1 ', 'T48: the last one\'s text is kept');
is($turn->{answer}{metadata}{interrupted},
	JSON::PP::true, 'T48: marked as interrupted');
is(text_of(@{ $turn->{events} }), 't0 t1 ', 'T48: as listeners saw it');

# in a later step: what was said in the steps before stays
($turn) = run_turns($node,
	'[[at=0 tokens=3 tool=nothing args={}]] [[at=1 tokens=4 cutafter=2 times=1 key=later.]]');
is($turn->{status}, 'completed', 'T48: a later step is tried again');
is_deeply([ map { $_->{content} } grep { $_->{role} eq 'assistant' } @{ $turn->{messages} } ],
	[ 't0 t1 t2 ', 't0 t1 t2 t3 ' ], 'T48:   each step is one attempt\'s');
is(text_of(@{ $turn->{events} }), 't0 t1 t2 t0 t1 t2 t3 ',
	'T48:   so is what listeners have');
my @order = grep { /^(start-step|reset-step|finish-step)$/ } types_of(@{ $turn->{events} });
is_deeply(\@order, [qw(start-step finish-step start-step reset-step finish-step)],
	'T48:   reset-step takes back the later step only');
is((grep { $_->{role} eq 'tool' } @{ $turn->{messages} }), 1, 'T48:   the tool is not called again');

# Retry-After: the time stands in the job's row.  It holds for all requests to
# the server that said so: each job here has a server of its own.
my $servers = 0;

sub own_server
{
	create_server($node, $fake, name => 'own' . ++$servers);
	return;
}

sub waiting_job
{
	my ($after) = @_;
	own_server();
	my $id = create_session($node)->{id};
	my $task = ask($node, $id,
		"[[tokens=1 status=429 retry_after=$after times=1]]");

	wait_for($node, "SELECT count(*) = 1 FROM chat.chat_job"
		  . " WHERE task_id = '$task' AND attempts = 1 AND holder IS NULL");
	return ($task, row($node, <<"EOF"));
SELECT *, extract(epoch FROM run_at - started_at) AS wait
FROM chat.chat_job JOIN (SELECT id AS task, started_at FROM chat.chat_task) AS t
	ON task = task_id
WHERE task_id = '$task'
EOF
}

my ($task, $job) = waiting_job(200);
cmp_ok($job->{wait}, '>=', 200, 'Retry-After in seconds is honoured');
cmp_ok($job->{wait}, '<', 260, 'and not much more');
my ($dated, $dated_job) = waiting_job('date:290');
cmp_ok($dated_job->{wait}, '>=', 285, 'Retry-After as a date is honoured');
cmp_ok($dated_job->{wait}, '<', 350, 'and not much more');

# it survives a restart
my $events = [ stored_events($node, $task) ];
$node->restart;
wait_for_worker($node);
my $after = row($node, "SELECT * FROM chat.chat_job WHERE task_id = '$task'");
is($after->{run_at}, $job->{run_at}, 'the time survives a restart');
is($after->{attempts}, 1, 'and so do the attempts');
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$task'")->{status},
	'running', 'the task is not over');
$fake->forget;
own_server();
my ($other) = run_turns($node, '[[tokens=1]]');
is($other->{status}, 'completed', 'another session is answered meanwhile');
is(scalar $fake->completions, 1, 'and nothing else was asked');
$node->safe_psql('postgres',
	"UPDATE chat.chat_job SET run_at = now() WHERE task_id = '$task'");
$turn = turn_of($node, $task);
is($turn->{status}, 'completed', 'when the time has come, it is tried again');
is_deeply([ @{ $turn->{events} }[ 0 .. $#$events ] ],
	$events, 'its events go on from those before the restart');
is((grep { $_->{type} eq 'reset-step' } @{ $turn->{events} }),
	0, 'nothing was seen, so nothing is taken back');

# longer than five minutes fails at once and says when
foreach my $long ('301', 'date:4000')
{
	own_server();
	my ($turn) = run_turns($node, "[[status=429 retry_after=$long key=l$long.]]");
	is($turn->{status}, 'failed', "Retry-After: $long fails");
	is($turn->{error}{code}, 'rate_limited', '  by its code');
	is(requests_with("key=l$long."), 1, '  at once');
	like($turn->{error}{message}, qr/wait (301|39\d\d|4000) seconds/,
		'  and says when');
	cmp_ok($turn->{error}{retry_after}, '>', 300, '  also as a number');
}

# exponential, from chat.retry_base_delay to chat.retry_max_delay, with jitter:
# between a half and the whole of 10, 20, 25 and 25 s.
my $slow = chat_cluster('slow', conf => <<'EOF');
chat.retry_base_delay = 10s
chat.retry_max_delay = 25s
chat.max_retries = 4
EOF
create_server($slow, $fake);
my @slow = split /\n/, $slow->safe_psql('postgres', <<'EOF');
SELECT chat.stream_chat_completion((chat.create_chat_session()).id,
	'[[status=500]]') FROM generate_series(1, 8)
EOF
my $failures = 0;
foreach my $most (10, 20, 25, 25)
{
	$failures++;
	wait_for($slow, 'SELECT count(*) = 8 FROM chat.chat_job'
		  . " WHERE holder IS NULL AND attempts = $failures AND run_at > now()");
	my @delays = map { $_->{delay} } rows($slow,
		'SELECT extract(epoch FROM run_at - now()) AS delay FROM chat.chat_job');
	# they were planned a little before we look
	is((grep { $_ > $most || $_ < $most / 2 - 4 } @delays),
		0, "failure $failures: at most $most s, at least a half")
	  or diag("@delays");
	my %different = map { sprintf('%.3f', $_) => 1 } @delays;
	cmp_ok(scalar keys %different, '>', 4, '  with jitter');
	$slow->safe_psql('postgres', 'UPDATE chat.chat_job SET run_at = now()');
}
is(wait_for_task($slow, $_)->{status}, 'failed', 'the fifth failure is the last')
  foreach @slow;

done_testing();
