# Does each function raise the SQLSTATEs that README.md gives for it, and are
# those that it raises given there?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use PostgreSQL::Test::Utils;
use Test::More;

# Reads the reference of functions: of each, the codes that its text gives, and
# the functions whose codes it has, too.
sub read_reference
{
	my $text = slurp_file("$FindBin::RealBin/../../README.md");
	my ($chapter) = $text =~ /^## Functions\n(.*?)^## /ms;
	my (undef, @parts) = split /^`(\w+)\(.*\n/m, $chapter;
	my %reference;

	while (my ($name, $part) = splice @parts, 0, 2)
	{
		my ($states) = $part =~ /\*SQLSTATEs:\*(.*?)(?:\n\n|\z)/s;
		next unless $states;
		my $as = qr/(?:as|as in|those of)\s+`(\w+)`/;
		$reference{$name} = {
			codes => { map { $_ => 1 } $states =~ /`([0-9A-Z]{5})`/g },
			as => [ $states =~ /$as/g ]
		};
	}
	return %reference;
}

my %reference = read_reference();
my %raised;

# Whether a code is among those that the reference gives for a function.
sub is_given
{
	my ($name, $code) = @_;
	my $entry = $reference{$name} or return 0;

	return $entry->{codes}{$code}
	  || grep { is_given($_, $code) } @{ $entry->{as} };
}

# Runs statements, one or more a line, behind the code that the last one has to
# raise and the function whose code it is.
sub raises
{
	my ($node, $setup, $table) = @_;
	my @rows = map { [ split ' ', $_, 3 ] } grep { /\S/ } split /\n/, $table;
	my $script = "\\set VERBOSITY sqlstate\n$setup\n";
	my ($out, $err);

	foreach my $i (0 .. $#rows)
	{
		my $reset = 'ROLLBACK; RESET ROLE; RESET ALL;';
		$script .= "\\warn @@ $i\n$rows[$i][2]\n\\warn @@\n$reset\n";
	}
	$node->psql('postgres', $script,
		on_error_stop => 0, stdout => \$out, stderr => \$err);
	my (undef, @seen) = split /^@@ \d+\n/m, $err;
	foreach my $row (@rows)
	{
		my ($code, $name, $sql) = @$row;
		my ($states) = split /^@@$/m, shift(@seen) // '';
		my (@codes) = ($states // '') =~ /ERROR:  (\w{5})/g;

		is($codes[-1], $code, "$name: $code: $sql");
		ok(is_given($name, $code), 'the reference gives it');
		$raised{$name}{$code} = 1;
	}
	return;
}

my $fake = start_fake();
my $node = chat_cluster('main', conf => 'chat.max_retries = 0');
create_server($node, $fake);
my $setup = <<'EOS';
\set none '00000000-0000-4000-8000-000000000000'
\set message '00000000-0000-4000-8000-000000000001'
\set operation '00000000-0000-4000-8000-000000000002'
SELECT id AS s FROM chat.chat_session WHERE title = 'used' \gset
SELECT id AS empty FROM chat.chat_session WHERE title = 'empty' \gset
SELECT id AS poisoned FROM chat.chat_task WHERE error ? 'crashes' \gset
EOS

# what there must be
$node->safe_psql('postgres', <<'EOS');
CREATE SERVER nomodel FOREIGN DATA WRAPPER chat_llm OPTIONS (base_url 'http://127.0.0.1:1/v1');
CREATE SERVER nokey FOREIGN DATA WRAPPER chat_llm OPTIONS (base_url 'https://example.com/v1', model 'm');
CREATE SERVER badkey FOREIGN DATA WRAPPER chat_llm OPTIONS (base_url 'https://example.com/v1', model 'm');
CREATE USER MAPPING FOR PUBLIC SERVER badkey OPTIONS (api_key_file '/nonexistent');
CREATE SERVER service FOREIGN DATA WRAPPER chat_tool OPTIONS (url 'https://example.com');
CREATE USER MAPPING FOR PUBLIC SERVER service;
CREATE SERVER keyless FOREIGN DATA WRAPPER chat_tool OPTIONS (url 'https://example.com');
CREATE ROLE app LOGIN;
CREATE ROLE other LOGIN;
SELECT chat.grant_usage('app'), chat.grant_usage('other');
GRANT USAGE ON FOREIGN SERVER fake, nokey, badkey, nomodel TO app;
CREATE SCHEMA tool;
GRANT USAGE ON SCHEMA tool TO app;
CREATE FUNCTION tool.one(a text) RETURNS text LANGUAGE sql AS 'SELECT a';
CREATE FUNCTION tool.two(a text) RETURNS text LANGUAGE sql AS 'SELECT a';
CREATE FUNCTION tool.two(a integer) RETURNS text LANGUAGE sql AS 'SELECT a::text';
CREATE FUNCTION tool.any(a anyelement) RETURNS text LANGUAGE sql AS 'SELECT a::text';
CREATE FUNCTION tool.secret() RETURNS text LANGUAGE sql AS 'SELECT 1';
REVOKE EXECUTE ON FUNCTION tool.secret FROM PUBLIC;
SELECT chat.create_chat_session(title => 'empty');
EOS
my $session = create_session($node, user_id => 'ada', title => 'used')->{id};
wait_for_task($node, ask($node, $session, 'one'));
wait_for_task($node, ask($node, $session, 'two [[status=400]]'));
$node->safe_psql('postgres', <<"EOS");
SELECT chat.add_chat_message('$session', 'assistant', 'x', message_id => '00000000-0000-4000-8000-000000000001');
UPDATE chat.chat_task SET error = error || '{"crashes": 3}' WHERE status = 'failed';
INSERT INTO chat.chat_tool_call (operation_id, session_id, task_id, message_id,
	position, sequence, step, call_id, name, kind, arguments, status)
SELECT '00000000-0000-4000-8000-000000000002', '$session', id, answer_id, 1, 1, 1,
	'c', 't', 'client', '', 'waiting' FROM chat.chat_task WHERE status = 'failed';
EOS

# conversations
raises($node, $setup, <<'EOS');
23505 create_chat_session SELECT chat.create_chat_session(session_id => :'s');
22023 create_chat_session SELECT chat.create_chat_session(settings => '{"x": 1}');
22023 create_chat_session SELECT chat.create_chat_session(metadata => '[]');
42704 create_chat_session SELECT chat.create_chat_session(server => 'none');
42704 create_chat_session SELECT chat.create_chat_session(owner => 99999);
42501 create_chat_session SET ROLE app; SELECT chat.create_chat_session(owner => 'other');
42501 create_chat_session SET chat.user_id = 'ada'; SELECT chat.create_chat_session(user_id => 'bob');
55000 upsert_chat_session SELECT chat.upsert_chat_session(jsonb_set(chat.get_chat_session(:'s'), '{messages,0,content}', '"x"'));
22023 upsert_chat_session SELECT chat.upsert_chat_session('{"x": 1}');
22023 upsert_chat_session SELECT chat.upsert_chat_session('{"messages": [{"role": "x"}]}');
22004 upsert_chat_session SELECT chat.upsert_chat_session(NULL);
23505 upsert_chat_session SELECT chat.upsert_chat_session(format('{"messages": [{"role": "user", "id": "%1$s"}, {"role": "user", "id": "%1$s"}]}', :'s')::jsonb);
22023 upsert_chat_session SELECT chat.upsert_chat_session('{"total_prompt_tokens": 9007199254740993}');
22003 upsert_chat_session SELECT chat.upsert_chat_session(('{"usage": [' || repeat('{"prompt_tokens": 9007199254740992}, ', 1024) || '{}]}')::jsonb);
42704 upsert_chat_session SELECT chat.upsert_chat_session('{"server": "none"}');
42501 upsert_chat_session SET chat.user_id = 'ada'; SELECT chat.upsert_chat_session('{"user_id": "bob"}');
22023 update_chat_session SELECT chat.update_chat_session(:'s', settings => '{"x": 1}');
22023 update_chat_session SELECT chat.update_chat_session(:'s', metadata => '1');
22023 update_chat_session SELECT chat.update_chat_session(:'s', total_prompt_tokens => -1);
22023 update_chat_session SELECT chat.update_chat_session(:'s', total_completion_tokens => 9007199254740993);
42704 generate_session_title SET chat.default_server = ''; SELECT chat.generate_session_title(:'s');
P0002 assign_user_to_session SELECT chat.assign_user_to_session(:'none', 'x');
42501 assign_user_to_session SET chat.user_id = 'ada'; SELECT chat.assign_user_to_session(:'s', 'bob');
2201W get_user_chat_sessions SELECT chat.get_user_chat_sessions('ada', max_rows => -1);
2201X get_user_chat_sessions SELECT chat.get_user_chat_sessions('ada', skip => -1);
P0002 add_chat_message SELECT chat.add_chat_message(:'none', 'user', 'x');
22023 add_chat_message SELECT chat.add_chat_message(:'s', 'x', 'x');
55000 add_chat_message SELECT chat.add_chat_message(:'s', 'user', 'x', sequence => 1);
23505 add_chat_message SELECT chat.add_chat_message(:'s', 'user', 'y', message_id => :'message');
22004 add_chat_messages_batch SELECT chat.add_chat_messages_batch(:'s', NULL);
55000 add_chat_messages_batch SELECT chat.add_chat_messages_batch(:'s', '[{"role": "user"}]', start_sequence => 1);
2201W get_chat_messages SELECT chat.get_chat_messages(:'s', max_rows => -1);
22004 import_chat_session SELECT chat.import_chat_session(NULL);
22023 import_chat_session SELECT chat.import_chat_session('{"x": 1}');
23505 import_chat_session SELECT chat.import_chat_session(chat.export_chat_session(:'s'));
0A000 import_chat_session SELECT chat.import_chat_session('{"format": "x"}');
42704 import_chat_session SELECT chat.import_chat_session('{"server": "none"}');
42501 import_chat_session SET ROLE app; SELECT chat.import_chat_session('{}', owner => 'other');
2201W search_messages SELECT chat.search_messages('x', max_rows => -1);
42704 search_messages SELECT chat.search_messages('x', config => 'none');
EOS

# turns
raises($node, $setup, <<'EOS');
P0002 stream_chat_completion SELECT chat.stream_chat_completion(:'none', 'x');
P0002 stream_chat_completion SELECT chat.stream_chat_completion(:'s', 'x', user_id => 'bob');
22001 stream_chat_completion SET chat.max_message_length = 1; SELECT chat.stream_chat_completion(:'s', 'xx');
53400 stream_chat_completion SET chat.max_tokens_per_user_per_day = 1; SELECT chat.stream_chat_completion(:'s', 'x');
22023 stream_chat_completion SELECT chat.stream_chat_completion(:'s', 'x', context => '{"x": 1}');
22023 stream_chat_completion SELECT chat.stream_chat_completion(:'s', 'x', options => '{"x": 1}');
22023 stream_chat_completion SELECT chat.stream_chat_completion(:'s', 'x', on_busy => 'x');
55006 stream_chat_completion BEGIN; SELECT chat.stream_chat_completion(:'s', 'x'); SELECT chat.stream_chat_completion(:'s', 'x', on_busy => 'reject');
23505 stream_chat_completion SELECT chat.stream_chat_completion(:'s', 'x', message_id => :'message');
42704 stream_chat_completion SET chat.default_server = ''; SELECT chat.stream_chat_completion(:'s', 'x');
42704 stream_chat_completion SELECT chat.stream_chat_completion(:'s', 'x', server => 'none');
42704 stream_chat_completion SELECT chat.stream_chat_completion(:'s', 'x', server => 'nokey');
42501 stream_chat_completion SET ROLE other; SELECT chat.stream_chat_completion((chat.create_chat_session()).id, 'x');
HV002 stream_chat_completion SELECT chat.stream_chat_completion(:'s', 'x', server => 'nomodel');
F0000 stream_chat_completion SELECT chat.stream_chat_completion(:'s', 'x', server => 'badkey');
2D000 ask BEGIN; CALL chat.ask('x');
22004 ask CALL chat.ask(NULL);
38000 ask CALL chat.ask('x [[status=400]]');
P0002 ask CALL chat.ask('x', :'none');
22023 get_task_events SELECT chat.get_task_events(:'none', max_rows => -1);
22023 wait_task_events SELECT chat.wait_task_events(:'none', timeout => '31 s');
22023 wait_task_events SELECT chat.wait_task_events(:'none', max_rows => -1);
25001 wait_task_events BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT chat.wait_task_events(:'none');
22023 sse SELECT chat.sse(:'none', protocol => 5);
25001 sse BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT chat.sse(:'none', timeout => '1 s');
P0002 regenerate SELECT chat.regenerate(:'none');
P0002 regenerate SELECT chat.regenerate(:'s', 99);
55000 regenerate SELECT chat.regenerate(:'empty');
55000 regenerate BEGIN; SELECT chat.stream_chat_completion(:'s', 'x'); SELECT chat.regenerate(:'s');
42704 regenerate SELECT chat.regenerate(:'s', server => 'none');
P0002 edit_message SELECT chat.edit_message(:'s', 99, 'x');
22004 edit_message SELECT chat.edit_message(:'s', NULL, 'x');
22004 edit_message SELECT chat.edit_message(:'s', 1, NULL);
22023 edit_message SELECT chat.edit_message(:'s', 2, 'x');
22001 edit_message SET chat.max_message_length = 1; SELECT chat.edit_message(:'s', 1, 'xx');
P0002 fork_chat_session SELECT chat.fork_chat_session(:'none');
P0002 rerun_job SELECT chat.rerun_job(:'none');
55000 rerun_job SELECT chat.rerun_job(:'poisoned');
EOS

# prompts, users and tools
raises($node, $setup, <<'EOS');
22004 set_prompt SELECT chat.set_prompt(NULL, 'x');
22023 set_prompt SELECT chat.set_prompt('', 'x');
22023 set_prompt SELECT chat.set_prompt('x', '{{unknown}}');
42501 set_prompt SET ROLE app; SELECT chat.set_prompt('x', 'x', shared => true);
42501 set_prompt SET ROLE app; SELECT chat.set_prompt('x', 'x', owner => 'other');
42704 set_prompt SELECT chat.set_prompt('x', 'x', owner => 99999);
22023 label_prompt SELECT chat.label_prompt('x', 1, '{latest}');
42501 label_prompt SET ROLE app; SELECT chat.label_prompt('x', 1, '{x}', shared => true);
42501 delete_prompt SET ROLE app; SELECT chat.delete_prompt('x', shared => true);
22004 set_user_context SELECT chat.set_user_context(NULL, '{}');
22023 set_user_context SELECT chat.set_user_context('ada', '[]');
42501 set_user_context SET ROLE app; SELECT chat.set_user_context('ada', '{}', owner => 'other');
42501 set_user_context SET chat.user_id = 'ada'; SELECT chat.set_user_context('bob', '{}');
42704 set_user_context SELECT chat.set_user_context('ada', '{}', owner => 99999);
22023 register_tool SELECT chat.register_tool();
22023 register_tool SELECT chat.register_tool('tool.one', kind => 'x');
42883 register_tool SELECT chat.register_tool('tool.none');
42725 register_tool SELECT chat.register_tool('tool.two');
42809 register_tool SELECT chat.register_tool('tool.any');
42704 register_tool SELECT chat.register_tool(name => 'x', kind => 'http', server => 'none');
42704 register_tool SELECT chat.register_tool(name => 'x', kind => 'http', server => 'keyless');
42501 register_tool SET ROLE app; SELECT chat.register_tool('tool.secret');
42501 register_tool SET ROLE app; SELECT chat.register_tool(name => 'x', kind => 'http', server => 'service');
42501 register_tool SET ROLE app; SELECT chat.register_tool('tool.one', shared => true);
55000 register_tool SELECT chat.register_tool('tool.one');
42501 drop_tool SET ROLE app; SELECT chat.drop_tool('x', shared => true);
P0002 complete_operation SELECT chat.complete_operation(:'none');
22004 complete_operation SELECT chat.complete_operation(NULL);
22023 complete_operation SELECT chat.complete_operation(:'none', error => 'x');
42704 test_server SELECT chat.test_server('none');
42501 test_server SET ROLE other; SELECT chat.test_server('fake');
HV002 test_server SELECT chat.test_server('nomodel');
F0000 test_server SELECT chat.test_server('badkey');
2D000 drain BEGIN; CALL chat.drain();
22004 drain CALL chat.drain(NULL);
42704 reassign_owner SELECT chat.reassign_owner('app', 99999);
42704 create_search_index SELECT chat.create_search_index('none');
EOS

# two that end an operation at the same time
my $elsewhere = '\! psql -X -q -c "SELECT chat.complete_operation('
  . "'00000000-0000-4000-8000-000000000002')\" >/dev/null";
raises($node, "$setup\nBEGIN ISOLATION LEVEL REPEATABLE READ;\n"
	  . "SELECT count(*) FROM chat.chat_task;\n$elsewhere\n",
	"40001 complete_operation SELECT chat.complete_operation(:'operation');");

# inside a tool
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION tool.report() RETURNS boolean LANGUAGE sql AS
	$$ SELECT chat.report_progress(to_jsonb(repeat('x', 4095))) $$;
SET ROLE app;
SELECT chat.register_tool('tool.report');
EOS
my $turn = $node->safe_psql('postgres', <<'EOS');
SET ROLE app;
SELECT chat.stream_chat_completion((chat.create_chat_session()).id, '[[tool=report]]');
EOS
wait_for_task($node, $turn);
is( row($node,
		"SELECT result::json->>'code' AS code FROM chat.chat_tool_call WHERE task_id = '$turn'"
	)->{code},
	'54000',
	'report_progress: 54000: in a tool');
ok(is_given('report_progress', '54000'), 'the reference gives it');
$raised{report_progress}{54000} = 1;

# no place for a worker
$node->stop;
$node->append_conf('postgresql.conf', 'max_worker_processes = 1');
$node->start;
raises($node, '', "55000 ask CALL chat.ask('x');");

# no library
$node->append_conf('postgresql.conf', "shared_preload_libraries = ''");
$node->restart;
raises($node, $setup, <<'EOS');
55000 wait_task_events SELECT chat.wait_task_events(:'none');
EOS

foreach my $name (sort keys %reference)
{
	my @rest = grep { !$raised{$name}{$_} } sort keys %{ $reference{$name}{codes} };
	is_deeply(\@rest, [], "all codes of the reference were seen: $name");
}

done_testing();
