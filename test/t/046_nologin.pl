# Do SQL tools run as a role that may not log in?  From 17 on they do; before,
# a background worker cannot be connected as one, and that is said clearly.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake, retries => 0);
$node->safe_psql('postgres', <<'EOF');
CREATE ROLE team LOGIN;
SELECT chat.grant_usage('team');
GRANT USAGE ON FOREIGN SERVER fake TO team;
CREATE FUNCTION public.who() RETURNS text LANGUAGE sql
	AS $$ SELECT concat_ws(' ', session_user, current_user) $$;
SET ROLE team;
SELECT chat.register_tool('public.who');
EOF
my $bypasses = row($node,
	q{SELECT current_setting('server_version_num')::int >= 170000 AS yes})->{yes};

# Runs the tool in a session of the role; returns the answer's last words,
# which are what the model was told.
sub told
{
	my ($what) = @_;
	my $session = create_session($node, owner => 'team');
	my $turn = turn_of($node, ask($node, $session->{id}, 'go [[tool=who id=c1]]'));

	is($turn->{status}, 'completed', "$what: the turn goes on")
	  or diag(encode($turn->{error}));
	return (grep { $_->{role} eq 'assistant' } reverse @{ $turn->{messages} })[0]
	  {content};
}

is(told('with LOGIN'), 'Tool said: team team', 'the tool runs as the role');

$node->safe_psql('postgres', 'ALTER ROLE team NOLOGIN');
my $said = told('without LOGIN');
my ($rc, $out, $err) = $node->psql('postgres',
	q{SET ROLE team; SELECT chat.register_tool('public.who', name => 'me')});
if ($bypasses)
{
	is($said, 'Tool said: team team', 'the tool still runs as the role');
	is($rc, 0, 'the role may register tools')
	  or diag($err);
}
else
{
	like($said, qr/may not log in.*"code" : "tool_not_available"/,
		'the model is told why it does not run');
	like($err, qr/before PostgreSQL 17 that needs LOGIN.*ALTER ROLE team LOGIN/s,
		'its tools are refused, with the way out');
}

# this needs no LOGIN anywhere, but CONNECT everywhere
$node->safe_psql('postgres',
	'ALTER ROLE team LOGIN; REVOKE CONNECT ON DATABASE postgres FROM PUBLIC');
like(told('without CONNECT'), qr/may not connect to the database/,
	'a role without CONNECT has no process');

done_testing();
