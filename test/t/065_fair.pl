# Does an owner with many queued turns not delay another's by more than a few
# (T27)?  Counted in turns, not in time.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => 'chat.max_streams = 4');
create_server($node, $fake);
foreach my $role ('many', 'few', 'third')
{
	$node->safe_psql('postgres', "CREATE ROLE $role; GRANT USAGE ON FOREIGN SERVER fake TO $role;"
		  . " SELECT chat.grant_usage('$role')");
}

# Queues a turn in each of n sessions of an owner.
sub start
{
	my ($owner, $n, $message) = @_;
	$node->safe_psql('postgres', <<"SQL");
SELECT count(chat.stream_chat_completion((chat.create_chat_session(owner => '$owner')).id, '$message'))
FROM generate_series(1, $n)
SQL
	return;
}

# Turns of an owner that have ended.
sub ended
{
	my ($owner) = @_;
	return row($node, "SELECT count(*) FROM chat.chat_task AS t JOIN chat.chat_session AS s"
		  . " ON s.id = t.session_id WHERE s.owner = '$owner'::regrole AND t.status = 'completed'")->{count};
}

my $n = 10000;
start('many', $n, 'a [[tokens=1 gate=g]]');
$fake->get_json('/gate/g?wait=4');
is(row($node, 'SELECT count(*) FROM chat.chat_job WHERE holder IS NULL')->{count}, $n - 4,
	"one owner has $n turns, all but four are queued");
start('few', 3, 'b [[tokens=1 gate=g]]');
start('third', 1, 'c [[tokens=1 gate=g]]');
# turn by turn: which ones end as the gate opens
my $passes = 0;
until (ended('few') == 3 && ended('third') == 1)
{
	$fake->open_gate('g');
	$passes++;
	wait_for($node, "SELECT count(*) = $passes FROM chat.chat_task WHERE status = 'completed'");
	$fake->get_json('/gate/g?wait=4');
	last if $passes > 100;
}
cmp_ok($passes, '<=', 16, "the others' four turns are through after $passes turns in all");
# what is left runs at the full width
$node->append_conf('postgresql.conf', 'chat.max_streams = 300');
$node->reload;
$fake->open_gate('g', $n + 4);
wait_for($node, 'SELECT count(*) = 0 FROM chat.chat_job');
is(ended('many'), $n, 'and the others end, too');

done_testing();
