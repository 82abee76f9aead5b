# Is the right prompt chosen and filled in, and do prompts and contexts survive
# a dump?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = chat_cluster('main', conf => "chat.default_prompt = 'default'");

# The system prompt of a user's next turn, in a session or in a new one.
sub prompt
{
	my ($user, $session) = @_;
	return $node->safe_psql('postgres', 'SELECT chat.build_system_prompt('
		  . literal($user) . ', ' . literal($session) . ')');
}

# Changes settings of the server, and waits until new connections have them.
sub set
{
	my (%settings) = @_;
	$node->append_conf('postgresql.conf', "$_ = '$settings{$_}'")
	  for sort keys %settings;
	$node->reload;
	wait_for($node, "SELECT current_setting('$_') = '$settings{$_}'")
	  for sort keys %settings;
	return;
}

$node->safe_psql('postgres', <<'EOF');
SELECT chat.set_prompt('default', 'default');
SELECT chat.set_prompt('house', 'house of {{environment}}', shared => true);
SELECT chat.set_prompt('welcome', 'welcome {{user_id}}');
SELECT chat.set_prompt('mine', 'mine');
SELECT chat.set_prompt('about', '{{users_information}}');
EOF

# which one
my $first = create_session($node, user_id => 'ada')->{id};
my $second = create_session($node, user_id => 'ada')->{id};
is(prompt('ada', $first), 'default', 'the prompt "default" is the default');
set('chat.default_prompt' => 'house');
is(prompt('ada', $first), 'house of ', 'chat.default_prompt names another');
set('chat.onboarding_prompt' => 'welcome');
is(prompt('ada', $first), 'welcome ada', 'a first session has its own');
is(prompt('ada', $second), 'house of ', 'a second one has not');
is(prompt('bob'), 'welcome bob', 'nor has a session to come, unless it is the first');
is(prompt('ada'), 'house of ', 'whose user has others');
is(prompt(undef), 'house of ', 'nobody in particular is not new');
$node->safe_psql('postgres', 'CREATE ROLE other');
my $others = create_session($node, user_id => 'bob', owner => 'other')->{id};
is(prompt('bob'), 'welcome bob', "another role's sessions do not count");
$node->safe_psql('postgres',
	qq(SELECT chat.update_chat_session('$first', settings => '{"prompt": "mine"}')));
is(prompt('ada', $first), 'mine', "the session's own wish goes before");
$node->safe_psql('postgres', "SELECT chat.delete_chat_session('$first')");
is(prompt('ada', $second), 'welcome ada', 'what is left is the first');

# names that lead nowhere
set('chat.onboarding_prompt' => 'nowhere', 'chat.default_prompt' => 'gone');
my ($rc, $out, $err) = $node->psql('postgres', "SELECT chat.build_system_prompt('bob')");
like($out, qr/^You are a helpful assistant/, 'the built-in prompt is the last resort');
like($err, qr/WARNING:  prompt "nowhere" does not exist.*WARNING:  prompt "gone" does not exist/s,
	'a WARNING names what is missing');
set('chat.onboarding_prompt' => '', 'chat.default_prompt' => '');
($rc, $out, $err) = $node->psql('postgres', "SELECT chat.build_system_prompt('bob')");
is($out, '', 'no name at all is no system prompt');
is($err, '', 'and no WARNING');

# the environment: that of the server in use
$node->safe_psql('postgres', <<'EOF');
CREATE SERVER one FOREIGN DATA WRAPPER chat_llm OPTIONS (base_url 'http://127.0.0.1:1', environment 'staging');
CREATE SERVER two FOREIGN DATA WRAPPER chat_llm OPTIONS (base_url 'http://127.0.0.1:1', environment 'production');
CREATE SERVER three FOREIGN DATA WRAPPER chat_llm OPTIONS (base_url 'http://127.0.0.1:1');
ALTER DATABASE postgres SET chat.default_server = 'one';
EOF
set('chat.default_prompt' => 'house');
is(prompt('ada', $second), 'house of staging', 'environment of the default server');
is(prompt('ada', create_session($node, server => 'two')->{id}) // '', '', 'another user: nothing');
is(prompt(undef, create_session($node, server => 'two')->{id}), 'house of production', "environment of the session's server");
is(prompt(undef, create_session($node, server => 'three')->{id}), 'house of ', 'a server without one');

# the limit of what is said about a user
set('chat.default_prompt' => 'about', 'chat.max_user_context_length' => 20);
$node->safe_psql('postgres', q(SELECT chat.set_user_context('ada', '{"a": "äöü", "b": "1234567890"}')));
unlike(prompt('ada'), qr/cut off/, 'what fits is not cut');
$node->safe_psql('postgres', q(SELECT chat.set_user_context('ada', '{"b": "1234567890123"}')));
like(prompt('ada'), qr/\n<users_information>\nA: äöü\nB: 1234567890\n\[3 more characters were cut off\]\n<\/users_information>$/,
	'what does not is, at a character');

# a dump has them
my $dump = "$node->{_basedir}/dump.sql";
$node->safe_psql('postgres', 'CREATE DATABASE copy');
command_ok([ 'pg_dump', '-f', $dump, $node->connstr('postgres') ], 'the database is dumped');
command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f', $dump, $node->connstr('copy') ], 'and restored');
foreach my $table (qw(chat_prompt chat_user_context))
{
	is_deeply([ rows($node, "SELECT * FROM chat.$table ORDER BY 1, 2, 3", 'copy') ],
		[ rows($node, "SELECT * FROM chat.$table ORDER BY 1, 2, 3") ], "$table is in a dump");
}

done_testing();
