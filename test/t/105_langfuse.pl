# Do prompts come from a Langfuse server, without turns waiting for it?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Langfuse;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $store = ChatTest::Langfuse->new(PostgreSQL::Test::Utils::tempdir() . '/langfuse', 'pk-1', 'sk-lf-secret');
my $node = chat_cluster('main', conf => "chat.default_prompt = 'greeting'\nchat.prompt_server = 'prompts'");
my $host = 'http://127.0.0.1:' . $store->port;

create_server($node, $fake);
$node->safe_psql('postgres', "SELECT chat.set_prompt('greeting', 'stored {{user_id}}')");
my $s = create_session($node, user_id => 'ada')->{id};

# Makes a turn; returns its task and the system prompt of the request.
sub turn
{
	my ($message) = @_;
	my $task = wait_for_task($node, ask($node, $s, $message // 'x [[tokens=1]]'));
	my $first = $fake->last_request->{body}{messages}[0];

	return ($task, $first->{role} eq 'system' ? $first->{content} : undef);
}

# Lets the prompts grow old.
sub age
{
	my ($minutes) = @_;
	$node->safe_psql('postgres', "UPDATE chat.chat_prompt_cache SET fetched_at = fetched_at - interval '$minutes min', tried_at = tried_at - interval '$minutes min'");
	return;
}

# Returns how many requests the store has had.
sub asked
{
	return scalar(my @r = $store->requests);
}

# Waits until the cache has a version.
sub cached
{
	my ($version) = @_;
	wait_for($node, "SELECT version = $version FROM chat.chat_prompt_cache WHERE name = 'greeting'");
	return;
}

# not configured: no server, no keys, one key
$store->set(greeting => { latest => [ 7, 'latest {{user_id}}' ], production => [ 5, 'production {{user_id}}' ] });
is((turn())[1], 'stored ada', 'without a server the stored prompt serves');
$node->safe_psql('postgres', "CREATE SERVER prompts FOREIGN DATA WRAPPER chat_langfuse OPTIONS (host '$host')");
is((turn())[1], 'stored ada', 'without keys, too');
$node->safe_psql('postgres', "CREATE USER MAPPING FOR PUBLIC SERVER prompts OPTIONS (public_key 'pk-1')");
is((turn())[1], 'stored ada', 'and with one of them');
is(asked(), 0, 'nothing was asked for');

# the first turn waits, in the queue
$node->safe_psql('postgres', "ALTER USER MAPPING FOR PUBLIC SERVER prompts OPTIONS (ADD secret_key 'sk-lf-secret')");
is($node->safe_psql('postgres', "SELECT chat.build_system_prompt('ada', '$s')"), 'stored ada', 'build_system_prompt() asks nobody');
is(asked(), 0, 'not even then');
my ($t, $text) = turn();
is($text, 'latest ada', 'the first turn has the prompt of the server');
is_deeply([ @$t{qw(status prompt_name prompt_version)} ], [ 'completed', 'greeting', 7 ], 'with its version on the task');
is_deeply([ $store->requests ], ['GET /api/public/v2/prompts/greeting?label=latest'], 'by one request');
is($node->safe_psql('postgres', "SELECT chat.build_system_prompt('ada', '$s')"), 'latest ada', 'build_system_prompt() knows it now');
is((turn())[1], 'latest ada', 'the next turn, too');
is(asked(), 1, 'from the cache');

# stale: the turn does not wait
$store->set(greeting => { latest => [ 8, 'newer' ] });
age(2);
$store->hold;
is((turn())[1], 'latest ada', 'an old prompt serves while another is fetched');
wait_for($node, 'SELECT true') until asked() == 2;
turn();
is(asked(), 2, 'by one request, however many turns');
$store->release;
cached(8);
is((turn())[1], 'newer', 'which serves the next turns');

# a chat prompt, and one that has the syntax in its data
$store->set(greeting => { latest => [ 9, [ { role => 'system', content => 'one {{user_id}}' }, { role => 'user', content => 'no' }, { role => 'system', content => 'two' }, { type => 'placeholder', name => 'x' } ] ] });
age(2);
turn();
cached(9);
is((turn())[1], "one ada\n\ntwo", 'the system messages of a chat prompt');

# failures: what was fetched serves, with a WARNING
$store->fail(500);
age(2);
my $offset = -s $node->logfile;
is((turn())[1], "one ada\n\ntwo", 'a server that fails');
wait_for($node, "SELECT error IS NOT NULL FROM chat.chat_prompt_cache WHERE name = 'greeting'");
is((turn())[1], "one ada\n\ntwo", 'is not missed');
like(slurp_file($node->logfile, $offset), qr/WARNING:  could not fetch prompt "greeting" from server "prompts"\n.*HTTP status 500: out of order/s, 'the log has a WARNING');
$store->fail(0);

# a prompt that the server has not: the stored one
$node->safe_psql('postgres', "SELECT chat.set_prompt('mine / own', 'stored mine')");
$s = create_session($node, user_id => 'ada', settings => '{"prompt": "mine / own"}')->{id};
my $before = asked();
$offset = -s $node->logfile;
is((turn())[1], 'stored mine', 'a prompt that is not there');
like(slurp_file($node->logfile, $offset), qr/WARNING:  could not fetch prompt "mine \/ own" from server "prompts"\n.*HTTP status 404/s, 'the log has a WARNING');
is((turn())[1], 'stored mine', 'is not waited for');
is(asked(), $before + 1, 'or asked for again at once');
is(($store->requests)[-1], 'GET /api/public/v2/prompts/mine%20%2F%20own?label=latest', 'its name is encoded');

# a server that does not answer
$s = create_session($node, user_id => 'ada', settings => '{"prompt": "slow"}')->{id};
$node->safe_psql('postgres', "SELECT chat.set_prompt('slow', 'stored slow'); ALTER SERVER prompts OPTIONS (ADD timeout '200ms')");
$store->hold;
is((turn())[1], 'stored slow', 'a server that does not answer in time');
$store->release;

# an answer that is no prompt, and a server that is not there
foreach my $case ([ odd => { odd => 1 }, qr/the answer is not what was asked for/ ], [ empty => '', qr/the answer is not what was asked for/ ])
{
	my ($name, $prompt, $why) = @$case;
	$store->set($name => { latest => [ 1, $prompt ] });
	$node->safe_psql('postgres', "SELECT chat.set_prompt('$name', 'stored $name')");
	$s = create_session($node, user_id => 'ada', settings => encode({ prompt => $name }))->{id};
	is((turn())[1], "stored $name", 'an answer that is no prompt');
	like(row($node, "SELECT error FROM chat.chat_prompt_cache WHERE name = '$name'")->{error}, $why, 'is said to be none');
}
$node->safe_psql('postgres', "ALTER SERVER prompts OPTIONS (SET host 'http://127.0.0.1:1'); SELECT chat.set_prompt('alone', 'stored alone')");
$s = create_session($node, user_id => 'ada', settings => '{"prompt": "alone"}')->{id};
is((turn())[1], 'stored alone', 'a server that is not there');
$node->safe_psql('postgres', "ALTER SERVER prompts OPTIONS (SET host '$host')");

# two turns that wait for two prompts: one does not end the other's waiting
$store->set(one => { latest => [ 1, 'first' ] }, two => { latest => [ 1, 'second' ] });
$node->safe_psql('postgres', "SELECT chat.set_prompt('two', 'stored second'); ALTER SERVER prompts OPTIONS (SET timeout '5s')");
$store->hold('/two?');
my $second = ask($node, create_session($node, settings => '{"prompt": "two"}')->{id}, 'second [[tokens=1]]');
wait_for($node, 'SELECT true') until grep { m{/two\?} } $store->requests;
$t = wait_for_task($node, ask($node, create_session($node, settings => '{"prompt": "one"}')->{id}, 'first [[tokens=1]]'));
is($t->{prompt_name}, 'one', 'one prompt is there');
$store->release;
wait_for_task($node, $second);
is($fake->last_request->{body}{messages}[0]{content}, 'second', 'the other is waited for');

# production has its own label; cache_ttl 0 fetches before every turn
$s = create_session($node, user_id => 'ada')->{id};
$store->set(greeting => { production => [ 5, 'production {{user_id}}' ], latest => [ 9, 'x' ] });
$node->safe_psql('postgres', "ALTER SERVER prompts OPTIONS (ADD environment 'production', ADD cache_ttl '0', DROP timeout)");
is((turn())[1], 'production ada', 'production has its own label');
$store->set(greeting => { production => [ 6, 'next' ] });
is((turn())[1], 'next', 'without a cache each turn has the newest');
$before = asked();
my @tasks = map { ask($node, create_session($node)->{id}, 'x [[tokens=1]]') } 1 .. 5;
is(wait_for_task($node, $_)->{prompt_version}, 6, 'several at once') for @tasks;
cmp_ok(asked(), '>', $before, 'they have asked');

# wrong keys: a failure like others; keys are nowhere to be seen
$node->safe_psql('postgres', "ALTER USER MAPPING FOR PUBLIC SERVER prompts OPTIONS (SET secret_key 'sk-lf-wrong')");
is((turn())[1], 'next', 'keys that are refused');
unlike(slurp_file($node->logfile), qr/(?<!secret_key ')sk-lf-/, 'no key in the log');
is($node->safe_psql('postgres', "SELECT count(*) FROM chat.chat_prompt_cache AS c WHERE c::text ~ 'sk-lf|pk-1'"), 0, 'nor in the cache');

# options
foreach my $case (
	[ "CREATE SERVER x FOREIGN DATA WRAPPER chat_langfuse", qr/option "host" is required/ ],
	[ "CREATE SERVER x FOREIGN DATA WRAPPER chat_langfuse OPTIONS (host 'http://example.com')", qr/invalid value for option "host"/ ],
	[ "CREATE SERVER x FOREIGN DATA WRAPPER chat_langfuse OPTIONS (host 'https://example.com', model 'x')", qr/invalid option "model".*Valid options in this context are: allow_http, allow_private, ca_file, cache_ttl, connect_timeout, environment, host, proxy, timeout/s ],
	[ "CREATE USER MAPPING FOR CURRENT_USER SERVER prompts OPTIONS (api_key 'x')", qr/Valid options in this context are: public_key, secret_key/ ])
{
	my ($rc, $out, $err) = $node->psql('postgres', $case->[0]);
	like($err, $case->[1], $case->[0]);
}

done_testing();
