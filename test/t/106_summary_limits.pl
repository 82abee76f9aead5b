# Do summaries keep to the limits of their server, and do they come before what
# nobody waits for?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $other = start_fake();
my $node = chat_cluster('main', conf => "chat.keep_recent_messages = 26\nchat.max_context_messages = 500");

create_server($node, $other, name => 'other');

# Makes a server with limits and an endpoint of its own, which is returned.
sub limited
{
	my ($name, %limits) = @_;
	my $fake = start_fake();

	$node->safe_psql('postgres', server_sql($fake->port, name => $name, context_window => 2000,
			max_tokens => 200, summarize => 'on', %limits));
	return $fake;
}

# Makes a session that is too long for its server; each directive commands a
# summary, and stands where that begins: one reads two dozen messages or so.
sub long_session
{
	my ($server, @directives) = @_;
	my $id = create_session($node, server => $server)->{id};
	my $words = 'some words ' x 25;
	my @roles = ('user', 'assistant');
	my @texts = map { ("start [[$directives[$_]]]", ($words) x ($_ < $#directives ? 32 : 11)) } 0 .. $#directives;
	my @messages = map { { role => $roles[ $_ % 2 ], content => $texts[$_] } } 0 .. $#texts;

	push @messages, map { { role => $roles[ $_ % 2 ], content => $words } } 0 .. 24;
	$node->safe_psql('postgres', "SELECT FROM chat.add_chat_messages_batch('$id', " . literal(encode(\@messages)) . ')');
	return $id;
}

# Starts turns in sessions of their own at a server.
sub start
{
	my ($n, $server, $message) = @_;
	return split /\n/, $node->safe_psql('postgres', <<"SQL");
SELECT chat.stream_chat_completion((chat.create_chat_session()).id, '$message', server => '$server')
FROM generate_series(1, $n)
SQL
}

# Asks for the titles of new sessions at a server.
sub ask_titles
{
	my ($n, $server, $question) = @_;
	$node->safe_psql('postgres', <<"SQL");
SELECT chat.generate_session_title((chat.add_chat_message((chat.create_chat_session(server => '$server')).id, 'user', '$question')).session_id)
FROM generate_series(1, $n)
SQL
	return;
}

# Lets the worker look at its queue again.
sub look_again
{
	wait_for_task($node, $_) foreach start(2, 'other', 'quick [[tokens=1]]');
	return;
}

# How many jobs of a kind wait for a server.
sub waiting
{
	my ($kind, $server) = @_;
	return row($node, "SELECT count(*) FROM chat.chat_job WHERE holder IS NULL AND run_at <= now()"
		  . " AND kind = '$kind' AND server = '$server'")->{count};
}

# Asserts that a turn has completed, and how it was made to fit.
sub compacted
{
	my ($task, $how, $what) = @_;
	my $row = wait_for_task($node, $task);

	is_deeply([ @$row{qw(status compaction)} ], [ 'completed', $how ], $what)
	  or diag(encode($row->{error}));
	return;
}

# one whose endpoint says nothing: the turn waits for half a minute, see below
limited('mute');
my $mute = ask($node, long_session('mute', 'gatehead=never'), 'mute [[tokens=1]]');

# ---------- max_concurrency

my $fake = limited('one', max_concurrency => 1);
my $task = ask($node, long_session('one', 'text=RECAP gatehead=sum'), 'go [[tokens=1]]');
$fake->wait_at_gate('sum');
my ($behind) = start(1, 'one', 'behind [[tokens=1]]');
look_again();
is($fake->stats->{requests}, 1, 'max_concurrency: a summary takes a slot');
is(waiting('completion', 'one'), 1, 'for which a turn waits');
$fake->open_gate('sum');
compacted($task, 'summarized', 'the turn that waits for the summary goes on with it');
is(wait_for_task($node, $behind)->{status}, 'completed', 'so does the other');
is($fake->stats->{max_active}, 1, 'one at a time');

# one in two parts: the second comes before turns and titles that wait
$task = ask($node, long_session('one', 'text=PART%201 gatehead=p1', 'text=PART%202 gatehead=p2'), 'go [[tokens=1]]');
$fake->wait_at_gate('p1');
my @behind = start(3, 'one', 'behind [[tokens=1 gateat=0:turn]]');
ask_titles(3, 'one', 'behind [[for=title text=T gatehead=title]]');
look_again();
my $asked = $fake->stats->{requests};
$fake->open_gate('p1');
$fake->wait_at_gate('p2');
look_again();
is($fake->stats->{requests}, $asked + 1, 'a summary that goes on goes before turns and titles');
is(waiting('completion', 'one'), 3, 'which wait');
$fake->open_gate('p2');
$fake->open_gate('turn', 3);
compacted($task, 'summarized', 'its turn goes on');
is(wait_for_task($node, $_)->{status}, 'completed', 'and the other turns') foreach @behind;
$fake->open_gate('title', 3);
wait_for($node, "SELECT count(*) = 0 FROM chat.chat_job WHERE server = 'one'");
is($fake->stats->{max_active}, 1, 'still one at a time');

# ---------- max_requests_per_minute

$fake = limited('rated', max_requests_per_minute => 1);
$task = ask($node, long_session('rated', 'text=RECAP'), 'go [[tokens=1]]');
wait_for($node, "SELECT count(*) = 1 FROM chat.chat_session WHERE summary = 'RECAP' AND server = 'rated'");
look_again();
is($fake->stats->{requests}, 1, 'max_requests_per_minute: a summary counts');
is(waiting('completion', 'rated'), 1, 'and its turn waits for the next one');
$node->safe_psql('postgres', 'ALTER SERVER rated OPTIONS (DROP max_requests_per_minute)');
compacted($task, 'summarized', 'which has it');

# ---------- a server that a 429 has closed

$fake = limited('closed', max_concurrency => 2);
$task = ask($node, long_session('closed', 'text=PART%201 gatehead=p1', 'text=PART%202 gatehead=p2'), 'go [[tokens=1]]');
$fake->wait_at_gate('p1');
my ($refused) = start(1, 'closed', 'refused [[tokens=1 status=429 retry_after=200 times=1]]');
wait_for($node, "SELECT rate_limited = 1 FROM chat.stat_server WHERE server = 'closed'");
@behind = start(2, 'closed', 'behind [[tokens=1 gateat=0:turn]]');
$asked = $fake->stats->{requests};
$fake->open_gate('p1');
wait_for($node, "SELECT count(*) = 1 FROM chat.chat_session WHERE summary = 'PART 1' AND server = 'closed'");
look_again();
is($fake->stats->{requests}, $asked, '429: nothing is sent to a server that is closed');
is(waiting('summary', 'closed'), 1, '429: a summary waits, too');
# the turn has time, however slow this machine is
$node->safe_psql('postgres', "UPDATE chat.chat_job SET run_at = now() + interval '1 h' WHERE task_id = '$task' AND kind = 'completion'");
$node->safe_psql('postgres', "ALTER SERVER closed OPTIONS (SET max_concurrency '1')");
$fake->wait_at_gate('p2');
look_again();
is($fake->stats->{requests}, $asked + 1, '429: when the server opens, the summary goes first');
$fake->open_gate('p2');
$fake->open_gate('turn', 2);
compacted($task, 'summarized', '429: its turn goes on with it');
is(wait_for_task($node, $_)->{status}, 'completed', '429: so do the others') foreach @behind;
$node->safe_psql('postgres', "SELECT chat.cancel_task('$refused')");

# one that is refused itself
$fake = limited('refusing');
$task = ask($node, long_session('refusing', 'status=429 retry_after=200'), 'go [[tokens=1]]');
wait_for($node, "SELECT rate_limited = 1 FROM chat.stat_server WHERE server = 'refusing'");
@behind = start(1, 'refusing', 'behind [[tokens=1]]');
look_again();
is($fake->stats->{requests}, 1, "429: a summary's closes the server for all");
is(waiting('completion', 'refusing'), 2, 'its turn waits, too');
$node->safe_psql('postgres', "ALTER SERVER refusing OPTIONS (ADD environment 'open')");
compacted($task, 'truncated', 'and goes on without a summary');
is(wait_for_task($node, $_)->{status}, 'completed', 'so does the other') foreach @behind;

# ---------- titles

# as many as are under way at a time but one; then several summaries at once,
# more titles, and another summary
$fake = limited('free');
ask_titles(31, 'free', 'q [[for=title text=T gatehead=title]]');
$fake->get_json('/gate/title?wait=31');
my @sessions = map { long_session('free', 'text=RECAP gatehead=sum') } 1 .. 6;
my @tasks = split /\n/, $node->safe_psql('postgres', "SELECT chat.stream_chat_completion(id::uuid, 'go [[tokens=1]]')"
	  . ' FROM unnest(ARRAY[' . join(', ', map { "'$_'" } @sessions[ 0 .. 4 ]) . ']) AS id');
$fake->get_json('/gate/sum?wait=5');
pass('summaries do not wait for titles to end');
ask_titles(40, 'free', 'q [[for=title text=T gatehead=title]]');
$fake->get_json('/gate/title?wait=32');
push @tasks, ask($node, $sessions[5], 'go [[tokens=1]]');
$fake->get_json('/gate/sum?wait=6');
pass('nor behind a queue of titles');
is($fake->get_json('/gate/title')->{waiting}, 32, 'of which so many are under way at a time');
$fake->open_gate('sum', 6);
compacted($_, 'summarized', 'a turn that goes on') foreach @tasks;
$fake->open_gate('title', 71);
wait_for($node, "SELECT count(*) = 0 FROM chat.chat_job WHERE server = 'free'");
is(row($node, "SELECT count(title) FROM chat.chat_session WHERE server = 'free'")->{count}, 71, 'all have their titles in the end');

# ---------- half a minute

compacted($mute, 'truncated', 'a summary that does not come in 30 seconds is not waited for');
is(row($node, "SELECT finished_at - started_at >= '29 s' AS waited FROM chat.chat_task WHERE id = '$mute'")->{waited},
	JSON::PP::true, 'nor less long');
wait_for($node, "SELECT count(*) = 0 FROM chat.chat_job WHERE server = 'mute'");
is_deeply([ rows($node, "SELECT completion_tokens AS answered, estimated FROM chat.chat_usage WHERE server = 'mute'") ],
	[ { answered => 0, estimated => JSON::PP::true } ], 'its request has ended');

done_testing();
