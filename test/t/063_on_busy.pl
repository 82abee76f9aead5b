# Does a message to a busy session do what on_busy says, whatever the session
# is busy with?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => "chat.retry_base_delay = 1h\nchat.retry_max_delay = 1h");
create_server($node, $fake);
$node->safe_psql('postgres', <<'SQL');
CREATE ROLE app LOGIN;
GRANT USAGE ON FOREIGN SERVER fake TO app;
SELECT chat.grant_usage('app');
CREATE FUNCTION public.nap() RETURNS text LANGUAGE sql AS 'SELECT pg_sleep(3600)::text';
SET ROLE app;
SELECT chat.register_tool('public.nap()');
SELECT chat.register_tool(name => 'pick', kind => 'client', parameters => '{"type": "object"}');
SQL

# What the model was sent last, as "role: content".
sub shown
{
	return [ map { "$_->{role}: " . ($_->{content} // '') }
		  @{ ($fake->completions)[-1]{body}{messages} } ];
}

# What the session shows.
sub messages
{
	my ($id) = @_;
	return [ map { "$_->{role}: " . ($_->{content} // '') }
		  rows($node, "SELECT * FROM chat.get_chat_messages('$id')") ];
}

# What a session may be busy with: a message, and what to wait for.
my %busy = (
	streaming => [ 'old [[tokens=4 gateat=2:s]]', sub { $fake->wait_at_gate('s') } ],
	silent => [ 'old [[gatehead=s]]', sub { $fake->wait_at_gate('s') } ],
	retrying => [ 'old [[status=500]]', sub {
			wait_for($node, "SELECT count(*) = 1 FROM chat.chat_job WHERE task_id = '$_[0]'"
				  . ' AND holder IS NULL AND run_at > now()');
		} ],
	tool => [ 'old [[tool=nap args={} id=n1]]', sub {
			wait_for($node, "SELECT count(*) = 1 FROM pg_stat_activity"
				  . " WHERE backend_type = 'chat tool worker' AND wait_event = 'PgSleep'");
		} ],
	waiting => [ 'old [[tool=pick args={} id=p1]]', sub {
			wait_for($node, "SELECT status = 'waiting' FROM chat.chat_task WHERE id = '$_[0]'");
		} ],
);

foreach my $state (sort keys %busy)
{
	my ($message, $wait) = @{ $busy{$state} };

	foreach my $how ('interrupt', 'rollback')
	{
		my $id = create_session($node, owner => 'app')->{id};
		my $before = ask($node, $id, 'before [[text=yes]]');
		wait_for_task($node, $before);
		my $old = ask($node, $id, $message);
		$wait->($old);
		# one more waits behind it
		my $queued = ask($node, $id, 'queued [[text=no]]');

		my ($ret, $out, $err) = $node->psql('postgres',
			"\\set VERBOSITY verbose\nSELECT chat.stream_chat_completion('$id', 'x', on_busy => 'reject')");
		like($err, qr/55006: session is busy/, "$state: reject is an error");
		like($err, qr/Task $old is (running|waiting)\./, "$state: that names the task");

		my $new = ask($node, $id, 'new [[text=done]]', on_busy => $how);
		is(wait_for_task($node, $new)->{status}, 'completed', "$state: $how: the new one runs");
		is(wait_for_task($node, $_)->{status}, 'cancelled', "$state: $how: a former one is cancelled")
		  foreach $old, $queued;
		my @sent = grep { !/^system:/ } @{ shown() };
		if ($how eq 'interrupt')
		{
			like($sent[2], qr/^user: old/, 'the model sees the question');
			like($sent[-2], qr/^user: queued/, 'and the one behind it');
			like(join('|', @sent), qr/t0 t1 /, 'T47: and the partial answer')
			  if $state eq 'streaming';
		}
		else
		{
			is_deeply(\@sent, [ 'user: before [[text=yes]]', 'assistant: yes', 'user: new [[text=done]]' ],
				'T47: the model sees nothing of them');
			is_deeply(
				messages($id),
				[ 'user: before [[text=yes]]', 'assistant: yes', 'user: new [[text=done]]', 'assistant: done' ],
				'nor do readers');
			cmp_ok( row($node, "SELECT count(*) FROM chat.get_chat_messages('$id', all_branches => true)")->{count},
				'>', 4, 'but nothing is lost');
		}
		is((grep { $_->{type} eq 'abort' } events($node, $old)), 1, "$state: $how: one abort");
	}
}

# a session that is free
my $id = create_session($node)->{id};
foreach my $how ('enqueue', 'reject', 'interrupt', 'rollback')
{
	my $task = ask($node, $id, "free [[text=$how]]", on_busy => $how);
	is(wait_for_task($node, $task)->{status}, 'completed', "a free session: $how");
}
is(row($node, "SELECT chat.get_chat_session_message_count('$id') AS n")->{n}, 8, 'nothing is hidden');
my ($ret, $out, $err) = $node->psql('postgres',
	"SELECT chat.stream_chat_completion('$id', 'x', on_busy => 'shout')");
like($err, qr/invalid value for on_busy: "shout"/, 'other values are errors');

# the same message again is the same task, also of a busy session
my $message = '00000000-0000-0000-0000-00000000000a';
my $task = ask($node, $id, 'once [[tokens=2 gateat=1:o]]', message_id => $message);
$fake->wait_at_gate('o');
is(ask($node, $id, 'once', message_id => $message, on_busy => $_), $task,
	"the same message again, $_")
  foreach 'reject', 'interrupt', 'rollback';
$fake->open_gate('o');
is(wait_for_task($node, $task)->{status}, 'completed', 'it was not cancelled by itself');
# each with a message id in the session once
is(row($node, 'SELECT count(*) FROM chat.chat_job')->{count}, 0, 'no job is left');

done_testing();
