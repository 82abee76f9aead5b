# ChatTest::Crash: ends of servers and of their processes, as they come
#
#	kill_server($node);			kill -9 of the postmaster; the rest ends by itself
#	kill_everything($node);		kill -9 of all processes at the same instant: what
#								was not written is lost
#	processes($node);			pid => title of the server's children
#	pid_of($node, $like);		the only child whose title matches, when it is there
#	wait_until($what, sub { ... });		waits until it returns true
#	wait_gone(@pids);			waits until there are no such processes
#	wait_for_rest($node, $pid);	waits until the worker sleeps and holds nothing
#	pause_worker($node, $pid);	stops the worker while it does;
#								kill 'CONT', $pid lets it go on
#	session($node);				a psql in the background: ->query_safe(...)
#	start_turns($node, $n, $message);	n sessions with one turn each, in one
#								transaction; rows with session, task, channel

package ChatTest::Crash;

use strict;
use warnings;

use Exporter 'import';
use PostgreSQL::Test::Utils ();
use ChatTest;

our @EXPORT = qw(
  kill_server kill_everything processes pid_of wait_until wait_gone
  wait_for_rest pause_worker session start_turns
);

# Waits until a condition holds; returns its value.
sub wait_until
{
	my ($what, $condition) = @_;
	my $tries = 50 * $PostgreSQL::Test::Utils::timeout_default;

	while ($tries-- > 0)
	{
		my $value = $condition->();
		return $value if $value;
		select undef, undef, undef, 0.02;
	}
	die "timed out waiting for: $what\n";
}

# Reads a file of /proc; empty when the process is gone.
sub read_proc
{
	my ($file) = @_;
	open my $in, '<', $file or return '';
	local $/;
	my $text = <$in> // '';
	close $in;
	return $text;
}

# Returns pid => title of the children of a node's postmaster.
sub processes
{
	my ($node) = @_;
	my ($parent, %found) = ($node->{_pid});

	foreach my $file (glob '/proc/[0-9]*/stat')
	{
		my ($pid, $ppid) =
		  read_proc($file) =~ /^(\d+) \(.*\) \S (\d+) /s or next;
		next if $ppid != $parent;
		my $title = read_proc("/proc/$pid/cmdline");
		$title =~ tr/\0/ /;
		$found{$pid} = $title;
	}
	return %found;
}

# Waits until one child's title matches, and only one's; returns its pid.
sub pid_of
{
	my ($node, $like) = @_;

	return wait_until(
		"one process like $like",
		sub {
			my %found = processes($node);
			my @pids = grep { $found{$_} =~ $like } keys %found;
			return @pids == 1 && $pids[0];
		});
}

# Waits until processes are gone, whoever reaps them.
sub wait_gone
{
	my (@pids) = @_;

	foreach my $pid (@pids)
	{
		wait_until("the end of process $pid",
			sub { !-e "/proc/$pid" });
	}
	return;
}

# Stops a postmaster; returns its pid and its children's.  A fork that is under
# way goes on after the signal was sent: only when it has stopped are there all.
sub stop_postmaster
{
	my ($node) = @_;
	my $pid = $node->{_pid};

	kill 'STOP', $pid;
	wait_until('the postmaster to stop',
		sub { read_proc("/proc/$pid/stat") =~ /^\d+ \(.*\) T /s });
	return ($pid, keys %{ { processes($node) } });
}

# Kills the postmaster; its children see it and end.
sub kill_server
{
	my ($node) = @_;
	my @pids = stop_postmaster($node);

	$node->kill9;
	wait_gone(@pids);
	return;
}

# Kills all processes of a server; they are stopped first, so that none of
# them does anything while others have ended.
sub kill_everything
{
	my ($node) = @_;
	my ($postmaster, @children) = stop_postmaster($node);

	kill 'STOP', @children;
	kill 'KILL', @children, $postmaster;
	wait_gone($postmaster, @children);
	$node->{_pid} = undef;
	return;
}

# Waits until the worker has come to rest: it sleeps and holds no lock.
sub wait_for_rest
{
	my ($node, $pid) = @_;
	my $seen = '';

	wait_for($node, "SELECT xact_start IS NULL AND wait_event_type = 'Extension'"
		  . " FROM pg_stat_activity WHERE pid = $pid");
	wait_until(
		'the worker to rest',
		sub {
			my ($switches) =
			  read_proc("/proc/$pid/status") =~ /^voluntary_ctxt_switches:\s*(\d+)/m;
			my $rests = $switches eq $seen;
			$seen = $switches;
			return $rests;
		});
	return;
}

# Stops the worker when it has come to rest: it must hold no lock meanwhile.
sub pause_worker
{
	my ($node, $pid) = @_;

	wait_for_rest($node, $pid);
	kill 'STOP', $pid;
	return;
}

# Starts a psql in the background.
sub session
{
	my ($node, $db, %opt) = @_;
	return $node->background_psql($db // 'postgres', %opt);
}

# Starts turns in sessions of their own, in one transaction.
sub start_turns
{
	my ($node, $n, $message, $db) = @_;
	my $text = literal($message);

	return @{ decode($node->safe_psql($db // 'postgres', <<"EOS")) };
WITH s AS MATERIALIZED (
	SELECT c.id, c.channel FROM generate_series(1, $n) AS n,
		LATERAL chat.create_chat_session(title => n::text) AS c),
t AS MATERIALIZED (
	SELECT s.*, chat.stream_chat_completion(s.id, $text) AS task FROM s)
SELECT json_agg(json_build_object('session', id, 'channel', channel,
	'task', task)) FROM t
EOS
}

1;
