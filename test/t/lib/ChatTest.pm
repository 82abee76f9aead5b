# ChatTest: clusters with chat in them, and waiting for what chat does
#
#	use FindBin;
#	use lib "$FindBin::RealBin/lib";
#	use ChatTest;
#
#	my $fake = start_fake();			# the bundled endpoint, see ChatTest::Fake
#	my $node = chat_cluster('main');	# PostgreSQL::Test::Cluster, started
#	create_server($node, $fake);		# server "fake" with a PUBLIC mapping
#	my $session = create_session($node);		# hash of its row
#	my $listener = listener($node, $session->{channel});
#	my $task = ask($node, $session->{id}, 'hello [[tokens=20]]');
#	my @events = $listener->turn($task);		# up to the terminal event
#	wait_for_task($node, $task);				# its final status
#	my @turns = run_turns($node, 'a [[eol=cr]]', 'b');	# each in a session
#
# Everything waits for a state, for timeout_default seconds at most; nothing
# sleeps for a fixed time.  What this module starts ends with the test.

package ChatTest;

use strict;
use warnings;

use Exporter 'import';
use JSON::PP ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use ChatTest::Fake;
use ChatTest::Listener;

our @EXPORT = qw(
  chat_cluster start_fake create_server server_sql
  create_session listener ask run_turns turn_of
  wait_for wait_for_task wait_for_worker
  events stored_events rows row decode encode literal
  text_of types_of build_file
);

my $json = JSON::PP->new->allow_nonref->canonical;

# Names of assertions may hold any character; from 17 on the module that
# writes them to the log as well dies of wide ones.
INIT
{
	foreach my $what (qw(output failure_output))
	{
		my $fh = Test::More->builder->$what;
		my $tee = tied *$fh or next;
		binmode $_, ':encoding(UTF-8)' foreach @$tee;
	}
}

# Decodes JSON; the text is characters, as psql printed or a socket sent it.
sub decode
{
	my ($text) = @_;
	utf8::encode($text) if utf8::is_utf8($text);
	return JSON::PP->new->utf8->allow_nonref->decode($text);
}

# Encodes a Perl value as canonical JSON: characters, kept as UTF-8, because a
# program that IPC::Run feeds gets the bytes they are kept as (JSON::PP did that
# by itself before 4.16).
sub encode
{
	my $text = $json->encode($_[0]);
	utf8::upgrade($text);
	return $text;
}

# Returns a string as an SQL literal, undef as NULL.
sub literal
{
	my ($s) = @_;
	return 'NULL' unless defined $s;
	my $escape = ($s =~ s/\\/\\\\/g) ? 'E' : '';
	$s =~ s/'/''/g;
	return "$escape'$s'";
}

# Returns the path of a program or library in the build directory.
sub build_file
{
	my ($name) = @_;
	my $dir = $ENV{CHAT_BUILD} || "$FindBin::RealBin/../../build";
	my $file = "$dir/$name";
	-e $file or BAIL_OUT("$file is missing: make tools");
	return $file;
}

# Makes and starts a cluster whose database "postgres" has the extension.
# Options: conf => further settings, extension => 0, start => 0, and those of
# PostgreSQL::Test::Cluster's init.
sub chat_cluster
{
	my ($name, %opt) = @_;
	my $conf = delete $opt{conf} // '';
	my $extension = delete $opt{extension} // 1;
	my $start = delete $opt{start} // 1;
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init(extra => [ '--encoding=UTF8', '--locale=C' ], %opt);
	# after what init writes, so that it holds for standbys, too
	$node->append_conf('postgresql.conf', <<"EOF");
shared_preload_libraries = 'chat'
max_connections = 60
max_worker_processes = 32
max_prepared_transactions = 10
log_statement = none
chat.default_prompt = ''
chat.generate_titles = off
$conf
EOF
	return $node unless $start;
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION chat') if $extension;
	return $node;
}

# Starts the bundled endpoint.
sub start_fake
{
	return ChatTest::Fake->new(@_);
}

# Returns CREATE SERVER and CREATE USER MAPPING for an endpoint on a port.
# Options: name => 'fake', key => 'sk-test' (undef: no mapping), all others
# are server options.
sub server_sql
{
	my ($port, %opt) = @_;
	my $name = delete $opt{name} // 'fake';
	my $key = exists $opt{key} ? delete $opt{key} : 'sk-test';
	my %server = (
		base_url => "http://127.0.0.1:$port/v1",
		model => 'fake-1',
		%opt);
	my $options = join ', ',
	  map { "$_ " . literal($server{$_}) }
	  grep { defined $server{$_} } sort keys %server;
	my $sql =
	  "CREATE SERVER $name FOREIGN DATA WRAPPER chat_llm OPTIONS ($options);";

	$sql .= "CREATE USER MAPPING FOR PUBLIC SERVER $name"
	  . " OPTIONS (api_key " . literal($key) . ');'
	  if defined $key;
	return $sql;
}

# Creates the server for a fake endpoint and makes it the default one.
sub create_server
{
	my ($node, $fake, %opt) = @_;
	my $name = $opt{name} // 'fake';
	my $db = delete $opt{db} // 'postgres';

	$node->safe_psql($db,
		server_sql($fake->port, %opt)
		  . "ALTER DATABASE $db SET chat.default_server = '$name';");
	return;
}

# Returns all rows of a query as hashes (SQL NULL is undef).
sub rows
{
	my ($node, $sql, $db) = @_;
	my $out = $node->safe_psql($db // 'postgres',
		"SELECT coalesce(json_agg(r), '[]') FROM ($sql) AS r");
	return @{ decode($out) };
}

# Returns the only row of a query.
sub row
{
	my @rows = rows(@_);
	@rows == 1 or die scalar(@rows) . " rows instead of one: $_[1]\n";
	return $rows[0];
}

# Creates a session; options are create_chat_session's arguments.
sub create_session
{
	my ($node, %args) = @_;
	my $db = delete $args{db};
	my $list = join ', ',
	  map { "$_ => " . literal($args{$_}) } sort keys %args;

	return row($node, "SELECT * FROM chat.create_chat_session($list)", $db);
}

# Returns a listener on channels of a node.
sub listener
{
	my ($node, @channels) = @_;
	return ChatTest::Listener->new($node->connstr('postgres'), @channels);
}

# Sends a message; options are stream_chat_completion's arguments.  Returns
# the task's id.
sub ask
{
	my ($node, $session, $message, %args) = @_;
	my $db = delete $args{db} // 'postgres';
	my $list = join ', ',
	  'session_id => ' . literal($session), 'message => ' . literal($message),
	  map { "$_ => " . literal($args{$_}) } sort keys %args;

	return $node->safe_psql($db, "SELECT chat.stream_chat_completion($list)");
}

# Sends each message to a session of its own, all at once, and waits for the
# ends; returns what turn_of() returns of each, in the order of the messages.
sub run_turns
{
	my ($node, @messages) = @_;
	my $list = join ', ',
	  map { "($_, " . literal($messages[$_]) . ')' } 0 .. $#messages;
	my @tasks = split /\n/, $node->safe_psql('postgres', <<"EOF");
SELECT chat.stream_chat_completion((chat.create_chat_session()).id, m)
FROM (VALUES $list) AS v (n, m) ORDER BY n
EOF

	return map { turn_of($node, $_) } @tasks;
}

# Waits for a task's end; returns its row with session, task, its last message
# (answer, undef if none), all its messages, and its stored events.
sub turn_of
{
	my ($node, $task) = @_;
	my $row = wait_for_task($node, $task);
	my $id = literal($task);
	my $more = row($node, <<"EOF");
SELECT (SELECT to_json(m) FROM chat.chat_message AS m
	WHERE m.session_id = '$row->{session_id}'
		AND m.id = '$row->{answer_id}') AS answer,
	(SELECT json_agg(m ORDER BY m.sequence) FROM chat.chat_message AS m
	WHERE m.session_id = '$row->{session_id}' AND m.task_id = $id)
		AS messages,
	(SELECT json_agg(e.payload ORDER BY e.seq) FROM chat.chat_event AS e
	WHERE e.task_id = $id) AS events
EOF

	return {
		%$row, %$more,
		task => $task,
		session => $row->{session_id}
	};
}

# Waits until a query returns true.  While a server comes up again psql may be
# gone before it has read the query, which ends IPC::Run.
sub wait_for
{
	my ($node, $sql, $db) = @_;
	my $found;

	for (my $tries = 0; !defined $found; $tries++)
	{
		$found = eval { $node->poll_query_until($db // 'postgres', $sql) };
		die $@ if !defined $found && ($@ !~ /Broken pipe/ || $tries > 100);
	}
	$found or die "timed out waiting for: $sql\n";
	return;
}

# Waits until a task has ended and returns its row.
sub wait_for_task
{
	my ($node, $task, $db) = @_;
	my $id = literal($task);

	wait_for($node, <<"EOF", $db);
SELECT status IN ('completed', 'failed', 'cancelled')
FROM chat.chat_task WHERE id = $id
EOF
	return row($node, "SELECT * FROM chat.chat_task WHERE id = $id", $db);
}

# Waits until the database has a worker that is up; returns its pid.
sub wait_for_worker
{
	my ($node, $db) = @_;
	wait_for($node, 'SELECT count(*) > 0 FROM chat.worker_status() WHERE pid > 0',
		$db);
	return row($node, 'SELECT min(pid) AS pid FROM chat.worker_status() WHERE pid > 0',
		$db)->{pid};
}

# Returns a task's stored events in order, as get_task_events() gives them.
sub events
{
	my ($node, $task, $after, $db) = @_;
	my ($id, $seq) = (literal($task), $after // 0);

	return map { $_->{payload} } rows($node,
		"SELECT payload FROM chat.get_task_events($id, $seq) ORDER BY seq", $db);
}

# Returns a task's stored events in order, straight from the table.
sub stored_events
{
	my ($node, $task, $db) = @_;
	my $id = literal($task);

	return map { $_->{payload} } rows($node,
		"SELECT payload FROM chat.chat_event WHERE task_id = $id ORDER BY seq",
		$db);
}

# Returns the text that the text-delta events among these add up to.  A
# reset-step takes back what came since the step began.
sub text_of
{
	my ($done, $step) = ('', '');

	foreach my $event (@_)
	{
		my $type = $event->{type};
		$step .= $event->{delta} // '' if $type eq 'text-delta';
		$step = '' if $type eq 'reset-step';
		($done, $step) = ($done . $step, '') if $type eq 'finish-step';
	}
	return $done . $step;
}

# Returns the types of events, neighbours that are alike as one.
sub types_of
{
	my @types;

	foreach my $event (@_)
	{
		push @types, $event->{type}
		  unless @types && $types[-1] eq $event->{type};
	}
	return @types;
}

1;
