# Where more than a few streams are open, turns that begin share the transaction
# of those that end.  Does the next turn of a session begin in the transaction
# that ends the one before, and is an end stored though the claim beside it
# fails?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

use constant HELD => 6;    # more than a few

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	RAISE EXCEPTION 'refused' USING ERRCODE = 'check_violation';
END
$$;
CREATE TRIGGER refuse BEFORE INSERT ON chat.chat_message FOR EACH ROW
	WHEN (NEW.content LIKE 'poison%') EXECUTE FUNCTION refuse();
EOS

# Runs a turn and, behind it, one with another message; returns both tasks.
sub run_pair
{
	my ($gate, $message) = @_;
	my $session = create_session($node)->{id};
	my $first = ask($node, $session, "first [[tokens=2 gateat=1:$gate]]");

	$fake->wait_at_gate($gate);
	my $second = ask($node, $session, $message);
	$fake->open_gate($gate);
	return ($session, map { wait_for_task($node, $_) } $first, $second);
}

# Returns how many transactions have stored the first answer and the message
# after it.
sub transactions
{
	my ($session) = @_;

	return $node->safe_psql('postgres',
		'SELECT count(DISTINCT m.xmin::text) FROM chat.chat_message AS m'
		. " WHERE m.session_id = '$session' AND m.sequence IN (2, 3)");
}

my @held = start_turns($node, HELD, 'held [[tokens=2 gateat=1:held]]');
$fake->wait_at_gate('held', HELD);

my ($session, $first, $second) = run_pair('a', 'second [[tokens=1]]');
is($second->{status}, 'completed', 'a turn that waited behind another runs');
is(transactions($session), 1, 'it begins in the transaction that ends the other');

($session, $first, $second) = run_pair('b', 'poison [[tokens=1]]');
is($first->{status}, 'completed', 'an end is stored though a claim beside it fails');
is($second->{status}, 'failed', 'and what cannot be claimed has failed');
is(wait_for_task($node, ask($node, $session, 'third [[tokens=1]]'))->{status},
	'completed', 'the session goes on');

$fake->open_gate('held', HELD);
is(wait_for_task($node, $_->{task})->{status}, 'completed', 'so do the others')
  foreach @held;

done_testing();
