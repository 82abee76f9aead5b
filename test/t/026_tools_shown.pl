# Does a request show the model the tools that its session may use, and no
# others, in an order that stays?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use JSON::PP ();
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake, retries => 0);
$node->safe_psql('postgres', <<'EOF');
CREATE ROLE ann LOGIN;
CREATE ROLE bob LOGIN;
SELECT chat.grant_usage('ann'), chat.grant_usage('bob');
GRANT USAGE ON FOREIGN SERVER fake TO ann, bob;
CREATE FUNCTION public.weather(city text, days integer DEFAULT 3) RETURNS text
	LANGUAGE sql AS $$ SELECT 'sunny' $$;
COMMENT ON FUNCTION public.weather IS E'The weather.\ncity: its name';
EOF

# Registers a tool as a role (undef: shared); options are the arguments.
sub register
{
	my ($role, %args) = @_;
	my $list = join ', ',
	  map { "$_ => " . literal($args{$_}) } sort keys %args;

	$node->safe_psql('postgres',
		$role ? "SET ROLE $role; SELECT chat.register_tool($list)"
		: "SELECT chat.register_tool($list, shared => true)");
	return;
}

# Returns the request of a turn in a new session of a role.
sub body_of
{
	my ($role, $options, %args) = @_;
	my $session = create_session($node, owner => $role, %args);

	$fake->forget;
	my $task = ask($node, $session->{id}, 'hi [[tokens=1]]',
		$options ? (options => $options) : ());
	my $row = wait_for_task($node, $task);
	is($row->{status}, 'completed', "a turn of $role")
	  or diag(encode($row->{error}));
	return ($fake->completions)[0]{body};
}

# Returns the names of the tools that the model is shown.
sub shown
{
	return [ map { $_->{function}{name} } @{ body_of(@_)->{tools} // [] } ];
}

ok(!exists body_of('ann')->{tools}, 'without tools there is no such member');

register('ann', function => 'public.weather');
is_deeply(
	body_of('ann')->{tools},
	[
		{
			type => 'function',
			function => {
				name => 'weather',
				description => 'The weather.',
				parameters => {
					type => 'object',
					properties => {
						city => { type => 'string', description => 'its name' },
						days => { type => 'integer' }
					},
					required => ['city'],
					additionalProperties => JSON::PP::false
				}
			}
		}
	],
	'a tool as the API wants it');
ok(!exists body_of('bob')->{tools}, "another role's tools are not shown");

# without a description there is none
register('ann', kind => 'client', name => 'Zebra');
register(undef, kind => 'client', name => 'ask_user', description => 'shared');
register(undef, kind => 'client', name => 'secret', approval => 'deny');
register('ann', kind => 'client', name => 'off', enabled => 'off');
my $body = body_of('ann');
is_deeply(
	$body->{tools}[0],
	{
		type => 'function',
		function => {
			name => 'Zebra',
			parameters => { type => 'object', properties => {} }
		}
	},
	'no description, no member');
is_deeply(
	[ map { $_->{function}{name} } @{ $body->{tools} } ],
	[qw(Zebra ask_user weather)],
	'own and shared tools in order; not those that are denied or disabled');
is_deeply(shown('bob'), ['ask_user'], 'the shared tools are for everybody');

# of the same name, the role's own one counts
register('ann', kind => 'client', name => 'ask_user', description => 'own');
register('bob', kind => 'client', name => 'ask_user', approval => 'deny');
my ($own) = grep { $_->{function}{name} eq 'ask_user' }
  @{ body_of('ann')->{tools} };
is($own->{function}{description}, 'own', 'own before shared');
is_deeply(shown('bob'), [], 'also when it is denied');
register('bob', kind => 'client', name => 'ask_user', enabled => 'off');
is_deeply(shown('bob'), ['ask_user'],
	'one that is disabled leaves the place to the shared one');

# the list of the session, and that of the turn
is_deeply(
	shown('ann', undef, settings => '{"tools": ["weather", "secret", "off", "none"]}'),
	['weather'],
	"the session's list limits");
ok(!exists body_of('ann', undef, settings => '{"tools": []}')->{tools},
	'an empty list shows none');
is_deeply(
	shown('ann', '{"tools": ["ask_user"]}', settings => '{"tools": ["weather"]}'),
	['ask_user'],
	"the turn's list goes before");

# many sessions in one claim, each with its own
my @want = ([ 'ann', '{}', 3 ], [ 'ann', '{"tools": ["weather"]}', 1 ],
	[ 'bob', '{}', 1 ], [ 'bob', '{"tools": []}', 0 ]);
my $turns = join ', ', map { "('$_->[0]', '$_->[1]'::jsonb, $_->[2])" } @want;
$fake->forget;
my @tasks = split /\n/, $node->safe_psql('postgres', <<"EOF");
SELECT chat.stream_chat_completion((chat.create_chat_session(
	owner => v.role::regrole, settings => v.settings)).id,
	format('%s:%s [[tokens=1]]', v.n, i))
FROM (VALUES $turns) AS v (role, settings, n), generate_series(1, 10) AS i
EOF
wait_for_task($node, $_) foreach @tasks;
my @bodies = map { $_->{body} } $fake->completions;
is(@bodies, 40, 'forty turns at once');
is( (
		grep {
			$_->{messages}[-1]{content} =~ /^(\d)/;
			$1 == @{ $_->{tools} // [] }
		} @bodies),
	40,
	'each was shown its own tools');

# a tool that is dropped is not shown any more
$node->safe_psql('postgres', q(SET ROLE ann; SELECT chat.drop_tool('Zebra')));
is_deeply(shown('ann'), [qw(ask_user weather)], 'a dropped tool is gone');

$node->stop;
done_testing();
