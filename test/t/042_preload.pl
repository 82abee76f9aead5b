# Without shared_preload_libraries: do the data functions work, and do the
# runtime's say which line to add where (T67)?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => "shared_preload_libraries = ''");
create_server($node, $fake);

my $session = create_session($node, user_id => 'ada', title => 'a talk')->{id};
$node->safe_psql('postgres',
	"SELECT chat.add_chat_message('$session', 'user', 'hello')");
is( $node->safe_psql('postgres',
		"SELECT chat.get_chat_session_message_count('$session')"),
	1, 'T67: messages are stored and counted');
is( $node->safe_psql('postgres',
		"SELECT chat.get_chat_session('$session')->>'title'"),
	'a talk', 'sessions are read');
is($node->safe_psql('postgres', "SELECT chat.get_user_session_count('ada')"),
	1, 'and found');
foreach my $call ("SELECT chat.stream_chat_completion('$session', 'x')",
	"CALL chat.ask('x', '$session')",
	"SELECT chat.cancel_task('$session')")
{
	my ($ret, $out, $err) = $node->psql('postgres', $call);
	like($err, qr/ERROR: .*not loaded/, "$call: an error");
	like($err,
		qr/HINT: .*shared_preload_libraries = 'chat' to postgresql\.conf/,
		'that says which line to add where');
}
is($node->safe_psql('postgres', 'SELECT count(*) FROM chat.worker_status()'),
	0, 'no worker is listed');
like($node->safe_psql('postgres',
		'SELECT item, cure FROM chat.check_installation() WHERE NOT ok'),
	qr/shared_preload_libraries/, 'check_installation() names the cure');
is( $node->safe_psql('postgres', "SELECT chat.delete_chat_session('$session')"),
	't', 'sessions are deleted');

# the library that comes late knows its settings, but not those of the start
my ($ret, $out, $err) = $node->psql('postgres',
	"LOAD 'chat'; SHOW chat.max_steps; SET chat.nonsense = 1");
like($err, qr/invalid configuration parameter name "chat.nonsense"/,
	'an unknown setting is an error');

# the line is added, the server restarted: the same database runs
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'chat'");
$node->restart;
$session = create_session($node)->{id};
is(wait_for_task($node, ask($node, $session, 'x [[tokens=1]]'))->{status},
	'completed', 'with the line it works');

done_testing();
