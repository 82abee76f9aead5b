# Does the system prompt of a session go with its requests?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');

create_server($node, $fake);
$node->append_conf('postgresql.conf', "chat.default_prompt = 'default'");
$node->reload;
$node->safe_psql('postgres', <<'EOS');
SELECT chat.set_prompt('default', 'a');
SELECT chat.set_prompt('default', 'Hi {{user_id}} {{users_information}}');
EOS
wait_for($node, "SELECT current_setting('chat.default_prompt') = 'default'");

# Returns the messages of the last request.
sub sent
{
	return @{ $fake->last_request->{body}{messages} };
}

my $s = create_session($node, user_id => 'ada')->{id};
my $t = wait_for_task($node, ask($node, $s, 'x [[tokens=1]]'));
is_deeply([ @$t{qw(status prompt_name prompt_version)} ],
	[ 'completed', 'default', 2 ], 'the prompt and its version stand on the task');
is((sent())[0]{role}, 'system', 'it is the first message');
is((sent())[0]{content},
	$node->safe_psql('postgres', "SELECT chat.build_system_prompt('ada', '$s')"),
	'with the text that build_system_prompt() tells');
is((sent())[1]{role}, 'user', 'the question follows');

# a user's context that cannot be read does not stop the turn
$node->safe_psql('postgres', 'ALTER TABLE chat.chat_user_context RENAME TO gone');
$t = wait_for_task($node, ask($node, $s, 'y [[tokens=1]]'));
is($t->{status}, 'completed', 'a turn without the context of its user');
like((sent())[0]{content}, qr/not met/, 'who counts as one not met before');

# who is new is welcomed, once
$node->append_conf('postgresql.conf', "chat.onboarding_prompt = 'welcome'");
$node->reload;
$node->safe_psql('postgres', "SELECT chat.set_prompt('welcome', 'Welcome {{user_id}}')");
wait_for($node, "SELECT current_setting('chat.onboarding_prompt') = 'welcome'");
# the worker reads it at its own time
my $new;
for (1 .. 100)
{
	$new = create_session($node, user_id => "bob $_")->{id};
	$t = wait_for_task($node, ask($node, $new, 'x [[tokens=1]]'));
	last if $t->{prompt_name} eq 'welcome';
}
is($t->{prompt_name}, 'welcome', "a user's first session has the prompt for it");
like((sent())[0]{content}, qr/^Welcome bob/, 'which is sent');
my ($user) = (sent())[0]{content} =~ /^Welcome (.*)/;
$t = wait_for_task($node, ask($node, create_session($node, user_id => $user)->{id}, 'x [[tokens=1]]'));
is($t->{prompt_name}, 'default', 'the second one has not');

# without any prompt the built-in one serves
$node->safe_psql('postgres', "SELECT chat.delete_prompt('default'), chat.delete_prompt('welcome')");
$t = wait_for_task($node, ask($node, $s, 'x [[tokens=1]]'));
like((sent())[0]{content}, qr/^You are a helpful assistant\./, 'the last resort');
is($t->{prompt_name}, undef, 'has no name');
$node->safe_psql('postgres', "SELECT chat.set_prompt('default', 'again')");

my $none = create_session($node, settings => '{"prompt": ""}')->{id};
$t = wait_for_task($node, ask($node, $none, 'x [[tokens=1]]'));
is((sent())[0]{role}, 'user', 'a session that wants no prompt');
is($t->{prompt_name}, undef, 'nor does its task tell one');

# the environment is that of the server that is asked: the call's, or the
# caller's default one, which the worker knows nothing of
$node->safe_psql('postgres', server_sql($fake->port, name => 'staging', environment => 'staging')
	  . "ALTER SERVER fake OPTIONS (ADD environment 'production');"
	  . "SELECT chat.set_prompt('where', 'In {{environment}}')");
my $where = create_session($node, settings => '{"prompt": "where"}')->{id};
foreach my $case ([ 'production', '', '' ], [ 'staging', '', ", server => 'staging'" ],
	[ 'staging', "SET chat.default_server = 'staging';", '' ])
{
	my ($environment, $set, $server) = @$case;

	wait_for_task($node, $node->safe_psql('postgres', "$set SELECT chat.stream_chat_completion('$where', 'x [[tokens=1]]'$server)"));
	is((sent())[0]{content}, "In $environment", "the environment of a turn: $environment $set$server");
}
is($node->safe_psql('postgres', "SET chat.default_server = 'staging'; SELECT chat.build_system_prompt(NULL, '$where')"),
	'In staging', 'build_system_prompt() tells the same');

done_testing();
