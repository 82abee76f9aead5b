# What does a server that cannot write do to turns?  No room for WAL ends the
# server; with room again every turn ends once, and ten others come through.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Bystander;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

use constant SEGMENT => 16 * 1024 * 1024;

my $fake = start_fake();
my $node = chat_cluster('main', conf => 'restart_after_crash = on');
create_server($node, $fake);
# a new segment, for the limit is its middle: where the log is past that, as on
# 18, recovery needs no further segment, and the server would start for ever
$node->safe_psql('postgres', 'SELECT pg_switch_wal()');

# Limits the size of the files that a server and its processes write: no
# segment of WAL can be made any more.
sub fill_disk
{
	my %children = processes($node);
	my $soft = SEGMENT / 2;

	foreach my $pid ($node->{_pid}, keys %children)
	{
		# one that has just ended may be among them
		system('prlimit', '--pid', $pid, "--fsize=$soft:") == 0
		  or !-e "/proc/$pid"
		  or die "no limit for process $pid\n";
	}
	return;
}

my @tasks = map { ask($node, create_session($node)->{id},
		'victim [[tokens=6 gateat=3:v]]') } 1 .. 3;
my $by = ChatTest::Bystander->new($node, $fake);
$fake->get_json('/gate/v?wait=3');
my $postmaster = $node->{_pid};
my %children = processes($node);
fill_disk();
# the next segment is as far as it gets; until then deltas are stored
$node->psql('postgres', 'SELECT pg_switch_wal()');
$node->psql('postgres', 'CHECKPOINT; SELECT txid_current(), pg_switch_wal()');
$fake->open_gate('v', 1);
wait_gone($postmaster, keys %children);
$node->{_pid} = undef;
like(slurp_file($node->logfile), qr/PANIC: .*(wal|log)/,
	'without room for WAL the server ends');

# somebody has made room
$node->start;
$fake->get_json('/gate/v?wait=' . 2);
$by->ready;
$fake->open_gate('v', 3);
$by->check('out of disk for WAL');
foreach my $task (@tasks)
{
	my $row = wait_for_task($node, $task);
	is_deeply([ @$row{qw(status error)} ],
		[ 'completed', undef ], 'out of disk for WAL: a turn completes');
	one_end($node, $task, 'out of disk for WAL');
	is(messages($node, $task), 'user assistant', 'and has one message');
	is(text_of(stored_events($node, $task)),
		't0 t1 t2 t3 t4 t5 ', 'and the whole text');
}
is(row($node, 'SELECT count(*) FROM chat.chat_job')->{count}, 0,
	'no job is left');

done_testing();
