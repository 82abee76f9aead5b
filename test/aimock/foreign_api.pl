# The runtime against an implementation of the API that is not ours: npm's
# aimock.  What the bundled fake says and what others say must not differ.
use strict;
use warnings FATAL => 'all';
use utf8;
use FindBin;
use lib "$FindBin::RealBin/../t/lib";
use ChatTest;
use Encode ();
use IPC::Run;
use JSON::PP;
use Test::More;

my $npm = $ENV{CHAT_NPM} or die "CHAT_NPM is not set\n";
my ($in, $out, $err) = ('', '', '');
my $mock = IPC::Run::start(
	[ 'node', "$FindBin::RealBin/server.mjs", "$npm/node_modules" ],
	'<', \$in, '>', \$out, '2>', \$err, IPC::Run::timeout(60));
$mock->pump until $out =~ /^port=(\d+)$/m;
my ($port) = $out =~ /^port=(\d+)$/m;

my $node = chat_cluster('main');
$node->safe_psql('postgres', <<"SQL");
CREATE SERVER foreign_api FOREIGN DATA WRAPPER chat_llm
	OPTIONS (base_url 'http://127.0.0.1:$port/v1', model 'gpt-4o');
CREATE ROLE app LOGIN;
SELECT chat.grant_usage('app');
GRANT USAGE ON FOREIGN SERVER foreign_api TO app;
GRANT CREATE ON SCHEMA public TO app;
ALTER ROLE app SET chat.default_server = 'foreign_api';
SQL
$node->append_conf('postgresql.conf', 'chat.retry_base_delay = 10ms');
$node->reload;

# Runs a statement as the application.
sub app
{
	return $node->safe_psql('postgres', Encode::encode('UTF-8', $_[0]), extra_params => [ '-U', 'app' ]);
}

# Sends a message in a new session; returns its finished task.
sub turn
{
	my ($message) = @_;
	my $task = app("SELECT chat.stream_chat_completion((chat.create_chat_session()).id, '$message')");

	$node->poll_query_until('postgres',
		"SELECT finished_at IS NOT NULL FROM chat.chat_task WHERE id = '$task'")
	  or die "task $task does not end\n";
	return $task;
}

# Returns a column of a task, or of its last assistant message.
sub of_task { return app("SELECT $_[1] FROM chat.chat_task WHERE id = '$_[0]'") }

sub of_answer
{
	return app("SELECT $_[1] FROM chat.chat_message WHERE task_id = '$_[0]'"
		  . " AND role = 'assistant' ORDER BY sequence DESC LIMIT 1");
}

# Joins the text of a task's deltas.
sub streamed
{
	return app("SELECT string_agg(payload->>'delta', '' ORDER BY seq)"
		  . " FROM chat.get_task_events('$_[0]') WHERE payload->>'type' = 'text-delta'");
}

my $task = turn('plain');
is(of_task($task, 'status'), 'completed', 'an answer arrives');
is(of_answer($task, 'content'), 'The quick brown fox jumps over the lazy dog.', 'it is whole');
is(streamed($task), of_answer($task, 'content'), 'the events tell the same');
cmp_ok(of_task($task, 'completion_tokens'), '>', 0, 'with its usage');

$task = turn('unicode');
is(of_answer($task, "content = 'Grüße, 世界! “quoted” \\ back' || chr(10) || 'slash'"), 't',
	'every character survives');
is(streamed($task), of_answer($task, 'content'), 'also in the events');

$task = turn('think');
is(of_answer($task, 'content'), 'Forty-two.', 'reasoning is not the answer');
like(of_answer($task, "metadata->>'reasoning'"), qr/Six times nine/, 'and is kept apart');

app(q{CREATE FUNCTION public.get_weather(city text) RETURNS text
	LANGUAGE sql AS $$ SELECT 'sunny in ' || city $$});
app(q{SELECT chat.register_tool('public.get_weather(text)')});
$task = turn('weather');
is(of_task($task, "status || ' ' || steps"), 'completed 2', 'two steps with tools between them');
is(of_answer($task, 'content'), 'Sunny in both.', 'the answer goes on');
is(app("SELECT string_agg(result, ', ' ORDER BY position) FROM chat.chat_tool_call WHERE task_id = '$task'"),
	'sunny in Paris, sunny in Rome', 'parallel calls have run');

$task = turn('limited');
is(of_task($task, 'status'), 'completed', '429 with Retry-After is tried again');
is(of_answer($task, 'content'), 'Here you are.', 'and answered then');

$task = turn('refused');
is(of_task($task, "status || ' ' || (error->>'code')"), 'failed authentication_failed', '401 is final');
like(of_task($task, "error->>'message'"), qr/You may not/, "with the endpoint's own words");

$node->append_conf('postgresql.conf', 'chat.max_retries = 0');
$node->reload;
$task = turn('torn');
is(of_task($task, 'status'), 'failed', 'a torn stream fails');
is(of_answer($task, "metadata->>'interrupted'"), 'true', 'what came is kept, and marked');

close $mock->{INPUT} if $mock->{INPUT};
$mock->kill_kill;
done_testing();
