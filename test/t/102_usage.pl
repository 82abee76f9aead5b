# Is everything that is used counted, and are budgets kept?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');

create_server($node, $fake, input_price => '2.5', output_price => '10',
	max_tokens_per_task => 500);
$node->safe_psql('postgres', server_sql($fake->port, name => 'free'));

# Returns the rows of the view for a user.
sub usage
{
	my ($user) = @_;
	return rows($node, 'SELECT server, kind, model, requests, prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, estimated, cost FROM chat.usage WHERE user_id = '
		  . literal($user) . ' ORDER BY server, kind');
}

# Makes a turn and returns its task.
sub turn
{
	my ($id, $message, %args) = @_;
	return wait_for_task($node, ask($node, $id, $message, %args));
}

# by user, server, model, kind
my $s = create_session($node, user_id => 'ada')->{id};
turn($s, 'a [[tokens=1 prompt_tokens=100 completion_tokens=20 cached=40 reasoning_tokens=5]]');
turn($s, 'b [[tokens=1 prompt_tokens=60 completion_tokens=10]]');
my $f = create_session($node, user_id => 'ada', server => 'free')->{id};
turn($f, 'c [[tokens=8 usage=none]]');
my ($paid, $free) = (grep { $_->{server} eq 'fake' } usage('ada')), (grep { $_->{server} eq 'free' } usage('ada'));
is_deeply([ @$paid{qw(kind model requests prompt_tokens completion_tokens cached_tokens reasoning_tokens)} ],
	[ 'completion', 'fake-1', 2, 160, 30, 40, 5 ], 'the turns of a server add up');
cmp_ok(abs($paid->{cost} - (160 * 2.5 + 30 * 10) / 1e6), '<', 1e-9, 'to what they cost');
is($paid->{estimated}, JSON::PP::false, 'the endpoint has counted them');
($free) = grep { $_->{server} eq 'free' } usage('ada');
is($free->{cost}, undef, 'a server without prices');
is($free->{estimated}, JSON::PP::true, 'one that does not count');
cmp_ok($free->{prompt_tokens}, '>', 0, 'is guessed at');
is(scalar usage('bob'), 0, "nobody else's");

# a failed turn, a cancelled one
my $e = create_session($node, user_id => 'eve')->{id};
turn($e, 'x [[status=400]]');
is((usage('eve'))[0]{prompt_tokens}, 0, 'a request that was refused has cost nothing');
my $task = ask($node, $e, 'y [[tokens=5 gateat=3:stop]]');
$fake->wait_at_gate('stop');
$node->safe_psql('postgres', "SELECT chat.cancel_task('$task')");
wait_for_task($node, $task);
my ($eve) = usage('eve');
cmp_ok($eve->{prompt_tokens}, '>', 0, 'one that was broken off has');
is($eve->{estimated}, JSON::PP::true, 'about');
is_deeply(row($node, "SELECT usage->'estimated' AS estimated, prompt_tokens > 0 AS asked, completion_tokens > 0 AS answered FROM chat.chat_task WHERE id = '$task'"),
	{ estimated => JSON::PP::true, asked => JSON::PP::true, answered => JSON::PP::true }, 'as its task says');

# one that fails in the middle of its answer, with and without a word of the endpoint
$node->safe_psql('postgres', "ALTER SERVER fake OPTIONS (ADD retries '0')");
my $x = create_session($node, user_id => 'max')->{id};
my $broken = turn($x, 'y [[tokens=20 cutafter=10]]');
is($broken->{status}, 'failed', 'a turn that breaks off');
is($broken->{usage}{estimated}, JSON::PP::true, 'is counted, about');
cmp_ok($broken->{prompt_tokens}, '>', 0, 'what was asked');
cmp_ok($broken->{completion_tokens}, '>', 0, 'and what was answered');
is((usage('max'))[0]{estimated}, JSON::PP::true, 'the view says so, too');
my $told = turn($x, 'y [[tokens=20 cutafter=10 usage=first prompt_tokens=77 completion_tokens=3 cached=8]]');
is_deeply([ @$told{qw(status prompt_tokens completion_tokens)}, @{ $told->{usage} }{qw(cached_tokens estimated)} ],
	[ 'failed', 77, 3, 8, undef ], 'unless the endpoint has told');
my $mute = turn(create_session($node)->{id}, 'y [[hang=1]]', options => '{"first_token_timeout": 0.2}');
is_deeply([ $mute->{status}, $mute->{prompt_tokens} > 0 ? 1 : 0, $mute->{completion_tokens}, $mute->{usage}{estimated} ],
	[ 'failed', 1, 0, JSON::PP::true ], 'an endpoint that says nothing has been asked, too');
is_deeply(row($node, "SELECT total_prompt_tokens AS p, total_completion_tokens AS c FROM chat.chat_session WHERE id = '$x'"),
	{ p => 77 + $broken->{prompt_tokens}, c => 3 + $broken->{completion_tokens} }, 'both count for the session');
is_deeply([ map { $_->{u}{prompt_tokens} } rows($node, "SELECT metadata->'usage' AS u FROM chat.chat_message WHERE session_id = '$x' AND role = 'assistant' ORDER BY sequence") ],
	[ $broken->{prompt_tokens}, 77 ], 'and stand on their messages');

# deleting a session gives nothing back
my @before = usage('ada');
$node->safe_psql('postgres', "SELECT chat.delete_chat_session('$s')");
is_deeply([ usage('ada') ], \@before, 'what a deleted session has used stays');

# by rights
$node->safe_psql('postgres', "CREATE ROLE other; SELECT chat.grant_usage('other')");
is($node->safe_psql('postgres', 'SET ROLE other; SELECT count(*) FROM chat.usage'), 0, "another role's is not seen");
is($node->safe_psql('postgres', "SET chat.user_id = 'bob'; SET ROLE other; SELECT count(*) FROM chat.usage"), 0, "nor another user's");

# max_tokens_per_task: before the request
my $limited = create_session($node, settings => '{"max_tokens_per_task": 100000}')->{id};
$fake->forget;
my $t = turn($limited, 'z ' . 'many words ' x 1000);
is($t->{status}, 'failed', 'a request larger than the budget of a task');
is($t->{error}{code}, 'limit_reached', 'reaches the limit');
like($t->{error}{message}, qr/max_tokens_per_task is 500$/, "the server's, which a session cannot raise");
is(scalar $fake->completions, 0, 'before any request');
is(turn($limited, 'ok [[tokens=1]]', options => '{"max_tokens_per_task": 5}')->{error}{code} // '', 'limit_reached', 'but lower');

# ... and between steps
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION public.noop() RETURNS text LANGUAGE sql AS $$ SELECT 'done' $$;
SET chat.enable_superuser_tools = on;
SELECT chat.register_tool('public.noop()', description => 'nothing');
EOS
my $steps = create_session($node, server => 'free', settings => '{"max_tokens_per_task": 700}')->{id};
$node->append_conf('postgresql.conf', 'chat.enable_superuser_tools = on');
$node->reload;
$fake->forget;
$t = turn($steps, 'loop [[tool=noop args={} steps=9 prompt_tokens=250 completion_tokens=10]]');
is($t->{error}{code}, 'limit_reached', 'a task ends between steps');
cmp_ok($t->{prompt_tokens} + $t->{completion_tokens}, '<=', 700, 'within its budget');
is(scalar $fake->completions, 2, 'after the steps that it had room for');
is(row($node, "SELECT count(*) AS n FROM chat.chat_message WHERE session_id = '$steps' AND role = 'tool'")->{n}, 2,
	'whose results are stored');
is_deeply([ map { $_->{u}{prompt_tokens} } rows($node, "SELECT metadata->'usage' AS u FROM chat.chat_message WHERE session_id = '$steps' AND role = 'assistant' ORDER BY sequence") ],
	[ 250, 250 ], 'each step has its own count');
is_deeply([ @$t{qw(steps prompt_tokens completion_tokens)}, @{ $t->{usage} }{qw(prompt_tokens estimated)} ], [ 2, 500, 20, 500, undef ],
	'the task their sum, without the request that was not made');
is_deeply(row($node, "SELECT total_prompt_tokens AS p, total_completion_tokens AS c FROM chat.chat_session WHERE id = '$steps'"),
	{ p => 500, c => 20 }, 'the session, too');

# an attempt that broke off and was repeated has cost something, too
my $again = create_session($node, user_id => 'ida', server => 'free')->{id};
my $repeated = turn($again, '[[tokens=4 cutafter=2 times=2 key=again prompt_tokens=70 completion_tokens=4]]');
is_deeply([ @$repeated{qw(status steps)}, $repeated->{usage}{estimated} ], [ 'completed', 1, JSON::PP::true ],
	'a turn whose attempts broke off: some of its usage is estimated');
cmp_ok($repeated->{prompt_tokens}, '>', 70, 'more than the last attempt');
is($repeated->{usage}{prompt_tokens}, $repeated->{prompt_tokens}, 'as its usage says');
is_deeply([ map { @$_{qw(requests prompt_tokens completion_tokens)} } usage('ida') ],
	[ 1, @$repeated{qw(prompt_tokens completion_tokens)} ], 'and the view');
$fake->forget;
$t = turn(create_session($node, server => 'free', settings => '{"max_tokens_per_task": 600}')->{id},
	'[[tokens=4 cutafter=2 usage=first times=1 key=spent prompt_tokens=650 completion_tokens=4]]');
is($t->{error}{code}, 'limit_reached', 'what it has cost counts for max_tokens_per_task');
is(scalar $fake->completions, 1, '  before the request that would repeat it');
is_deeply(row($node, "SELECT total_prompt_tokens AS p, total_completion_tokens AS c FROM chat.chat_session WHERE id = '$again'"),
	{ p => $repeated->{prompt_tokens}, c => $repeated->{completion_tokens} }, 'and the session');
cmp_ok($repeated->{completion_tokens}, '>', 4, 'the text that was taken back is in it');
is(row($node, "SELECT metadata->'usage'->'prompt_tokens' AS n FROM chat.chat_message WHERE session_id = '$again' AND role = 'assistant'")->{n},
	70, 'the message tells of its own request');

# the limit of a day
$node->safe_psql('postgres', 'ALTER DATABASE postgres SET chat.max_tokens_per_user_per_day = 300');
my $d = create_session($node, user_id => 'dan', server => 'free')->{id};
is(turn($d, 'a [[tokens=1 prompt_tokens=290 completion_tokens=9]]')->{status}, 'completed', 'a user below the limit of a day');
is(turn($d, 'b [[tokens=1 prompt_tokens=1 completion_tokens=1]]')->{status}, 'completed', 'one token is left');
my $d2 = create_session($node, user_id => 'dan', server => 'free')->{id};
foreach my $id ($d, $d2)
{
	my ($rc, $out, $err) = $node->psql('postgres', "SELECT chat.stream_chat_completion('$id', 'c')", on_error_stop => 1, extra_params => ['-v', 'VERBOSITY=verbose']);
	like($err, qr/ERROR:  53400: the user's tokens of this day are used up\nDETAIL:  They are 301; chat.max_tokens_per_user_per_day is 300/, 'above it: an error');
}
# whatever it is that would ask a model
$fake->forget;
foreach my $call ("regenerate('$d')", "edit_message('$d', 1, 'c')", "generate_session_title('$d')")
{
	my ($rc, $out, $err) = $node->psql('postgres', "SELECT chat.$call");
	like($err, qr/the user's tokens of this day are used up/, "above it: $call");
}
my ($asked, $said, $why) = $node->psql('postgres', "CALL chat.ask('c', '$d')");
like($why, qr/the user's tokens of this day are used up/, 'above it: ask()');
is(scalar $fake->completions, 0, 'before any request');
is(row($node, "SELECT count(*) AS n FROM chat.chat_message WHERE session_id = '$d' AND NOT active")->{n}, 0, 'and nothing is set aside');
$node->safe_psql('postgres', "SELECT chat.delete_chat_session('$d')");
my ($rc, $out, $err) = $node->psql('postgres', "SELECT chat.stream_chat_completion('$d2', 'c')");
like($err, qr/They are 301/, 'deleting a session does not help');
is(turn(create_session($node, user_id => 'dora', server => 'free')->{id}, 'a [[tokens=1]]')->{status}, 'completed', "others' limits are their own");
is(turn(create_session($node, server => 'free')->{id}, 'a [[tokens=1]]')->{status}, 'completed', 'nobody in particular has none');

# of a day: what was used before midnight, in a session that is gone as in one
# that is there, does not count
my $d3 = create_session($node, user_id => 'dan', server => 'free')->{id};
$node->safe_psql('postgres', <<"EOS");
UPDATE chat.chat_usage SET created_at = created_at - interval '1 day' WHERE user_id = 'dan';
ALTER DATABASE postgres SET chat.max_tokens_per_user_per_day = 30;
EOS
is(turn($d3, 'a [[tokens=1 prompt_tokens=20 completion_tokens=9]]')->{status}, 'completed', 'on the next day there are tokens again');
is(turn($d3, 'a [[tokens=1 prompt_tokens=20 completion_tokens=9]]')->{status}, 'completed', 'as many as there were');
like(($node->psql('postgres', "SELECT chat.stream_chat_completion('$d3', 'c')"))[2], qr/They are 58/, 'and they are used up, too');
$node->safe_psql('postgres', <<"EOS");
UPDATE chat.chat_task SET started_at = started_at - interval '1 day',
	finished_at = finished_at - interval '1 day' WHERE session_id = '$d3';
EOS
is(turn($d3, 'b [[tokens=1 prompt_tokens=2 completion_tokens=3]]')->{status}, 'completed', 'tasks of yesterday do not count');
is_deeply([ map { [ @$_{qw(age prompt_tokens completion_tokens)} ] }
		rows($node, "SELECT (now() AT TIME ZONE 'UTC')::date - day AS age, sum(prompt_tokens) AS prompt_tokens, sum(completion_tokens) AS completion_tokens"
			. " FROM chat.usage WHERE user_id = 'dan' GROUP BY 1 ORDER BY 1") ],
	[ [ 0, 2, 3 ], [ 1, 331, 28 ] ], 'the view has a row for each day');

# a role, a model
$node->safe_psql('postgres', "CREATE ROLE lender; SELECT chat.grant_usage('lender'); GRANT USAGE ON FOREIGN SERVER free TO lender");
foreach my $owner (undef, 'lender')
{
	my $id = create_session($node, user_id => 'gil', server => 'free', $owner ? (owner => $owner) : ())->{id};
	turn($id, 'a [[tokens=1 prompt_tokens=7 completion_tokens=1]]', options => encode({ model => $_ })) foreach qw(small large);
}
is_deeply([ map { [ @$_{qw(owner model prompt_tokens)} ] } rows($node,
			"SELECT replace(owner::text, current_user, 'us') AS owner, model, prompt_tokens FROM chat.usage WHERE user_id = 'gil' ORDER BY 1, 2") ],
	[ map { my $o = $_; map { [ $o, $_, 7 ] } qw(large small) } qw(lender us) ], 'the view tells roles and models apart');

# a turn that was queued before the limit was reached
$node->safe_psql('postgres', 'ALTER DATABASE postgres RESET chat.max_tokens_per_user_per_day');
$node->safe_psql('postgres', 'ALTER SYSTEM SET chat.max_tokens_per_user_per_day = 300');
$node->reload;
my $q = create_session($node, user_id => 'fay', server => 'free')->{id};
my $one = ask($node, $q, 'one [[tokens=2 gateat=1:day prompt_tokens=299 completion_tokens=1]]');
$fake->wait_at_gate('day');
my $two = ask($node, $q, 'two [[tokens=1]]');
$fake->forget;
$fake->open_gate('day');
is(wait_for_task($node, $one)->{status}, 'completed', 'the limit is reached');
$two = wait_for_task($node, $two);
is_deeply([ $two->{status}, $two->{error}{code} ], [ 'failed', 'limit_reached' ], 'what was queued by then is refused');
like($two->{error}{message}, qr/tokens of this day are used up: 300 of 300/, 'and says why');
is(scalar $fake->completions, 0, 'before any request');

# the worker's limit is that of the session's owner, as a connection of that
# role would have it
$node->safe_psql('postgres', <<'EOS');
CREATE ROLE tenant;
CREATE ROLE vip;
SELECT chat.grant_usage(r::regrole) FROM unnest(ARRAY['tenant', 'vip']) AS r;
GRANT USAGE ON FOREIGN SERVER free TO tenant, vip;
ALTER ROLE tenant SET chat.max_tokens_per_user_per_day = 200;
ALTER ROLE vip SET chat.max_tokens_per_user_per_day = 0;
EOS

# Uses tokens, with a turn queued behind that; returns the error of the latter.
sub behind
{
	my ($owner, $tokens) = @_;
	my $id = create_session($node, user_id => "of $owner", server => 'free', owner => $owner)->{id};
	my $first = ask($node, $id, "one [[tokens=1 gateat=1:$owner prompt_tokens=$tokens completion_tokens=1]]");
	$fake->wait_at_gate($owner);
	my $second = ask($node, $id, 'two [[tokens=1 prompt_tokens=1]]');
	$fake->open_gate($owner);
	is(wait_for_task($node, $first)->{status}, 'completed', "tokens of $owner");
	my $error = wait_for_task($node, $second)->{error}{message};
	# the next one begins anew
	$node->safe_psql('postgres', "DELETE FROM chat.chat_session WHERE id = '$id'");
	return $error // 'none';
}

is(behind('vip', 310), 'none', 'ALTER ROLE: a role without a limit has none, whatever the server has');
like(behind('tenant', 210), qr/: 211 of 200$/, 'ALTER ROLE: nor has one with a limit another');
my $over = create_session($node, user_id => 'over', server => 'free', owner => 'tenant')->{id};
turn($over, 'No more [[tokens=1 prompt_tokens=210]]');
$fake->forget;
is($node->safe_psql('postgres', "SELECT chat.generate_session_title('$over')"), 't', "a title is within the caller's limit");
wait_for($node, 'SELECT count(*) = 0 FROM chat.chat_job');
is(scalar $fake->completions, 0, "but not within the owner's: no model is asked");
is(row($node, "SELECT left(title, 7) AS title FROM chat.chat_session WHERE id = '$over'")->{title}, 'No more', 'and first words serve');
$node->safe_psql('postgres', 'ALTER ROLE tenant RESET ALL; ALTER DATABASE postgres SET chat.max_tokens_per_user_per_day = 250');
is(behind('tenant', 240), 'none', 'ALTER DATABASE holds');
like(behind('tenant', 260), qr/: 261 of 250$/, 'at once');
$node->safe_psql('postgres', 'ALTER ROLE tenant IN DATABASE postgres SET chat.max_tokens_per_user_per_day = 270');
is(behind('tenant', 260), 'none', 'but not for a role that has its own there');
$node->safe_psql('postgres', 'ALTER ROLE tenant IN DATABASE postgres RESET ALL; ALTER DATABASE postgres RESET ALL;'
	  . "ALTER DATABASE postgres SET chat.default_server = 'fake'");
is(behind('tenant', 260), 'none', 'what is reset holds no more');
# the worker connects as a role, too, whose settings are nobody else's
my $super = $node->safe_psql('postgres', 'SELECT quote_ident(rolname) FROM pg_roles WHERE oid = 10');
my $pid = wait_for_worker($node);
$node->safe_psql('postgres', "ALTER ROLE $super SET chat.max_tokens_per_user_per_day = 5");
kill 'TERM', $pid;
wait_for($node, "SELECT count(*) = 1 FROM chat.worker_status() WHERE pid > 0 AND pid <> $pid");
$node->safe_psql('postgres', "ALTER ROLE $super RESET ALL");
is(behind('tenant', 100), 'none', "the worker's own role is not the session's owner");

done_testing();
