# Is the answer the same, however the endpoint writes its event stream and
# wherever the network cuts it?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake, retries => 0);

# Checks that each of these directives gives the same answer.
sub same_answer
{
	my ($name, $base, $text, @directives) = @_;
	my @turns = run_turns($node, map { "[[$base $_]]" } @directives);

	foreach my $i (0 .. $#directives)
	{
		my $turn = $turns[$i];
		my $label = length $directives[$i] ? $directives[$i] : 'plain stream';
		is($turn->{answer} && $turn->{answer}{content}, $text, "$name: $label")
		  or diag(encode($turn->{error}));
		is(text_of(@{ $turn->{events} }), $text, '  and its deltas');
		is($turn->{status}, 'completed', '  and it is completed');
	}
	return;
}

my @forms = (
	'', 'eol=cr', 'eol=crlf', 'bom=1', 'comments=1', 'multidata=1',
	'nospace=1', 'notail=1', 'closed=1', 'norole=1', 'unknown=1', 'nulls=1',
	'finish=', 'usage=first', 'usage=none', 'usage=split', 'nodone=1',
	'nofinish=1', 'nodone=1 notail=1', 'nodone=1 closed=1',
	'nodone=1 nofinish=1 closed=1', 'nodone=1 eol=cr',
	'nodone=1 notail=1 eol=crlf closed=1',
	map { "$_ bom=1 comments=1 multidata=1 nospace=1 unknown=1 nulls=1" }
	  qw(eol=lf eol=cr eol=crlf));
same_answer('form', 'tokens=5', 't0 t1 t2 t3 t4 ', @forms);

# the same forms byte by byte, in each a character of four bytes
my $smile = "\x{1f600}\x{e9} \"q\" \\ \n end";
my $text = 'text=%F0%9F%98%80%C3%A9%20%22q%22%20%5C%20%0A%20end';
same_answer('split at every byte', "$text split=1",
	$smile, grep { !/nodone|nofinish/ } @forms);

# one cut, at every byte of the stream
my $sql = <<"EOF";
CREATE TABLE cuts AS
SELECT chat.stream_chat_completion((chat.create_chat_session()).id,
	format('[[$text norole=1 usage=none bom=1 eol=crlf splitat=%s]]',
		n)) AS task
FROM generate_series(1, 900) AS n
EOF
$sql =~ s/%([0-9A-F]{2})/%%$1/g;
$node->safe_psql('postgres', $sql);
wait_for($node, <<'EOF');
SELECT bool_and(status IN ('completed', 'failed'))
FROM chat.chat_task WHERE id IN (SELECT task FROM cuts)
EOF
my @answers = rows($node, <<'EOF');
SELECT t.status, m.content, t.error, count(*)
FROM cuts AS c JOIN chat.chat_task AS t ON t.id = c.task
LEFT JOIN chat.chat_message AS m
	ON m.session_id = t.session_id AND m.id = t.answer_id
GROUP BY 1, 2, 3
EOF
is_deeply(
	\@answers,
	[
		{
			status => 'completed',
			content => $smile,
			error => undef,
			count => 900
		}
	],
	'one cut, at any byte: the same answer');

# long lines and many events (T44)
my ($huge, $many, $big) = run_turns($node, '[[hugeline=300000]]',
	'[[tokens=10001]]', '[[tokens=300 size=3000 eol=cr]]');
is($huge->{answer}{content}, 'x' x 300000, 'a line of 300 kB');
is($many->{answer}{content},
	join('', map { "t$_ " } 0 .. 10000), 'T44: 10001 tokens');
is(text_of(@{ $many->{events} }),
	$many->{answer}{content}, 'T44: all of them are events');
is(length $big->{answer}{content}, 900000, '900 kB in 300 tokens');

# the unfinished last event of a stream that breaks off does not count
my ($cut) = run_turns($node, '[[tokens=9 cutafter=4]]');
is($cut->{answer}{content}, 't0 t1 t2 t3 ', 'what came before a cut counts');
is($cut->{status}, 'failed', 'but it is no answer');

done_testing();
