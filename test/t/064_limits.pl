# Does a server get no more than its limits allow, whatever many workers ask,
# and do the other servers' turns go on meanwhile (T27)?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $other = start_fake();
my $node = chat_cluster('main', conf => 'chat.workers = 2');
create_server($node, $other, name => 'other');
create_server($node, $fake, max_concurrency => 2);
wait_for($node, 'SELECT count(*) = 2 FROM chat.worker_status() WHERE pid > 0');

# Starts turns in sessions of their own at a server, in one transaction.
sub start
{
	my ($n, $server, $message) = @_;
	return split /\n/, $node->safe_psql('postgres', <<"SQL");
SELECT chat.stream_chat_completion((chat.create_chat_session()).id, '$message $server', server => '$server')
FROM generate_series(1, $n)
SQL
}

# How many of these tasks have not started.
sub unstarted
{
	return row($node, "SELECT count(*) FROM chat.chat_job WHERE holder IS NULL")->{count};
}

# max_concurrency: two run, others do not, other servers do
my @tasks = start(10, 'fake', 'slow [[tokens=2 gateat=1:g]]');
my @others = start(5, 'other', 'quick [[tokens=2]]');
is(wait_for_task($node, $_)->{status}, 'completed', 'another server is not held up')
  foreach @others;
$fake->get_json('/gate/g?wait=2');
is(unstarted(), 8, 'max_concurrency: all but two wait');
my $most = 0;
foreach (1 .. 8)
{
	$fake->open_gate('g');
	$fake->get_json('/gate/g?wait=2');
	my $seen = $fake->get_json('/gate/g')->{waiting};
	$most = $seen if $seen > $most;
}
$fake->open_gate('g', 2);
is(wait_for_task($node, $_)->{status}, 'completed', 'all complete in the end') foreach @tasks;
is($most, 2, 'never more than two at a time');

# one that is waiting may be cancelled
@tasks = start(3, 'fake', 'slow [[tokens=2 gateat=1:g]]');
$fake->get_json('/gate/g?wait=2');
my $left = row($node, 'SELECT task_id FROM chat.chat_job WHERE holder IS NULL')->{task_id};
is($node->safe_psql('postgres', "SELECT chat.cancel_task('$left')"), 't', 'a waiting task is cancelled');
is(wait_for_task($node, $left)->{status}, 'cancelled', 'although its server has no room');
# the end of a limit is noticed
push @tasks, start(3, 'fake', 'slow [[tokens=2 gateat=1:g]]');
is(unstarted(), 3, 'others wait again');
$node->safe_psql('postgres', "ALTER SERVER fake OPTIONS (SET max_concurrency '5')");
$fake->get_json('/gate/g?wait=5');
pass('ALTER SERVER lets them start');
$fake->open_gate('g', 5);
wait_for_task($node, $_) foreach @tasks;

# requests per minute
my $third = start_fake();
$node->safe_psql('postgres', server_sql($third->port, name => 'rated', max_requests_per_minute => 3));
@tasks = start(5, 'rated', 'brief [[tokens=1]]');
wait_for($node, "SELECT count(*) = 3 FROM chat.chat_task WHERE status = 'completed' AND server = 'rated'");
@others = start(3, 'other', 'quick [[tokens=2]]');
wait_for_task($node, $_) foreach @others;
is($third->stats->{requests}, 3, 'max_requests_per_minute: as many as are allowed');
is(unstarted(), 2, 'the others wait');
$node->safe_psql('postgres', 'ALTER SERVER rated OPTIONS (SET max_requests_per_minute \'4\')');
wait_for($node, "SELECT count(*) = 4 FROM chat.chat_task WHERE status = 'completed' AND server = 'rated'");
@others = start(3, 'other', 'quick [[tokens=2]]');
wait_for_task($node, $_) foreach @others;
is(unstarted(), 1, 'what was asked before counts under another limit, too');
$node->safe_psql('postgres', 'ALTER SERVER rated OPTIONS (DROP max_requests_per_minute)');
is(wait_for_task($node, $_)->{status}, 'completed', 'they run when the limit is gone') foreach @tasks;

# a 429 closes its server for the time that it asks for
my $limited = (start(1, 'fake', 'limited [[status=429 retry_after=200 times=1]]'))[0];
wait_for($node, "SELECT count(*) = 1 FROM chat.chat_job WHERE task_id = '$limited'"
	  . " AND holder IS NULL AND run_at > now()");
my $before = $fake->stats->{requests};
@tasks = start(3, 'fake', 'brief [[tokens=1]]');
@others = start(3, 'other', 'quick [[tokens=2]]');
wait_for_task($node, $_) foreach @others;
is($fake->stats->{requests}, $before, '429: nothing is sent before its Retry-After');
is(unstarted(), 4, 'they wait');
my $server = row($node, "SELECT * FROM chat.stat_server WHERE server = 'fake'");
is($server->{rate_limited}, 1, 'it is counted');
cmp_ok($server->{closed_seconds}, '>', 60, 'how long is told');
$node->safe_psql('postgres', "ALTER SERVER fake OPTIONS (ADD environment 'again')");
is(wait_for_task($node, $_)->{status}, 'completed', 'ALTER SERVER opens it') foreach @tasks;

# without a Retry-After it opens by itself: one first, then more
$node->append_conf('postgresql.conf', "chat.retry_base_delay = 100ms");
$node->reload;
@tasks = start(40, 'fake', 'again [[status=429 times=3 key=x]]');
is(wait_for_task($node, $_)->{status}, 'completed', 'a server that had enough is asked again')
  foreach @tasks;
$server = row($node, "SELECT * FROM chat.stat_server WHERE server = 'fake'");
is($server->{rate_limited}, 4, 'each 429 is counted');
is($server->{open_requests}, 0, 'no request is open');
is($server->{completed}, row($node, "SELECT count(*) FROM chat.chat_task WHERE server = 'fake'"
	  . " AND status = 'completed'")->{count}, 'completed ones are counted');
cmp_ok($server->{first_token_seconds_avg}, '>', 0, 'so is the time to the first token');
cmp_ok($server->{tokens}, '>', 0, 'and tokens');
cmp_ok($server->{tokens_per_second}, '>', 0, 'how fast they come');
is(row($node, "SELECT open_requests FROM chat.stat_server WHERE server = 'other'")->{open_requests},
	0, 'each server has its own figures');
my ($bad) = start(1, 'other', 'bad [[status=400]]');
is(wait_for_task($node, $bad)->{status}, 'failed', 'a request that fails');
is(row($node, "SELECT failed FROM chat.stat_server WHERE server = 'other'")->{failed},
	1, 'errors are counted');

# requests beside the turns take a slot and count as any other, behind turns
my $beside = start_fake();
$node->safe_psql('postgres', server_sql($beside->port, name => 'beside', max_concurrency => 1));

# A session at a server with a question, whose title is another matter.
sub untitled
{
	my ($message, $server) = @_;
	my $id = create_session($node, server => $server // 'beside')->{id};
	$node->safe_psql('postgres', "SELECT chat.add_chat_message('$id', 'user', '$message')");
	return $id;
}

# Asks for the title of a session.
sub ask_title
{
	my ($id) = @_;
	is($node->safe_psql('postgres', "SELECT chat.generate_session_title('$id')"),
		't', 'a title is asked for');
	return;
}

# How many jobs wait for a server.
sub waiting
{
	my $server = shift // 'beside';
	return row($node, "SELECT count(*) FROM chat.chat_job WHERE holder IS NULL"
		  . " AND server = '$server'")->{count};
}

# Lets both workers look at their queues again.
sub look_again
{
	wait_for_task($node, $_) foreach start(4, 'other', 'quick [[tokens=1]]');
	return;
}

my ($one) = start(1, 'beside', 'one [[tokens=2 gateat=1:one]]');
$beside->wait_at_gate('one');
my $session = untitled('t [[for=title text=Quiet gate=title]]');
ask_title($session);
look_again();
is($beside->stats->{requests}, 1, 'max_concurrency: a title waits for a slot');
my ($two) = start(1, 'beside', 'two [[tokens=2 gateat=1:two]]');
look_again();
$beside->open_gate('one');
wait_for_task($node, $one);
$beside->wait_at_gate('two');
look_again();
is($beside->stats->{requests}, 2, 'and lets a turn that came later go first');
$beside->open_gate('two');
wait_for_task($node, $two);
$beside->wait_at_gate('title');
is(row($node, "SELECT open_requests FROM chat.stat_server WHERE server = 'beside'")->{open_requests},
	1, 'a title takes a slot');
my ($three) = start(1, 'beside', 'three [[tokens=2]]');
look_again();
is($beside->stats->{requests}, 3, 'max_concurrency: a turn waits for the title');
my $test = row($node, "SELECT * FROM chat.test_server('beside')");
is($test->{error_code}, 'limit_reached', 'max_concurrency: test_server has no room');
$beside->open_gate('title');
is(wait_for_task($node, $three)->{status}, 'completed', 'it runs when the title is there');
is(row($node, "SELECT title FROM chat.chat_session WHERE id = '$session'")->{title},
	'Quiet', 'which it is');
$test = row($node, "SELECT * FROM chat.test_server('beside')");
is($test->{ok}, JSON::PP::true, 'test_server has room');
my $stat = row($node, "SELECT * FROM chat.stat_server WHERE server = 'beside'");
is($stat->{requests}, 5, 'all are counted');
is($stat->{completed}, 5, 'with their ends');
is($stat->{requests_last_minute}, 5, 'and for the minute');
is($stat->{open_requests}, 0, 'and none is left over');

# requests per minute, of a server that has had none before
$node->safe_psql('postgres', "ALTER SERVER beside OPTIONS (SET max_concurrency '100');"
	  . server_sql($beside->port, name => 'minute', max_requests_per_minute => 3));
is(row($node, "SELECT ok FROM chat.test_server('minute')")->{ok}, JSON::PP::true,
	'test_server makes a request');
ask_title(untitled('u [[for=title text=Second]]', 'minute'));
$beside->wait_for_stats(sub { $_->{completed} == 7 });
ask_title(untitled('v [[for=title text=Third]]', 'minute'));
$beside->wait_for_stats(sub { $_->{completed} == 8 });
my $late = untitled('w [[for=title text=Late]]', 'minute');
ask_title($late);
my ($four) = start(1, 'minute', 'four [[tokens=2]]');
look_again();
is($beside->stats->{requests}, 8, 'max_requests_per_minute: titles and test calls count');
is(waiting('minute'), 2, 'a title and a turn wait');
$node->safe_psql('postgres', "ALTER SERVER minute OPTIONS (DROP max_requests_per_minute)");
is(wait_for_task($node, $four)->{status}, 'completed', 'they run when the limit is gone');
wait_for($node, "SELECT title = 'Late' FROM chat.chat_session WHERE id = '$late'");

# a 429 for one of them closes the server for all
ask_title(untitled('x [[for=title status=429 retry_after=200]]'));
wait_for($node, "SELECT rate_limited = 1 FROM chat.stat_server WHERE server = 'beside'");
my ($five) = start(1, 'beside', 'five [[tokens=2]]');
look_again();
is(waiting(), 1, "a title's 429 closes the server");
$test = row($node, "SELECT * FROM chat.test_server('beside')");
is($test->{error_code}, 'rate_limited', 'for test_server, too');
$node->safe_psql('postgres', "ALTER SERVER beside OPTIONS (SET max_concurrency '1')");
is(wait_for_task($node, $five)->{status}, 'completed', 'ALTER SERVER opens it');
is(row($node, "SELECT open_requests FROM chat.stat_server WHERE server = 'beside'")->{open_requests},
	0, 'nothing is left over');

# a title of a session that is deleted gives its slot back
my $gone = untitled('y [[for=title text=Gone gate=gone]]');
ask_title($gone);
$beside->wait_at_gate('gone');
my ($six) = start(1, 'beside', 'six [[tokens=2]]');
look_again();
is(waiting(), 1, 'a turn waits for a title');
$node->safe_psql('postgres', "SELECT chat.delete_chat_session('$gone')");
is(wait_for_task($node, $six)->{status}, 'completed', 'it runs when the session is deleted');

done_testing();
