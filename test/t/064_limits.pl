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
is(row($node, "SELECT open_requests FROM chat.stat_server WHERE server = 'other'")->{open_requests},
	0, 'each server has its own figures');

done_testing();
