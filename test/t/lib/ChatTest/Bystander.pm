# ChatTest::Bystander: ten streams that have no part in what a test does
#
#	my $by = ChatTest::Bystander->new($node, $fake);	they stand at gate "by"
#	... the fault ...
#	$by->ready;				they stand there again (after an end of the worker)
#	$by->check('what');		lets them go on; each came through, byte for byte
#	$by->check('what', undisturbed => 1);	and nothing was done twice
#
#	one_end($node, $task, 'what');	assertion: exactly one terminal event, last
#	messages($node, $task);			roles of a task's messages, in order
#
# Options of new(): db (the database), gate (its name), n (how many), server.

package ChatTest::Bystander;

use strict;
use warnings;

use Exporter 'import';
use Test::More;

use ChatTest;

our @EXPORT = qw(one_end messages);

# A piece of the answers, with what might be harmed on the way.
my $piece = qq{\x{e4}"\\\x{20ac}\x{1f600}'%\t };
my $pieces = 20;

# Returns text as a value of a directive of the fake endpoint.
sub percent_encoded
{
	my ($text) = @_;
	utf8::encode($text);
	$text =~ s/([^a-z])/sprintf '%%%02X', ord $1/ge;
	return $text;
}

# Starts the streams and returns when they stand at their gate.
sub new
{
	my ($class, $node, $fake, %opt) = @_;
	my $self = bless {
		node => $node,
		fake => $fake,
		db => $opt{db} // 'postgres',
		gate => $opt{gate} // 'by',
		n => $opt{n} // 10
	}, $class;
	my $message = sprintf 'bystander [[text=%s repeat=%d gateat=%d:%s]]',
	  percent_encoded($piece), $pieces, $pieces / 2, $self->{gate};

	$self->{tasks} = [
		split /\n/,
		$node->safe_psql($self->{db},
			    'SELECT chat.stream_chat_completion('
			  . '(chat.create_chat_session(server => '
			  . literal($opt{server}) . ')).id, '
			  . literal($message)
			  . ") FROM generate_series(1, $self->{n})")
	];
	$self->ready;
	return $self;
}

# Returns when the streams stand at their gate.
sub ready
{
	my ($self) = @_;
	$self->{fake}->get_json("/gate/$self->{gate}?wait=$self->{n}");
	return;
}

# Lets the streams end and looks at all that is left of them.
sub check
{
	my ($self, $what, %expect) = @_;
	my ($node, $db) = @$self{qw(node db)};
	my $text = $piece x $pieces;
	my %found = (ends => 0, texts => 0, answers => 0, pairs => 0, resets => 0);
	my @status;

	$self->{fake}->open_gate($self->{gate}, $self->{n});
	foreach my $task (@{ $self->{tasks} })
	{
		push @status, wait_for_task($node, $task, $db)->{status};
		my @events = stored_events($node, $task, $db);
		my @ends = grep { $_->{type} =~ /^(finish|abort)$/ } @events;
		$found{ends}++ if @ends == 1 && $ends[0] == $events[-1];
		$found{texts}++ if text_of(@events) eq $text;
		$found{resets}++ if grep { $_->{type} eq 'reset-step' } @events;
		my @messages = rows($node, <<"EOS", $db);
SELECT role, content FROM chat.chat_message WHERE task_id = '$task'
ORDER BY sequence
EOS
		$found{pairs}++
		  if "@{[ map { $_->{role} } @messages ]}" eq 'user assistant';
		$found{answers}++ if ($messages[-1]{content} // '') eq $text;
	}
	my $n = $self->{n};
	is_deeply(
		[ \@status, @found{qw(ends texts pairs answers)} ],
		[ [ ('completed') x $n ], ($n) x 4 ],
		"$what: bystanders end once and come through byte for byte");
	is($found{resets}, 0, "$what: nothing of theirs was done twice")
	  if $expect{undisturbed};
	return;
}

# Asserts that a task's stream has one end, at its end.
sub one_end
{
	my ($node, $task, $what, $db) = @_;
	my @events = stored_events($node, $task, $db);
	my @ends = grep { $events[$_]{type} =~ /^(finish|abort)$/ } 0 .. $#events;

	is_deeply(\@ends, [$#events], "$what: one terminal event");
	return;
}

# Returns the roles of a task's messages.
sub messages
{
	my ($node, $task, $db) = @_;
	return join ' ', map { $_->{role} } rows($node, <<"EOS", $db);
SELECT role FROM chat.chat_message WHERE task_id = '$task' ORDER BY sequence
EOS
}

1;
