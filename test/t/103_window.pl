# Does a conversation that outgrows the context window go on?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => "chat.keep_recent_messages = 26\nchat.max_context_messages = 500");

# the answer's part is 200 tokens, so 1800 are left
create_server($node, $fake, context_window => 2000, max_tokens => 200);
$node->safe_psql('postgres', server_sql($fake->port, name => 'summing',
		context_window => 2000, max_tokens => 200, summarize => 'on',
		summary_model => 'small', stream_usage => 'off'));
$node->safe_psql('postgres', server_sql($fake->port, name => 'unknown'));

# Appends messages to a session: [role, content, further members] each.
sub append
{
	my ($id, @messages) = @_;
	my $list = encode([ map { { role => $_->[0], content => $_->[1], %{ $_->[2] // {} } } } @messages ]);
	$node->safe_psql('postgres',
		"SELECT FROM chat.add_chat_messages_batch('$id', " . literal($list) . ')');
	return;
}

# Appends questions and answers of some 60 tokens each.
sub chatter
{
	my ($id, $first, $n) = @_;
	append($id, map { [ $_ % 2 ? 'user' : 'assistant', "Message number $_. " . 'some words ' x 25 ] }
		  $first .. $first + $n - 1);
	return;
}

# Returns the messages of the last request.
sub sent
{
	return @{ $fake->last_request->{body}{messages} };
}

# Returns the requests for summaries.
sub summaries
{
	return grep { $_->{body}{messages}[0]{content} =~ /memory of a long conversation/ } $fake->completions;
}

# Returns the data-status events of a task.
sub statuses
{
	my ($task) = @_;
	return map { $_->{data} } grep { $_->{type} eq 'data-status' } stored_events($node, $task);
}

# ---------- what fits

my $s = create_session($node)->{id};
my $task = ask($node, $s, 'first [[tokens=3 prompt_tokens=1000]]');
my $t = wait_for_task($node, $task);
is($t->{compaction}, undef, 'what fits is not touched');
cmp_ok($t->{context_tokens}, '<', 40, 'a first request is estimated');
is_deeply([ map { $_->{phase} } statuses($task) ], ['request'], 'listeners are told');
$task = ask($node, $s, 'second [[tokens=3 prompt_tokens=1030]]');
$t = wait_for_task($node, $task);
cmp_ok($t->{context_tokens}, '>', 1000, 'what the endpoint has counted is exact,');
cmp_ok($t->{context_tokens}, '<', 1100, 'what came since is estimated');
is_deeply([ (statuses($task))[0]{contextTokens}, (statuses($task))[0]{contextBudget} ],
	[ $t->{context_tokens}, 1800 ], 'the same in the event');

# where no window is known the estimate is told, too, and corrected likewise
$s = create_session($node, server => 'unknown')->{id};
wait_for_task($node, ask($node, $s, 'first [[tokens=3 prompt_tokens=1000]]'));
$task = ask($node, $s, 'second [[tokens=3]]');
$t = wait_for_task($node, $task);
cmp_ok($t->{context_tokens}, '>', 1000, 'without a known window what was counted is exact, too');
cmp_ok($t->{context_tokens}, '<', 1100, 'and what came since is estimated');
is_deeply([ statuses($task) ], [ { phase => 'request', contextTokens => $t->{context_tokens} } ],
	'and listeners are told how large the request is');

# what is left free for the answer
$node->safe_psql('postgres', server_sql($fake->port, name => "window$_", context_window => $_)) foreach 2000, 100000;
foreach my $case ([ 2000, {}, 1500 ], [ 100000, {}, 95904 ], [ 2000, { max_tokens => 300 }, 1700 ], [ 2000, { max_tokens => 5000 }, 1 ])
{
	my ($window, $options, $budget) = @$case;

	$s = create_session($node, server => "window$window")->{id};
	$task = ask($node, $s, 'q [[tokens=1]]', options => encode($options));
	wait_for_task($node, $task);
	is((statuses($task))[0]{contextBudget}, $budget, "of $window tokens, with " . encode($options));
}

# what max_context_messages leaves out is said to be
$s = create_session($node, server => 'unknown')->{id};
chatter($s, 1, 9);
foreach my $case ([ 10, undef ], [ 9, 'truncated' ])
{
	my ($most, $compaction) = @$case;
	my $id = row($node, "SELECT id FROM chat.fork_chat_session('$s')")->{id};

	$task = ask($node, $id, 'q [[tokens=1]]', options => encode({ max_context_messages => $most }));
	$t = wait_for_task($node, $task);
	is(scalar(sent()), $most, "ten messages, of which $most are sent");
	is($t->{compaction}, $compaction, 'the task says whether any was left out');
	is((statuses($task))[0]{compaction}, $compaction, 'so does the event');
}

# a task whose tools are at work tells of the request that asked for them
$node->safe_psql('postgres', "SELECT chat.register_tool(name => 'pick', kind => 'client', shared => true)");
$s = create_session($node, server => 'unknown')->{id};
chatter($s, 1, 9);
$task = ask($node, $s, 'q [[tool=pick args={} id=c1]]', options => encode({ max_context_messages => 9 }));
wait_for($node, "SELECT status = 'waiting' FROM chat.chat_task WHERE id = '$task'");
$node->safe_psql('postgres', "SELECT chat.cancel_task('$task')");
$t = wait_for_task($node, $task);
cmp_ok($t->{context_tokens}, '>', 400, 'a task that was cancelled among its calls says how large its request was');
is($t->{compaction}, 'truncated', 'and how it was made to fit');
$node->safe_psql('postgres', "SELECT chat.drop_tool('pick', shared => true)");

# a picture has a size of its own
$s = create_session($node)->{id};
append($s, [ 'user', undef, { parts => [ { type => 'image_url', image_url => { url => 'data:image/png;base64,' . 'iVBORw0K' x 5000 } } ] } ],
	[ 'assistant', 'A cat.' ]);
$t = wait_for_task($node, ask($node, $s, 'colour? [[tokens=1]]'));
cmp_ok($t->{context_tokens}, '<', 1500, "a picture's bytes are not text");
is($t->{compaction}, undef, 'and do not fill the window');

# ---------- outputs of tools

$s = create_session($node)->{id};
my @calls = map { {
		role => 'assistant', content => undef,
		tool_calls => [ { id => "c$_", type => 'function', function => { name => 'look', arguments => '{}' } } ] } } 1 .. 3;
append($s, [ 'user', 'q1' ],
	(map { [ 'assistant', undef, { tool_calls => $calls[ $_ - 1 ]{tool_calls} } ], [ 'tool', 'x y ' x 700, { tool_call_id => "c$_" } ] } 1 .. 3),
	[ 'assistant', 'done' ]);
$t = wait_for_task($node, ask($node, $s, 'next [[tokens=1]]'));
is($t->{compaction}, 'collapsed', 'old outputs become markers');
my @tools = grep { $_->{role} eq 'tool' } sent();
is(@tools, 3, 'all results are there');
like($tools[0]{content}, qr/^\[The output of this call, 2800 bytes, was left out/, 'the oldest is collapsed');
is($tools[2]{content}, 'x y ' x 700, 'the newest is not, it fits then');
is($node->safe_psql('postgres', "SELECT count(*) FROM chat.chat_message WHERE session_id = '$s' AND role = 'tool' AND length(content) = 2800"),
	3, 'nothing that is stored has changed');

# one that was stored in parts is, too
$s = create_session($node)->{id};
append($s, [ 'user', 'q1' ],
	(map { [ 'assistant', undef, { tool_calls => $calls[ $_ - 1 ]{tool_calls} } ],
		[ 'tool', [ { type => 'text', text => 'x y ' x 700 } ], { tool_call_id => "c$_" } ] } 1 .. 3),
	[ 'assistant', 'done' ]);
$t = wait_for_task($node, ask($node, $s, 'next [[tokens=1]]'));
is($t->{compaction}, 'collapsed', 'outputs in parts become markers');
@tools = grep { $_->{role} eq 'tool' } sent();
like($tools[0]{content}, qr/^\[The output of this call, 28\d\d bytes, was left out/, 'of the same kind');
is(ref $tools[2]{content}, 'ARRAY', 'the newest is as it was');

# ---------- truncation

$s = create_session($node)->{id};
$node->safe_psql('postgres', "SELECT chat.set_prompt('sys', 'SYSTEM {{user_id}}')");
$node->safe_psql('postgres', qq(SELECT chat.update_chat_session('$s', settings => '{"prompt": "sys"}')));
chatter($s, 1, 48);
$t = wait_for_task($node, ask($node, $s, 'the question [[tokens=1]]'));
is($t->{compaction}, 'truncated', 'without summaries the oldest messages are left out');
cmp_ok($t->{context_tokens}, '<=', 1800, 'until it fits');
cmp_ok($t->{context_tokens}, '>', 1600, 'and no more than that');
my @m = sent();
is($m[0]{content}, 'SYSTEM ', 'T56: the system prompt stays');
like($m[-1]{content}, qr/the question/, 'T56: so does the question');
like($m[-2]{content}, qr/^Message number 48/, 'and what came just before');
unlike($m[1]{content}, qr/^Message number 1\./, 'the first messages are gone');

# a long task loses its oldest steps, not its question
$s = create_session($node)->{id};
append($s, [ 'user', 'THE QUESTION' ],
	map { my $c = "k$_"; ([ 'assistant', 'thought ' x 100, { tool_calls => [ { id => $c, type => 'function', function => { name => 'look', arguments => '{}' } } ] } ],
		  [ 'tool', 'short', { tool_call_id => $c } ]) } 1 .. 30);
$t = wait_for_task($node, $node->safe_psql('postgres', "SELECT chat.stream_chat_completion('$s')"));
is($t->{status}, 'completed', 'a long task goes on');
@m = sent();
is($m[0]{content}, 'THE QUESTION', 'T56: its question is still there');
is($m[1]{role}, 'assistant', 'whole steps follow');
is($m[-1]{tool_call_id}, 'k30', 'the last result, too');

# ---------- a system prompt that is too large

$node->safe_psql('postgres', "SELECT chat.set_prompt('huge', repeat('many words ', 2000))");
$s = create_session($node, settings => '{"prompt": "huge"}')->{id};
$fake->forget;
$t = wait_for_task($node, ask($node, $s, 'hi [[tokens=1]]'));
is($t->{status}, 'failed', 'a system prompt that does not fit');
is($t->{error}{code}, 'context_length_exceeded', 'is an error');
like($t->{error}{message}, qr/system prompt and the tools alone do not fit/, 'that says so');
is(scalar $fake->completions, 0, 'before any request');

# ---------- summaries

$s = create_session($node, server => 'summing')->{id};
append($s, [ 'user', 'start [[text=RECAP]]' ], [ 'assistant', 'fine' ]);
chatter($s, 3, 46);
$fake->forget;
$task = ask($node, $s, 'go on [[tokens=1]]');
$t = wait_for_task($node, $task);
is($t->{status}, 'completed', 'a turn that needs a summary');
is($t->{compaction}, 'summarized', 'says so');
is_deeply([ map { $_->{phase} } statuses($task) ], [ 'summarizing', 'request' ], 'while it waits, too');
my @sums = summaries();
is(@sums, 1, 'one summary was asked for');
is($sums[0]{body}{model}, 'small', 'of the summary model');
like($sums[0]{body}{messages}[1]{content}, qr/user: start .*Message number 3\./s, 'with the oldest messages');
unlike($sums[0]{body}{messages}[1]{content}, qr/Message number 30\./, 'without the newest');
@m = sent();
is($m[0]{role}, 'user', 'the summary is no system message');
like($m[0]{content}, qr{^<conversation_summary>.*not an instruction.*RECAP\n</conversation_summary>$}s, 'it is marked as data');
like($m[1]{content}, qr/^Message number 2[2-6]\./, 'the newest messages follow');
is(scalar(grep { $_->{role} eq 'user' && $_->{content} =~ /go on/ } @m), 1, 'and the question');
my $row = row($node, "SELECT summary, summary_sequence, (SELECT count(*) FROM chat.chat_message WHERE session_id = s.id) AS n FROM chat.chat_session AS s WHERE id = '$s'");
is($row->{summary}, 'RECAP', 'T56: the summary is stored');
is($row->{n}, 50, 'beside all messages');
my $reach = $row->{summary_sequence};

# it serves later turns
wait_for_task($node, ask($node, $s, 'and on [[tokens=1]]'));
is(summaries(), 1, 'the next turn uses it');
like((sent())[0]{content}, qr/RECAP/, 'as it is');

# what it holds does not come back, and it is none of the messages that count
wait_for_task($node, ask($node, $s, 'few [[tokens=1]]', options => '{"max_context_messages": 5}'));
@m = sent();
like($m[0]{content}, qr/RECAP/, 'it stands before the newest messages');
is(scalar @m, 6, 'of which there are as many as are wanted');
like($m[-1]{content}, qr/^few /, 'with the question');
wait_for_task($node, ask($node, $s, 'many [[tokens=1]]', options => '{"max_context_messages": 500}'));
is(scalar(grep { $_->{content} =~ /^(?:start|Message number (?:3|4|5)\.)/ } sent()), 0, 'no more than what came since');

# a copy goes on with it, if it holds all that the summary is made of
my $copy = row($node, "SELECT id, summary_sequence AS n FROM chat.fork_chat_session('$s')");
is($copy->{n}, $reach, 'a fork has the summary');
wait_for_task($node, ask($node, $copy->{id}, 'in the fork [[tokens=1]]'));
like((sent())[0]{content}, qr/RECAP/, 'and its turns use it');
$copy = row($node, "SELECT id, summary FROM chat.fork_chat_session('$s', " . ($reach - 1) . ')');
is($copy->{summary}, undef, 'a fork of less than the summary reaches has none');
$copy = row($node, "SELECT id FROM chat.fork_chat_session('$s', 6)");
wait_for_task($node, ask($node, $copy->{id}, 'in the past [[tokens=1]]'));
is(scalar(grep { $_->{content} =~ /RECAP<|conversation_summary/ } sent()), 0, 'nor do its turns know of it');
$copy = row($node, "SELECT id FROM chat.import_chat_session(chat.export_chat_session('$s'), gen_random_uuid())");
wait_for_task($node, ask($node, $copy->{id}, 'imported [[tokens=1]]'));
like((sent())[0]{content}, qr/RECAP/, 'export and import carry it');
is(summaries(), 1, 'none of them has asked for another');

# the next one is made of it
append($s, [ 'user', 'more [[text=RECAP%202]]' ], [ 'assistant', 'fine' ]);
chatter($s, 101, 20);
wait_for_task($node, ask($node, $s, 'on and on [[tokens=1]]'));
@sums = summaries();
cmp_ok(scalar @sums, '>', 1, 'when it does not suffice, another is made');
like($sums[1]{body}{messages}[1]{content}, qr/^Summary of what came before:\nRECAP\n\n/, 'of the first');
unlike($sums[1]{body}{messages}[1]{content}, qr/Message number 3\./, 'and not of what that holds');
cmp_ok(row($node, "SELECT summary_sequence AS n FROM chat.chat_session WHERE id = '$s'")->{n}, '>', $reach, 'it reaches further');
is(row($node, "SELECT count(*) AS n FROM chat.chat_usage WHERE session_id = '$s' AND kind = 'summary'")->{n},
	scalar @sums, 'what they have used is counted');

# what does not fit into one request is summed up piece by piece
my $p = create_session($node, server => 'summing')->{id};
append($p, [ 'user', 'start [[text=PART%201]]' ], [ 'assistant', 'fine' ]);
chatter($p, 3, 30);
append($p, [ 'user', 'later [[text=PART%202]]' ], [ 'assistant', 'fine' ]);
chatter($p, 35, 40);
$fake->forget;
wait_for_task($node, ask($node, $p, 'go on [[tokens=1]]'));
@sums = summaries();
cmp_ok(scalar @sums, '>', 1, 'a long history is summed up piece by piece');
like($sums[1]{body}{messages}[1]{content}, qr/^Summary of what came before:\nPART 1\n/, 'each with the one before');
like((sent())[0]{content}, qr/PART 2/, 'and the turn has the last');
is(scalar(grep { my $n = $_; scalar(grep { $_->{body}{messages}[1]{content} =~ /Message number $n\./ } @sums) != 1 } 3 .. 32),
	0, 'each message is in one of them');

# going back behind it forgets it
$node->safe_psql('postgres', "SELECT chat.edit_message('$s', 3, 'other [[tokens=1]]')");
wait_for($node, "SELECT count(*) = 0 FROM chat.chat_job");
is_deeply(row($node, "SELECT summary, summary_sequence FROM chat.chat_session WHERE id = '$s'"),
	{ summary => undef, summary_sequence => 0 }, 'an edit of what it holds forgets it');
is(scalar(grep { $_->{content} =~ /RECAP<|conversation_summary/ } sent()), 0, 'the model sees the branch alone');

# a summary that fails: truncation, and no other for a while
$s = create_session($node, server => 'summing')->{id};
append($s, [ 'user', 'start [[status=500 errmsg=broken]]' ], [ 'assistant', 'fine' ]);
chatter($s, 3, 46);
$fake->forget;
$t = wait_for_task($node, ask($node, $s, 'go on [[tokens=1]]'));
is($t->{status}, 'completed', 'a turn whose summary fails');
is($t->{compaction}, 'truncated', 'goes on without');
$t = wait_for_task($node, ask($node, $s, 'go on [[tokens=1]]'));
is($t->{compaction}, 'truncated', 'so does the next');
is(summaries(), 1, 'which does not ask again at once');

# one that does not come: the turn does not wait for ever
$node->safe_psql('postgres', server_sql($fake->port, name => 'hasty', context_window => 2000,
		max_tokens => 200, summarize => 'on', stream_timeout => '3s'));
$s = create_session($node, server => 'hasty')->{id};
append($s, [ 'user', 'start [[gatehead=never]]' ], [ 'assistant', 'fine' ]);
chatter($s, 3, 46);
$t = wait_for_task($node, ask($node, $s, 'go on [[tokens=1]]'));
is_deeply([ @$t{qw(status compaction)} ], [ 'completed', 'truncated' ], 'a turn whose summary takes too long goes on without');
is_deeply([ rows($node, "SELECT prompt_tokens > 500 AS asked, completion_tokens, estimated FROM chat.chat_usage WHERE session_id = '$s'") ],
	[ { asked => JSON::PP::true, completion_tokens => 0, estimated => JSON::PP::true } ], 'what it has cost is guessed at');

# calls and their results stay together
$s = create_session($node, server => 'summing')->{id};
append($s,
	[ 'user', undef, { parts => [ { type => 'text', text => 'start [[text=RECAP]]' }, { type => 'image_url', image_url => { url => 'data:image/png;base64,iVBORw0K' } } ] } ],
	map {
		my $n = $_;
		([ 'assistant', "Step $n. ", { tool_calls => [ map { { id => "s$n-$_", type => 'function', function => { name => 'look', arguments => '{}' } } } 1 .. 3 ] } ],
			map { [ 'tool', "result s$n-$_. " . 'some words ' x 12, { tool_call_id => "s$n-$_" } ] } 1 .. 3)
	} 1 .. 12);
$fake->forget;
$t = wait_for_task($node, ask($node, $s, 'go on [[tokens=1]]'));
is_deeply([ @$t{qw(status compaction)} ], [ 'completed', 'summarized' ], 'steps with calls are summed up');
@m = sent();
is($m[1]{role}, 'assistant', 'behind the summary a step begins');
is_deeply([ map { $_->{tool_call_id} } grep { $_->{role} eq 'tool' } @m ],
	[ map { map { $_->{id} } @{ $_->{tool_calls} } } grep { $_->{tool_calls} } @m ], 'each call has its result');
my ($first) = $m[1]{content} =~ /^Step (\d+)/;
my $summed = join '', map { $_->{body}{messages}[1]{content} } summaries();
like($summed, qr/^user: start \[\[text=RECAP\]\] \[image_url\]$/m, 'pictures are named in it');
ok($summed =~ /result s@{[ $first - 1 ]}-3\./ && $summed !~ /result s$first-1\./, 'the summary ends where the step begins');

# the first steps of a long task are summed up, its question is sent all the same
$s = create_session($node, server => 'summing')->{id};
append($s, [ 'user', 'THE QUESTION [[text=RECAP]]' ],
	map { my $c = "k$_"; ([ 'assistant', "Step $_. " . ($_ == 20 ? '[[text=RECAP]] ' : '') . 'thought ' x 50, { tool_calls => [ { id => $c, type => 'function', function => { name => 'look', arguments => '{}' } } ] } ],
		  [ 'tool', "result $_", { tool_call_id => $c } ]) } 1 .. 24);
foreach my $round (1, 2)
{
	$fake->forget;
	$t = wait_for_task($node, $node->safe_psql('postgres', "SELECT chat.stream_chat_completion('$s')"));
	is_deeply([ @$t{qw(status compaction)} ], [ 'completed', 'summarized' ], "a long task, $round");
	@m = sent();
	like($m[0]{content}, qr/^<conversation_summary>.*RECAP/s, 'has a summary of its first steps');
	like($m[1]{content}, qr/^THE QUESTION/, 'its question');
	is($m[2]{role}, 'assistant', 'and its last steps');
	like($m[-1]{content}, qr/^(?:result 24|result b12)$/, 'to the end');
	my $told = join '', map { $_->{body}{messages}[1]{content} } summaries();
	like($told, $round == 1 ? qr/^user: THE QUESTION.*Step 1\./s : qr/^Summary of what came before:\nRECAP\n\n.*Step 2\d\./s, 'which is made of what came before');
	unlike($told, $round == 1 ? qr/Step 24\./ : qr/THE QUESTION|Step b12\./, 'and of nothing else');
	append($s, map { my $c = "b$_"; ([ 'assistant', "Step b$_. " . 'thought ' x 35, { tool_calls => [ { id => $c, type => 'function', function => { name => 'look', arguments => '{}' } } ] } ],
		  [ 'tool', "result b$_", { tool_call_id => $c } ]) } 1 .. 12) if $round == 1;
}

# so does what the user's page said; what is cut says so
$s = create_session($node, server => 'summing')->{id};
wait_for_task($node, ask($node, $s, 'start [[text=RECAP]]', context => encode({ url => 'https://example.org/a', content => 'THE PAGE' })));
append($s,
	[ 'assistant', undef, { function_call => { name => 'look_back', arguments => '{}' } } ],
	[ 'function', 'y ' x 900, { name => 'look_back' } ]);
chatter($s, 5, 46);
$fake->forget;
$t = wait_for_task($node, ask($node, $s, 'go on [[tokens=1]]'));
is($t->{status}, 'completed', 'a message with a context is summed up');
$summed = join '', map { $_->{body}{messages}[1]{content} } summaries();
like($summed, qr/^Context: .*THE PAGE/m, 'with it');
like($summed, qr/^Calls: .*look_back/m, 'a call of the old kind is named');
like($summed, qr/^function: (?:y ){750} ?\[cut\]$/m, 'a long output is cut');

# behind what was set aside there is nothing more to sum up
$s = create_session($node, server => 'summing')->{id};
append($s, [ 'user', 'start [[text=RECAP]]' ], [ 'assistant', 'fine' ]);
chatter($s, 3, 78);
$node->safe_psql('postgres', "UPDATE chat.chat_message SET active = false, superseded_by = sequence + 1 WHERE session_id = '$s' AND role = 'assistant'");
$fake->forget;
$t = wait_for_task($node, ask($node, $s, 'go on [[tokens=1]]'));
is_deeply([ @$t{qw(status compaction)} ], [ 'completed', 'summarized' ], 'a summary that ends before a superseded message');
is(summaries(), 1, 'is whole');
is(row($node, "SELECT summary_failed_at FROM chat.chat_session WHERE id = '$s'")->{summary_failed_at}, undef, 'and has not failed');

# a question that is edited while its answer is summed up
$s = create_session($node, server => 'summing')->{id};
append($s, [ 'user', 'start [[text=RECAP gatehead=edit]]' ], [ 'assistant', 'fine' ]);
chatter($s, 3, 46);
$task = ask($node, $s, 'go on [[tokens=1]]');
$fake->wait_at_gate('edit');
is($node->safe_psql('postgres', "SELECT extract(epoch FROM run_at - now()) BETWEEN 0 AND 30 FROM chat.chat_job WHERE kind = 'completion'"),
	't', 'a turn waits 30 seconds at most');
$node->safe_psql('postgres', "SELECT chat.cancel_task('$task')");
wait_for_task($node, $task);
wait_for_task($node, $node->safe_psql('postgres', "SELECT chat.edit_message('$s', 5, 'other [[tokens=1]]')"));
$fake->open_gate('edit');
wait_for($node, "SELECT count(*) = 0 FROM chat.chat_job");
is_deeply(row($node, "SELECT summary, summary_sequence FROM chat.chat_session WHERE id = '$s'"),
	{ summary => undef, summary_sequence => 0 }, 'a summary of what was edited meanwhile is not stored');

# rolled back while it waits: what was summed up before serves the next turn
$s = create_session($node, server => 'summing')->{id};
append($s, [ 'user', 'start [[text=RECAP gatehead=roll]]' ], [ 'assistant', 'fine' ]);
chatter($s, 3, 46);
my $waiting = ask($node, $s, 'go on [[tokens=1]]');
$fake->wait_at_gate('roll');
$task = ask($node, $s, 'instead [[tokens=1]]', on_busy => 'rollback');
wait_for_task($node, $waiting);
$fake->open_gate('roll');
$t = wait_for_task($node, $task);
is_deeply([ @$t{qw(status compaction)} ], [ 'completed', 'summarized' ], 'a turn that takes the place of one that waited');
is(scalar(grep { $_->{content} =~ /go on/ } sent()), 0, 'does not see its question');
# and what the summary has of a turn that is rolled back is forgotten
$task = ask($node, $s, 'secret [[gatehead=secret]]');
$fake->wait_at_gate('secret');
$node->safe_psql('postgres', "UPDATE chat.chat_session SET summary = 'a SECRET', summary_sequence = next_sequence - 1 WHERE id = '$s'");
# another one will be made
$fake->open_gate('roll', 9);
wait_for_task($node, ask($node, $s, 'forget it [[tokens=1]]', on_busy => 'rollback'));
is(scalar(grep { $_->{content} =~ /secret/i } sent()), 0, 'a summary of what was rolled back is forgotten');

# cancelled while it waits; a locked session; another worker
foreach my $case ('cancel', 'worker')
{
	$s = create_session($node, server => 'summing')->{id};
	append($s, [ 'user', "start [[text=RECAP gatehead=$case]]" ], [ 'assistant', 'fine' ]);
	chatter($s, 3, 46);
	$task = ask($node, $s, 'go on [[tokens=1]]');
	$fake->wait_at_gate($case);
	if ($case eq 'cancel')
	{
		is($node->safe_psql('postgres', "SELECT chat.cancel_task('$task')"), 't', 'cancelled while it waits');
		is(wait_for_task($node, $task)->{status}, 'cancelled', 'it ends at once');
		$fake->open_gate($case);
	}
	else
	{
		my $pid = wait_for_worker($node);
		kill 'TERM', $pid;
		wait_for($node, "SELECT count(*) = 1 FROM chat.worker_status() WHERE pid > 0 AND pid <> $pid");
		$fake->open_gate($case, 2);
		$t = wait_for_task($node, $task);
		is_deeply([ @$t{qw(status compaction)} ], [ 'completed', 'summarized' ], 'another worker takes it up');
	}
	wait_for($node, "SELECT count(*) = 0 FROM chat.chat_job");
}

# ---------- the endpoint says that it is too long

$s = create_session($node, server => 'unknown')->{id};
chatter($s, 1, 40);
$fake->forget;
$t = wait_for_task($node, ask($node, $s, 'q [[status=400 errcode=context_length_exceeded times=1 key=once]]'));
my @requests = $fake->completions;
is($t->{status}, 'completed', 'an endpoint that finds the request too long');
is(@requests, 2, 'gets another one');
cmp_ok(length encode($requests[1]{body}), '<', 0.7 * length encode($requests[0]{body}), 'that is shorter');
like($requests[1]{body}{messages}[-1]{content}, qr/^q /, 'with the question');
is($t->{compaction}, 'truncated', 'as the task tells');

$fake->forget;
$t = wait_for_task($node, ask($node, $s, 'q [[status=400 errcode=context_length_exceeded errmsg=much%20too%20long]]'));
is($t->{status}, 'failed', 'one that is never satisfied');
is($t->{error}{code}, 'context_length_exceeded', 'fails the task');
is(scalar $fake->completions, 2, 'after one more try');

like($t->{error}{message}, qr/^much too long$/, 'in the words of the endpoint');
is($t->{error}{status}, 400, 'with its status');

# however much of the request is its prompt
$node->safe_psql('postgres', "SELECT chat.set_prompt('most', repeat('word ', 600))");
foreach my $server ('unknown', 'fake')
{
	$s = create_session($node, server => $server, settings => '{"prompt": "most"}')->{id};
	$fake->forget;
	$t = wait_for_task($node, ask($node, $s, "q [[status=400 errcode=context_length_exceeded times=1 key=most$server]]"));
	is($t->{status}, 'completed', 'a request that is all prompt');
	is(scalar $fake->completions, 2, 'is tried again, too');
	$t = wait_for_task($node, ask($node, $s, 'q [[status=400 errcode=context_length_exceeded]]'));
	is_deeply([ @{ $t->{error} }{qw(code status)} ], [ 'context_length_exceeded', 400 ], 'and fails by the error of the endpoint');
}

# where summaries are wanted, it gets one
$node->safe_psql('postgres', server_sql($fake->port, name => 'large', context_window => 100000, summarize => 'on'));
$s = create_session($node, server => 'large')->{id};
append($s, [ 'user', 'start [[text=RECAP]]' ], [ 'assistant', 'fine' ]);
chatter($s, 3, 58);
$t = wait_for_task($node, ask($node, $s, 'q [[status=400 errcode=context_length_exceeded times=1 key=large]]'));
is_deeply([ @$t{qw(status compaction)} ], [ 'completed', 'summarized' ], 'a request that was refused is summed up');
like((sent())[0]{content}, qr/RECAP/, 'and sent again');

# ---------- all that a request holds counts

# Returns what the first request of a session is estimated at.
sub estimate
{
	my (%settings) = @_;
	my $id = create_session($node, settings => encode(\%settings))->{id};

	return wait_for_task($node, ask($node, $id, 'hi [[tokens=1]]'))->{context_tokens};
}

$node->safe_psql('postgres', <<'EOS');
SELECT chat.set_prompt('long', repeat('word ', 300));
SELECT chat.register_tool(kind => 'client', name => 'wordy', description => repeat('word ', 500));
EOS
my $plain = estimate(tools => []);
cmp_ok(abs(estimate(tools => [], prompt => 'long') - $plain - 300), '<', 30, 'the system prompt counts');
cmp_ok(abs(estimate() - $plain - 530), '<', 60, 'so do the schemas of tools');

done_testing();
