# JSON whose text is a thousand times longer when jsonb writes it: a number
# like 1e100000 is ten bytes in the table and a hundred thousand in a text.
# Whoever brings it, no other task notices (P10); nor of a tool's result that
# the database refuses.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use ChatTest::Tools;
use Test::More;

my $fake = start_fake();
my $node = tool_cluster($fake);
my $worker = wait_for_worker($node);
my $bomb = "'[' || rtrim(repeat('1e131071,', 9000), ',') || ']'";

$node->safe_psql('postgres', <<"EOS");
CREATE FUNCTION app.note(what text) RETURNS text LANGUAGE sql AS \$\$ SELECT 'noted ' || what \$\$;
CREATE FUNCTION app.bomb() RETURNS text LANGUAGE sql AS \$\$ SELECT $bomb \$\$;
EOS
register($node, 'ann', function => "app.$_") foreach 'note(text)', 'bomb()';
register($node, 'ann', kind => 'client', name => 'ask_user');

# Asserts that a task ends, and that those of other sessions do.
sub ends
{
	my ($task, $status, $what) = @_;
	my (undef, $other) = start($node, 'go [[tool=note args=%7B"what":"x"%7D steps=1]]');

	like(wait_for_task($node, $task)->{status}, $status, "$what: the task ends");
	is(wait_for_task($node, $other)->{status}, 'completed', '  and so do others');
	return;
}

# Asserts that a call refuses a bomb.
sub refused
{
	my ($call, $what) = @_;
	my (undef, undef, $err) = $node->psql('postgres', "SELECT chat.$call");

	like($err, qr/the numbers of "\w+" are too long/, "$what is refused");
	return;
}

# what applications bring
my $session = create_session($node, owner => 'ann')->{id};
refused("create_chat_session(settings => jsonb_build_object('extra_body',"
	  . " jsonb_build_object('a', ($bomb)::jsonb)))", 'a setting');
refused("stream_chat_completion('$session', 'hello', options => jsonb_build_object("
	  . "'extra_body', jsonb_build_object('a', ($bomb)::jsonb)))", 'an option');
refused("add_chat_message('$session', 'user', parts => ($bomb)::jsonb)",
	'a message');
refused("register_tool(kind => 'client', name => 'x', parameters => jsonb_build_object("
	  . "'type', 'object', 'a', ($bomb)::jsonb))", 'a schema');

# the result of a tool
(undef, my $task) = start($node, 'go [[tool=bomb args={} steps=1]]');
ends($task, qr/^completed$/, 'a result');

# the input of a call
my $args = value('{"a":[' . join(',', ('1e131071') x 6500) . ']}');
(undef, $task) = start($node, "go [[tool=ask_user args=$args steps=1]]");
ends($task, qr/^completed$/, 'an input');

# what an application says
(undef, $task) = start($node, 'go [[tool=ask_user args={} steps=1]]');
my ($operation) = wait_for_calls($node, $task, 'waiting', 1);
refused("operation_progress('$operation', ($bomb)::jsonb)", 'progress');

# a result that cannot be stored: the turn fails again and again
$node->safe_psql('postgres', <<"EOS");
ALTER TABLE chat.chat_message ADD CHECK (content <> 'poison') NOT VALID;
SELECT chat.complete_operation('$operation', '"poison"');
EOS
ends($task, qr/^failed$/, 'poison');
is(row($node, "SELECT error->>'code' AS code FROM chat.chat_task WHERE id = '$task'")->{code},
	'endpoint_error', '  with its error');
is((stored_events($node, $task))[-1]{type}, 'finish', '  and its last event');

is(wait_for_worker($node), $worker, 'under one worker');
$node->stop;
done_testing();
