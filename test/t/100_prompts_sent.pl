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

my $none = create_session($node, settings => '{"prompt": ""}')->{id};
$t = wait_for_task($node, ask($node, $none, 'x [[tokens=1]]'));
is((sent())[0]{role}, 'user', 'a session that wants no prompt');
is($t->{prompt_name}, undef, 'nor does its task tell one');

done_testing();
