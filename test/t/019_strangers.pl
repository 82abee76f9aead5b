# Is a session that may not be seen the same, in every function, as one that
# does not exist?  All functions that take a session or a task are found in the
# catalog; each is called about one that is there and one that is not, by a role
# without rights and by the owner's role in the name of another user.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Tools;
use Test::More;

my $fake = start_fake();
my $node = tool_cluster($fake);
my $unknown = '00000000-0000-4000-8000-00000000dead';

# ann's session: a turn that is over, one whose calls wait for the application
# and for approval, and one that was put aside
register($node, 'ann', kind => 'client', name => 'pick');
register($node, 'ann', kind => 'client', name => 'danger', approval => 'ask');
as_role($node, 'ann', "SELECT chat.set_prompt('p', 'Be brief.')");
my $session = create_session($node, owner => 'ann', user_id => 'ada',
	settings => '{"prompt": "p"}')->{id};
wait_for_task($node, ask($node, $session, 'secret [[tokens=2]]'));
my $task = ask($node, $session,
	'secret, too [[tool=pick args={} id=c1 tool=danger args={} id=c2]]');
wait_for($node, "SELECT status = 'waiting' FROM chat.chat_task WHERE id = '$task'");
my $poisoned = '00000000-0000-4000-8000-0000000000bd';
$node->safe_psql('postgres', <<EOS);
INSERT INTO chat.chat_task (id, session_id, server, status, finished_at, error)
VALUES ('$poisoned', '$session', 'fake', 'failed', now(),
	'{"code": "limit_reached", "crashes": 3}')
EOS
$node->safe_psql('postgres', <<'EOS');
-- what a call returns or raises
CREATE FUNCTION public.outcome(call text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	result text;
	detail text;
	hint text;
BEGIN
	EXECUTE format('SELECT json_agg(to_json(r)) FROM %s AS r', call) INTO result;
	RETURN coalesce(result, 'no rows');
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
	RETURN concat_ws(' / ', SQLSTATE, SQLERRM, detail, hint);
END
$$;
EOS

# the arguments without a default that are neither session nor task, and those
# that lead to a place where something could be told
my %value = (
	after_seq => 0,
	content => "'x'",
	message => "'x'",
	messages => q('[{"role": "user"}]'),
	new_content => "'x'",
	role => "'user'",
	sequence => 1,
	title => "'x'",
	tool_call_id => "'c1'",
	user_id => "'ada'");
my %special = (
	approve_tool_call => { tool_call_id => "'c2'" },
	deny_tool_call => { tool_call_id => "'c2'" },
	edit_message => { sequence => 3 },
	rerun_job => { task_id => $poisoned },
	wait_task_events => { timeout => "'0 s'" });
# session_id is the one that they create; ask() is no function
my %other = map { $_ => 1 } qw(create_chat_session import_chat_session ask);

my @functions = rows($node, <<'EOS');
SELECT p.proname AS name, p.pronargs - p.pronargdefaults AS required,
	p.proargnames[1:p.pronargs] AS names
FROM pg_proc AS p
WHERE p.pronamespace = 'chat'::regnamespace
	AND p.proargnames[1:p.pronargs] && '{session_id,task_id}'
	AND has_function_privilege('bob', p.oid, 'EXECUTE')
ORDER BY p.proname
EOS
@functions = grep { !$other{ $_->{name} } } @functions;
cmp_ok(scalar @functions, '>', 30, 'the functions are found');

# Returns the calls of a function about the session and task that are there, or
# those that are not: with the arguments that it needs, and with a user.
sub calls_of
{
	my ($function, $known) = @_;
	my %of = %{ $special{ $function->{name} } // {} };
	my %id = (
		session_id => $known ? $session : $unknown,
		task_id => $known ? delete $of{task_id} // $task : $unknown);
	my $n = 0;
	my @needed;
	delete $of{task_id};
	foreach my $name (@{ $function->{names} })
	{
		$n++;
		my $value = $id{$name} ? "'$id{$name}'" : $of{$name};
		$value //= $value{$name} if $n <= $function->{required};
		push @needed, "$name => $value" if defined $value;
	}
	my @calls = "chat.$function->{name}(" . join(', ', @needed) . ')';
	push @calls, $calls[0] =~ s/\)$/, user_id => 'ada')/r
	  if $calls[0] !~ /user_id/ && grep { $_ eq 'user_id' } @{ $function->{names} };
	return @calls;
}

# Returns what calls come to, each undone, with ids taken out.
sub outcomes
{
	my ($setup, @calls) = @_;
	my $out = $node->safe_psql('postgres', join "\n", $setup,
		map { "BEGIN; SELECT 'outcome ' || public.outcome(" . literal($_) . '); ROLLBACK;' } @calls);

	$out =~ s/\Q$_\E/ID/g foreach $session, $task, $poisoned, $unknown;
	return [ $out =~ /^outcome (.*)$/mg ];
}

my @known = map { calls_of($_, 1) } @functions;
my @none = map { calls_of($_, 0) } @functions;
my @names = map { s/'[0-9a-f-]{36}'/ID/gr } @none;
my $digest = 'SELECT (SELECT md5(string_agg(m::text, \'\' ORDER BY m.sequence)) FROM chat.chat_message AS m),'
  . ' (SELECT md5(string_agg(s::text, \'\' ORDER BY s.id)) FROM chat.chat_session AS s),'
  . ' (SELECT md5(string_agg(t::text, \'\' ORDER BY t.place)) FROM chat.chat_task AS t),'
  . ' (SELECT count(*) FROM chat.chat_job)';
my $before = $node->safe_psql('postgres', $digest);

my $nothing = outcomes('SET ROLE ann;', @none);
is(scalar @$nothing, scalar @none, 'each call has an outcome');
foreach my $who (
	[ 'a role without rights', 'SET ROLE bob;' ],
	[ 'the role, for another user', "SET ROLE ann; SET chat.user_id = 'eve';" ])
{
	my ($title, $setup) = @$who;
	my $seen = outcomes($setup, @known);

	is($seen->[$_], $nothing->[$_], "$title: $names[$_]") foreach 0 .. $#known;
}
is($node->safe_psql('postgres', $digest), $before, 'and nothing was written');

# the test could fail: to its owner each of the calls tells something
my $owners = outcomes('SET ROLE ann;', @known);
isnt($owners->[$_], $nothing->[$_], "its owner: $names[$_]") foreach 0 .. $#known;

# ask(), which cannot be called by a function
my @asked;
foreach my $id ($session, $unknown)
{
	my ($rc, $out, $err) = $node->psql('postgres',
		"\\set VERBOSITY verbose\nSET ROLE bob; CALL chat.ask('x', '$id');");
	push @asked, $err =~ s/\Q$id\E/ID/gr =~ s/^psql:.*?: //mgr;
}
like($asked[0], qr/ERROR:  P0002: session does not exist/, 'ask() finds none');
is($asked[0], $asked[1], 'as if there was none');

# except a chosen id that is taken, about which no more is told
is_deeply(
	outcomes('SET ROLE bob;',
		"chat.create_chat_session(session_id => '$session')",
		"chat.upsert_chat_session(session => '{\"session_id\": \"$session\"}')",
		"chat.import_chat_session(document => '{}', session_id => '$session')"),
	[ ('23505 / session id is taken /  / ') x 3 ],
	'an id that is taken: unique_violation without detail');

# nor is anything told by the tables and views
my @relations = map { $_->{name} } rows($node, <<'EOS');
SELECT c.oid::regclass::text AS name
FROM pg_class AS c
WHERE c.relnamespace = 'chat'::regnamespace
	AND has_table_privilege('bob', c.oid, 'SELECT')
	AND EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = c.oid
		AND a.attname IN ('session_id', 'task_id', 'channel'))
ORDER BY 1
EOS
cmp_ok(scalar @relations, '>', 5, 'tables and views are found');
foreach my $who ('SET ROLE bob;', "SET ROLE ann; SET chat.user_id = 'eve';")
{
	is($node->safe_psql('postgres', "$who SELECT count(*) FROM $_"),
		0, "$who no row of $_")
	  foreach @relations;
}

done_testing();
