# Does a session get a title, the right one, at no cost to its turns?

use strict;
use warnings;
use utf8;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;




my $fake = start_fake();
my $node = chat_cluster('main', conf => 'chat.generate_titles = on');

create_server($node, $fake, thinking => 'on', model => 'anthropic/big',
	title_model => 'anthropic/small', temperature => '0.5');

# Returns the title of a session.
sub title
{
	my ($id) = @_;
	return row($node, "SELECT title FROM chat.chat_session WHERE id = '$id'")->{title};
}

# Waits until no title is being made.
sub settled
{
	wait_for($node, "SELECT count(*) = 0 FROM chat.chat_job WHERE kind = 'title'");
	return;
}

# Returns the requests for titles so far.
sub title_requests
{
	return grep { ($_->{body}{max_tokens} // 0) == 20 } $fake->completions;
}

# Makes a turn in a new session and waits for its title.
sub titled
{
	my ($message, %session) = @_;
	my $id = create_session($node, %session)->{id};
	my $task = wait_for_task($node, ask($node, $id, $message));

	is($task->{status}, 'completed', "turn: $message");
	settled();
	return $id;
}

# the request and the notification
my $s = create_session($node);
my $listener = listener($node, $s->{channel});
my $long = 'x' x 600;
wait_for_task($node, ask($node, $s->{id}, "How do lakes freeze? [[tokens=3]] $long"));
settled();
is(title($s->{id}), 'Fake Title Here', 'an untitled session gets a title');
my @requests = title_requests();
is(@requests, 1, 'by one request');
my $body = $requests[0]{body};
is($body->{model}, 'anthropic/small', 'to the title model');
ok(!exists $body->{reasoning}, 'without reasoning');
ok(!exists $body->{temperature} && !$body->{stream} && !exists $body->{tools},
	'without what belongs to turns');
is(length $body->{messages}[-1]{content}, 500, 'with the first 500 characters');
is($body->{messages}[0]{role}, 'system', 'behind an instruction');
like($body->{messages}[0]{content}, qr/three to six words.*without quotation marks and without punctuation/,
	'that says how many words, and what not');
my @told = $listener->until(sub { $_[0]{type} eq 'data-title' });
is_deeply($told[-1]{event},
	{
		type => 'data-title',
		data => { title => 'Fake Title Here', sessionId => $s->{id} },
		transient => JSON::PP::true
	},
	'listeners are told');
is(row($node, "SELECT count(*) AS n FROM chat.chat_event WHERE payload->>'type' = 'data-title'")->{n},
	0, 'without a row');
is(row($node, "SELECT count(*) AS n FROM chat.chat_message WHERE session_id = '$s->{id}'")->{n},
	2, 'and without a message');

# only the first message asks
wait_for_task($node, ask($node, $s->{id}, 'and ponds? [[tokens=1]]'));
settled();
is(title_requests(), 1, 'a titled session asks no more');
titled('hello [[tokens=1]]', title => 'Mine');
is(title_requests(), 1, 'nor does one that came with a title');

# a question that came before the call, or instead of another
my $before = create_session($node)->{id};
$node->safe_psql('postgres', "SELECT chat.add_chat_message('$before', 'user', 'by hand [[tokens=1]] [[for=title text=By%20hand]]')");
wait_for_task($node, $node->safe_psql('postgres', "SELECT chat.stream_chat_completion('$before')"));
settled();
is(title($before), 'By hand', 'a question that was there already');
$node->safe_psql('postgres', "UPDATE chat.chat_session SET title = NULL WHERE id = '$before'");
wait_for_task($node, $node->safe_psql('postgres', "SELECT chat.edit_message('$before', 1, 'changed [[tokens=1]] [[for=title text=Changed]]')"));
settled();
is(title($before), 'Changed', 'one that is edited');
my $asked = title_requests();
wait_for_task($node, $node->safe_psql('postgres', "SELECT chat.regenerate('$before')"));
my $greeting = create_session($node)->{id};
$node->safe_psql('postgres', "SELECT chat.add_chat_message('$greeting', 'assistant', 'hello')");
wait_for_task($node, $node->safe_psql('postgres', "SELECT chat.stream_chat_completion('$greeting')"));
settled();
is(title_requests(), $asked, 'no title without need, or without a question');

# cleaning
my @cases = (
	[ '  "Quoted  Title"%0A', 'Quoted Title' ],
	[ '“Typographic”', 'Typographic' ],
	[ '"«Nested»"', 'Nested' ],
	[ '**Bold**', 'Bold' ],
	[ 'Say "cheese"', 'Say "cheese"' ],
	[ 'a' x 50, 'a' x 50 ],
	[ 'ä' x 51, 'ä' x 47 . '...' ],
	[ 'Ein Titel über%09Äpfel', 'Ein Titel über Äpfel' ]);
foreach my $case (@cases)
{
	my ($text, $want) = @$case;
	$text =~ s/ /%20/g;
	is(title(titled("q [[for=title text=$text]]")), $want, "cleaned: $text");
}

# failures: the first words serve, the answer does not notice
is(title(titled('Why is the sky blue? [[for=title status=500]]')),
	'Why is the sky blue? [[for=title status=500]]', 'a title model that fails');
is(title(titled('Empty answer [[for=title text=%20]]')),
	'Empty answer [[for=title text=%20]]', 'that says nothing');
is(title(titled('Garbage [[for=title html=1]] ' . 'word ' x 20)),
	'Garbage [[for=title html=1]] word word word wor...', 'that says no JSON');

# nobody's title is overwritten
my $t = create_session($node)->{id};
wait_for_task($node, ask($node, $t, 'race [[for=title gatehead=race text=Gated%20Title]]'));
$fake->wait_at_gate('race');
is($node->safe_psql('postgres', "SELECT priority > 0 FROM chat.chat_job WHERE kind = 'title'"), 't',
	'a title comes after all that somebody waits for');
$node->safe_psql('postgres', "SELECT chat.update_session_title('$t', 'By hand')");
$fake->open_gate('race');
settled();
is(title($t), 'By hand', 'a title that was set meanwhile stays');

# on demand
is($node->safe_psql('postgres', "SELECT chat.generate_session_title('$t')"), 't',
	'another title is asked for');
$fake->open_gate('race');
settled();
is(title($t), 'Gated Title', 'and replaces the one of then');
# when the model fails, there is one already: first words are no better
foreach my $case ([ 'set by hand', 'By hand', 'By hand' ], [ 'cleared', '', 'no words [[for=title status=500]]' ])
{
	my ($what, $title, $want) = @$case;
	my $id = titled('no words [[for=title status=500]]');
	$node->safe_psql('postgres', "SELECT chat.update_session_title('$id', '$title'), chat.generate_session_title('$id')");
	settled();
	is(title($id), $want, "a model that fails, asked for another title than one that was $what");
}
is($node->safe_psql('postgres', 'SELECT chat.generate_session_title(gen_random_uuid())'),
	'f', 'an unknown session');
my $empty = create_session($node)->{id};
is($node->safe_psql('postgres', "SELECT chat.generate_session_title('$empty')"), 'f',
	'one without a question');

# a session that somebody holds locked gets its title later
my $l = create_session($node)->{id};
wait_for_task($node, ask($node, $l, 'lock [[for=title gatehead=lock text=Gated%20Title]]'));
$fake->wait_at_gate('lock');
my $holder = $node->background_psql('postgres');
$holder->query_safe("BEGIN; SELECT id FROM chat.chat_session WHERE id = '$l' FOR UPDATE");
$fake->open_gate('lock');
my $b = create_session($node)->{id};
wait_for_task($node, ask($node, $b, 'bystander [[tokens=1]]'));
wait_for($node, "SELECT title IS NOT NULL FROM chat.chat_session WHERE id = '$b'");
is(title($l), undef, 'others do not wait for it');
$holder->query_safe('COMMIT');
$holder->quit;
settled();
is(title($l), 'Gated Title', 'when it is free it has its own');

# a worker that is killed
my $k = create_session($node)->{id};
wait_for_task($node, ask($node, $k, 'kill [[for=title gatehead=kill text=Gated%20Title]]'));
$fake->wait_at_gate('kill');
my $pid = wait_for_worker($node);
kill 'TERM', $pid;
wait_for($node, "SELECT count(*) = 1 FROM chat.worker_status() WHERE pid > 0 AND pid <> $pid");
$fake->open_gate('kill', 2);
settled();
is(title($k), 'Gated Title', 'the next worker makes the title');

# a session that is deleted while its title is made
my $d = create_session($node)->{id};
wait_for_task($node, ask($node, $d, 'delete [[for=title gatehead=delete text=Gated%20Title]]'));
$fake->wait_at_gate('delete');
$node->safe_psql('postgres', "SELECT chat.delete_chat_session('$d')");
settled();
is(titled('after [[tokens=1]]') ? 1 : 0, 1, 'deleting it does no harm');

# usage: apart, and in the session's sum
my $u = titled('usage [[tokens=2 prompt_tokens=7]] [[for=title text=T prompt_tokens=11 completion_tokens=5]]');
is_deeply(row($node, "SELECT kind, server, model, prompt_tokens, completion_tokens, estimated FROM chat.chat_usage WHERE session_id = '$u'"),
	{
		kind => 'title', server => 'fake', model => 'anthropic/small',
		prompt_tokens => 11, completion_tokens => 5, estimated => JSON::PP::false
	},
	'what the title has cost');
is(row($node, "SELECT total_prompt_tokens AS n FROM chat.chat_session WHERE id = '$u'")->{n},
	18, 'counts for the session');

# Returns what is counted for the titles of a session.
sub counted
{
	my ($id) = @_;
	return rows($node, "SELECT prompt_tokens > 50 AS asked, completion_tokens AS answered, estimated FROM chat.chat_usage WHERE session_id = '$id'");
}

is_deeply([ counted(titled('q [[for=title usage=none text=%E4%BD%A0%E5%A5%BD%E4%B8%96%E7%95%8C]]')) ],
	[ { asked => JSON::PP::true, answered => 5, estimated => JSON::PP::true } ],
	'where the endpoint does not count, it is estimated');
is(counted(titled('q [[for=title status=500]]')), 0, 'a refusal has cost nothing');

# which model: the session's own wish, else the server's title_model, else the
# model of the turns
$node->safe_psql('postgres', server_sql($fake->port, name => 'plain', model => 'plain-1'));
foreach my $case ([ 'anthropic/mine', settings => '{"title_model": "anthropic/mine"}' ], [ 'plain-1', server => 'plain' ],
	[ 'plain-2', server => 'plain', settings => '{"model": "plain-2"}' ])
{
	my ($model, %session) = @$case;
	titled('which model? [[tokens=1]]', %session);
	is((title_requests())[-1]{body}{model}, $model, "a title by $model");
}

# many at once: more than are under way at a time
$node->safe_psql('postgres', <<'EOS');
SELECT chat.stream_chat_completion((chat.create_chat_session(user_id => 'many')).id, 'n ' || i || ' [[tokens=1]]')
FROM generate_series(1, 80) AS i
EOS
wait_for($node, "SELECT count(*) = 80 FROM chat.chat_session WHERE user_id = 'many' AND title = 'Fake Title Here'");
settled();
pass('many sessions at once have their titles');

# the setting
$node->append_conf('postgresql.conf', 'chat.generate_titles = off');
$node->reload;
wait_for($node, "SELECT current_setting('chat.generate_titles') = 'off'");
# the worker reads it at its own time
my $untitled;
for (1 .. 100)
{
	$untitled = create_session($node)->{id};
	wait_for_task($node, ask($node, $untitled, 'off [[tokens=1]]'));
	settled();
	last unless defined title($untitled);
}
is(title($untitled), undef, 'titles can be switched off');

done_testing();
