# Does what README.md shows work, and is what exists in it?
#
# Every fenced block is run, or parsed where there is nothing to run it with:
#
#	console		psql's side of a dialogue, with the output compared
#	sql			statements that must succeed
#	ini			settings, added to those of the cluster
#	python, js	programs; a text block behind one is its output.  Without
#				psycopg, or node and pg, they are only parsed
#	sh			commands of an administrator, see ChatTest::Machine
#
# Blocks run in the order of the document, on a cluster that has heard nothing
# of chat: what its installation says is what installs it.  They run in
# database chat, those of chapter Recipes in one of their own.
# <!-- answer: ... --> above a block is what the
# endpoint answers while it runs; <!-- call: NAME ARGUMENTS --> above that, which
# tool it calls before; the address of OpenAI and the keys' files are
# those of the bundled endpoint.  Ids, times and versions are not compared.
#
# README_OUT=file writes the README with the output that was seen, so that
# nobody has to type it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Machine;
use IPC::Run ();
use PostgreSQL::Test::Utils;
use Test::More;

my $root = "$FindBin::RealBin/../..";
my @languages = qw(console ini js python sh sql text);

# Reads the document into lines and blocks: language, first line (the number of
# the line behind the fence), lines, chapter, answer.
sub read_document
{
	my ($text) = @_;
	my (@blocks, $block, $chapter, $answer, $call);
	my $number = 0;

	foreach my $line (split /\n/, $text)
	{
		$number++;
		if ($block)
		{
			if ($line eq '```')
			{
				push @blocks, $block;
				undef $block;
			}
			else
			{
				push @{ $block->{lines} }, $line;
			}
		}
		elsif ($line =~ /^ *```(.*)$/)
		{
			$block = {
				language => $1,
				line => $number,
				lines => [],
				chapter => $chapter,
				answer => $answer,
				call => $call
			};
			undef $answer;
			undef $call;
		}
		elsif ($line =~ /^## (.*)/)
		{
			$chapter = $1;
		}
		elsif ($line =~ /^<!-- answer: (.*) -->$/)
		{
			$answer = $1;
		}
		elsif ($line =~ /^<!-- call: (.*) -->$/)
		{
			$call = $1;
		}
	}
	die "README.md:$block->{line}: the block has no end\n" if $block;
	return @blocks;
}

# Splits a dialogue with psql into commands, each with its output.
sub read_dialogue
{
	my ($block) = @_;
	my @commands;

	foreach my $line (@{ $block->{lines} })
	{
		if ($line =~ /^\w+=\*?[#>] (.*)$/)
		{
			push @commands, { input => $1, shown => [$line], output => [] };
		}
		elsif (@commands && $line =~ /^\w+[-('"]\*?[#>] (.*)$/)
		{
			$commands[-1]{input} .= "\n$1";
			push @{ $commands[-1]{shown} }, $line;
		}
		elsif (@commands)
		{
			push @{ $commands[-1]{output} }, $line;
		}
		else
		{
			die "README.md:$block->{line}: the block starts without a prompt\n";
		}
	}
	return @commands;
}

# Takes out what differs from run to run, and the width of columns with it.
sub mask
{
	my ($text) = @_;

	$text =~ s/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/ID/g;
	$text =~ s/\bchat_[0-9a-f]{32}\b/CHANNEL/g;
	$text =~ s/\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?([+-]\d\d(:\d\d)?)?/TIME/g;
	$text =~ s/\b(PID|process) \d+/$1 N/g;
	$text =~ s/as user ".*?"/as user U/g;
	# these depend on the machine
	$text =~ s/^ (server_version|libcurl|descriptors)\b.*$/ $1/mg;
	$text =~ s/-+/-/g;
	$text =~ s/ +/ /g;
	$text =~ s/ $//mg;
	$text =~ s/\n+\z/\n/;
	return $text;
}

# Splits notifications off lines of output.
sub split_notices
{
	my (@lines) = @_;
	my @notices = grep { /^Asynchronous notification/ } @lines;

	return ([ grep { !/^Asynchronous notification/ } @lines ], \@notices);
}

# Renders notifications so that they can be compared: how deltas are cut
# depends on time, and with it how many events there are, and when the title
# comes.
sub mask_notices
{
	my (@events, @titles);

	foreach my $line (@_)
	{
		my ($payload) = $line =~ /with payload "(.*)" received/;
		my $event = decode($payload);

		delete $event->{seq};
		if ($event->{type} eq 'data-title')
		{
			push @titles, $event;
			next;
		}
		if (   @events
			&& defined $event->{delta}
			&& $events[-1]{type} eq $event->{type}
			&& $events[-1]{id} eq $event->{id})
		{
			$events[-1]{delta} .= $event->{delta};
			next;
		}
		push @events, $event;
	}
	return join '', map { mask(encode($_)) . "\n" } @events, @titles;
}

my $text = slurp_file("$root/README.md");
my @blocks = read_document($text);
my $fake = start_fake('--delay', 20);
my %variables;
my $node = chat_cluster('readme', start => 0, extension => 0);
my $machine = ChatTest::Machine->new($node, $root);
my $url = 'http://127.0.0.1:' . $fake->port . '/v1';
my @places = (
	[ 'https://api.openai.com/v1', $url ],
	[ 'https://warehouse.example.com', $url =~ s/v1$/tools/r ],
	map { [ $_, $machine->path($_) ] }
	  map { "/etc/postgresql/$_.key" } qw(openai warehouse));

append_to_file($machine->path('/etc/postgresql/warehouse.key'), "sk-test\n");
$node->start;
is($node->safe_psql('postgres', 'SHOW shared_preload_libraries'),
	'', 'the cluster has heard nothing of chat');

# Runs a script in psql; returns all that it prints.
sub run_psql
{
	my ($database, $script) = @_;
	my $name = "$PostgreSQL::Test::Utils::tmp_check/readme";

	foreach my $place (@places)
	{
		$script =~ s/\Q$place->[0]\E/$place->[1]/g if $database eq 'chat';
	}
	unlink "$name.sql", "$name.out";
	append_to_file("$name.sql", $script);
	local %ENV = (
		%ENV,
		PGHOST => $node->host,
		PGPORT => $node->port,
		PGDATABASE => $database);
	my @define = map { ('-v', "$_=$variables{$_}") } sort keys %variables;
	open my $saved, '>&', \*STDOUT or die $!;
	open my $saved_err, '>&', \*STDERR or die $!;
	open STDOUT, '>', "$name.out" or die $!;
	open STDERR, '>&', \*STDOUT or die $!;
	system 'psql', '-X', @define, '-f', "$name.sql";
	open STDOUT, '>&', $saved or die $!;
	open STDERR, '>&', $saved_err or die $!;
	my $out = slurp_file("$name.out");
	$out =~ s/^psql:[^ ]*?:\d+: //mg;
	foreach my $place (@places)
	{
		$out =~ s/\Q$place->[1]\E/$place->[0]/g;
	}
	return $out;
}

# Returns text as a value of a directive of the endpoint.
sub percent
{
	my ($text) = @_;
	return $text =~ s/([^\w.,!?'-])/sprintf '%%%02x', ord $1/ger;
}

# Has the endpoint give an answer, whatever is asked, or call a tool before.
sub set_answer
{
	my ($answer, $call) = @_;
	my ($tool, $arguments) = split / /, $call // '', 2;
	my $text = '[[text=' . percent($answer) . ']]';

	$text .= "[[at=0 tool=$tool args=" . percent($arguments) . ']]' if $tool;
	my $body = encode({ fake => $text });
	my $verb =
	  $node->safe_psql('chat',
		"SELECT 1 FROM pg_foreign_server WHERE srvoptions::text LIKE '%extra_body%'")
	  ? 'SET' : 'ADD';

	$node->safe_psql('chat',
		"ALTER SERVER openai OPTIONS ($verb extra_body " . literal($body) . ')');
	return;
}

# Waits, in psql, until no task and no title is left to do; what is printed
# meanwhile is shown behind the next command, as it is to somebody who types
# slowly.
my $wait = "DO 'BEGIN PERFORM public.readme_wait(); END';\n";
my $wait_function = <<'EOS';
CREATE OR REPLACE FUNCTION public.readme_wait() RETURNS void SECURITY DEFINER
LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. 18000 LOOP
		IF NOT EXISTS (SELECT FROM chat.chat_task AS t
				WHERE status NOT IN ('completed', 'failed', 'cancelled')
				-- unless somebody else has to end its operations
				AND NOT EXISTS (SELECT FROM chat.chat_job AS j
					WHERE j.task_id = t.id AND j.parked AND j.holder IS NULL
					AND j.run_at > now()
					AND NOT EXISTS (SELECT FROM chat.chat_job AS k
						WHERE k.task_id = t.id AND k.kind = 'tool')))
			AND NOT EXISTS (SELECT FROM chat.chat_job
				WHERE kind IN ('title', 'notice')) THEN
			RETURN;
		END IF;
		PERFORM pg_sleep(0.01);
	END LOOP;
	RAISE 'the tasks do not end';
END
$$;
EOS

# Runs a dialogue; adds to each command what psql has printed.
sub run_dialogue
{
	my (@commands) = @_;
	my ($script, $open, $called, %set) = ('', 0, 0);
	my $i = 0;

	foreach my $command (@commands)
	{
		my $input = $command->{input};

		$script .= "\\echo @@ $i\n$input\n";
		$i++;
		$open = 1 if $input =~ /^BEGIN\b/i;
		$open = 0 if $input =~ /^(COMMIT|ROLLBACK)\b/i;
		$called = 1 if $input =~ /stream_chat_completion|complete_operation/;
		if ($called && !$open)
		{
			$script .= "\\echo @@ w\n$wait";
			$called = 0;
		}
		if ($input =~ /\\gset\b/)
		{
			$set{$1} = 1 while $input =~ /(?:\bAS |, )(\w+)(?=[,\s])/g;
		}
	}
	$script .= "\\echo @@ v $_ :$_\n" foreach sort keys %set;

	my ($at, $last, @waited) = ('', 0);
	foreach my $line (split(/\n/, run_psql('chat', $script)), '@@ end')
	{
		if ($line =~ /^@@ (\w+)(?: (\w+) (.*))?$/)
		{
			# what came while the test waited is shown behind a command
			push @{ $commands[$last]{seen} }, splice @waited if $at eq $last;
			$at = $1;
			$last = $at if $at =~ /^\d/;
			$variables{$2} = $3 if $at eq 'v' && $3 ne ":$2";
		}
		elsif ($at =~ /^\d/)
		{
			push @{ $commands[$at]{seen} }, $line;
		}
		elsif ($at eq 'w' && $line ne 'DO')
		{
			push @waited, $line;
		}
	}
	push @{ $commands[$last]{seen} }, @waited;
	return;
}

# Compares a dialogue's output with what the README shows.
sub test_dialogue
{
	my ($block) = @_;
	my @commands = read_dialogue($block);
	my (@shown, @seen);

	$node->safe_psql('chat', $wait_function);
	run_dialogue(@commands);
	foreach my $command (@commands)
	{
		my ($title) = "line $block->{line}: $command->{input}" =~ /(.*)/;
		my ($shown, $shown_notices) = split_notices(@{ $command->{output} });
		my ($seen, $seen_notices) = split_notices(@{ $command->{seen} || [] });

		push @shown, @$shown_notices;
		push @seen, @$seen_notices;
		is( mask(join "\n", @$seen, ''),
			mask(join "\n", @$shown, ''),
			"run in psql, output compared: $title");
	}
	is(mask_notices(@seen), mask_notices(@shown),
		"line $block->{line}: notifications compared")
	  if @shown || @seen;
	$block->{seen} = [
		(map {
			@{ $_->{shown} },
			  grep { !/^Asynchronous/ } @{ $_->{seen} || [] }
		  } @commands),
		@seen
	];
	return;
}

# Runs statements that must succeed.
my $recipes_made;

sub test_sql
{
	my ($block) = @_;
	my $recipe = $block->{chapter} eq 'Recipes';
	my $database = $recipe ? 'recipes' : 'chat';

	if ($recipe && !$recipes_made++)
	{
		$node->safe_psql('postgres', 'CREATE DATABASE recipes');
		$node->safe_psql('recipes', 'CREATE EXTENSION chat');
	}
	my $out = run_psql($database, join "\n", @{ $block->{lines} }, '');

	unlike($out, qr/^(ERROR|FATAL|WARNING)/m,
		"run in psql: line $block->{line}: $block->{lines}[0]")
	  or diag($out);
	return;
}

# Runs a program of the README; returns its output.
sub run_program
{
	my ($file, @command) = @_;
	local %ENV = (
		%ENV,
		PGHOST => $node->host,
		PGPORT => $node->port,
		PGUSER => scalar getpwuid $<);
	my ($out, $err) = ('', '');
	my $timeout = IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default);

	ok( eval {
			IPC::Run::run([ @command, $file ], '>', \$out, '2>', \$err,
				$timeout);
		},
		"$command[0] runs the program") or diag($@, $err);
	return $out;
}

# Returns the first of some commands that succeeds with these arguments.
sub find_program
{
	my ($names, @args) = @_;

	foreach my $name (@$names)
	{
		my ($out, $err);
		return $name
		  if eval { IPC::Run::run([ $name, @args ], '>', \$out, '2>', \$err) };
	}
	return;
}

# Runs a program, or has it parsed where its library is missing.
sub test_program
{
	my ($block, $output, $suffix, $run, $parse) = @_;
	my $file = "$PostgreSQL::Test::Utils::tmp_check/readme.$suffix";
	my $title = "line $block->{line}, $block->{language}";

	unlink $file;
	append_to_file($file, join "\n", @{ $block->{lines} }, '');
	if ($run)
	{
		my $out = run_program($file, @$run);
		is( $out,
			join("\n", @{ $output->{lines} }, ''),
			"$title: run, output compared");
	}
	elsif ($parse)
	{
		ok( eval { IPC::Run::run([ @$parse, $file ]) },
			"$title: only parsed, its library is missing");
	}
	else
	{
	  SKIP: { skip "$title: neither run nor parsed, it is not installed", 1; }
	}
	return;
}

# Runs commands of a shell, which must succeed.
sub test_sh
{
	my ($block) = @_;
	my ($rc, $out) = $machine->run(join "\n", @{ $block->{lines} }, '');

	is($rc, 0, "run in sh: line $block->{line}: $block->{lines}[0]")
	  or diag($out);
	return;
}

# Adds settings to those of the cluster; the next restart takes them.
sub test_ini
{
	my ($block) = @_;

	$node->append_conf('postgresql.conf', join "\n", @{ $block->{lines} });
	pass("settings added: line $block->{line}: $block->{lines}[0]");
	return;
}

my @python = ('python3', '/usr/bin/python3');
my $psycopg = find_program(\@python, '-c', 'import psycopg');
my $python = find_program(\@python, '-c', '0');
my $pg = find_program(['node'], '-e', 'require("pg")');
my $nodejs = find_program(['node'], '-e', '0');
# neither npm's packages nor Debian's are where another node looks for them
$ENV{NODE_PATH} //= join ':',
  (map { "$_/node_modules" } grep { $_ } $ENV{CHAT_NPM}), '/usr/share/nodejs';
$pg ||= find_program(['node'], '-e', 'require("pg")');

while (my ($i, $block) = each @blocks)
{
	my $language = $block->{language};
	my $output = $blocks[ $i + 1 ];

	set_answer($block->{answer}, $block->{call}) if defined $block->{answer};
	if ($language eq 'console')
	{
		test_dialogue($block);
	}
	elsif ($language eq 'sql')
	{
		test_sql($block);
	}
	elsif ($language eq 'sh')
	{
		test_sh($block);
	}
	elsif ($language eq 'ini')
	{
		test_ini($block);
	}
	elsif ($language eq 'python')
	{
		test_program($block, $output, 'py', $psycopg && [$psycopg],
			$python && [ $python, '-m', 'py_compile' ]);
	}
	elsif ($language eq 'js')
	{
		test_program($block, $output, 'js', $pg && [$pg],
			$nodejs && [ $nodejs, '--check' ]);
	}
	else
	{
		ok((grep { $_ eq $language } @languages),
			"line $block->{line}: \"$language\" is a language of this test");
	}
}

# the recipes' servers can be used as they are
my @recipes = rows($node, <<'EOS', 'recipes');
SELECT item, ok, detail FROM chat.check_installation()
WHERE item LIKE 'server %'
EOS
my @wanted = grep { $_->{chapter} eq 'Recipes' } @blocks;
is(scalar @recipes, scalar @wanted, 'every recipe makes a server');
ok($_->{ok}, "recipe: $_->{item}, $_->{detail}") foreach @recipes;

#
# What exists is in the document
#

# functions, as the catalog describes them
my @functions = rows($node, <<'EOS', 'chat');
SELECT p.proname AS name,
	p.proname || '('
		|| regexp_replace(pg_get_function_arguments(p.oid),
			'::[a-z ]+(\[\])?', '', 'g') || ')'
		|| coalesce(' → ' || replace(pg_get_function_result(p.oid), 'chat.', ''), '')
		AS signature
FROM pg_proc AS p
	JOIN pg_depend AS d ON d.objid = p.oid
		AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e'
	JOIN pg_extension AS e ON e.oid = d.refobjid AND e.extname = 'chat'
WHERE p.prorettype <> 'trigger'::regtype AND p.proname !~ '_validator$'
ORDER BY p.proname
EOS
my $characters = $text;
utf8::decode($characters);
foreach my $function (@functions)
{
	ok(index($characters, "\n`$function->{signature}`\n") >= 0,
		"described as it is: $function->{name}")
	  or diag("the line would be: `$function->{signature}`");
}

# and whether grant_usage() grants them
my %granted = map { $_->{name} => 1 } rows($node, <<'EOS', 'chat');
SELECT substring(o FROM '^EXECUTE ON ROUTINE chat\.(\w+)') AS name
FROM chat.usage_objects() AS o
EOS
my ($reference) = $text =~ /^## Functions\n(.*?)^## /ms;
my (undef, %described) = split /^`(\w+)\(.*\n/m, $reference;
foreach my $function (@functions)
{
	my $name = $function->{name};
	is( ($described{$name} // '') =~ /Not\s+granted\s+to\s+anybody/ ? 0 : 1,
		$granted{$name} // 0,
		"granted, or not, as described: $name");
}

# the data functions are called in some block, with named arguments
foreach my $name (
	qw(create_chat_session get_chat_session get_chat_messages
	upsert_chat_session update_chat_session update_session_title
	assign_user_to_session add_chat_message add_chat_messages_batch
	get_user_chat_sessions get_user_session_count delete_chat_session
	get_chat_session_message_count update_tool_message_content
	to_openai_messages))
{
	my @calls = map {
		my $code = join "\n", map { s/^\w+.?\*?[#>] //r } @{ $_->{lines} };
		$code =~ /\bchat\.$name\(\s*(\w+ =>)?/g ? $1 // '' : ()
	} grep { $_->{language} eq 'console' } @blocks;
	ok(@calls && !(grep { $_ eq '' } @calls),
		"$name is called with named arguments");
}

# views
foreach my $view (rows($node, <<'EOS', 'chat'))
SELECT viewname AS name FROM pg_views WHERE schemaname = 'chat'
EOS
{
	ok($text =~ /`$view->{name}`/, "view $view->{name} is described");
}

# columns of the tables, and no table left out
my %chapter = $characters =~ /^## ([^\n]*)\n(.*?)(?=^## |\z)/msg;
foreach my $table (rows($node, <<'EOS', 'chat'))
SELECT c.relname AS name, array_agg(a.attname ORDER BY a.attnum) AS columns
FROM pg_class AS c
	JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0
		AND NOT a.attisdropped
WHERE c.relnamespace = 'chat'::regnamespace
	AND (c.relkind IN ('r', 'p') AND NOT c.relispartition OR c.relname = 'usage')
GROUP BY c.relname ORDER BY c.relname
EOS
{
	my ($row) = $chapter{Tables} =~ /^\| [^|]*`$table->{name}`(.*)/m;
	ok($row, "table $table->{name} is described") or next;
	# those of chat_tool are the arguments of its function
	next if $row =~ /for the worker alone/ || $table->{name} eq 'chat_tool';
	my @missing = grep { $row !~ /`$_`/ } @{ $table->{columns} };
	is_deeply(\@missing, [], "with its columns: $table->{name}");
}

# types of events: those that came, and those that stand in the source
my %types = map { $_->{type} => 1 } rows($node,
	"SELECT DISTINCT payload->>'type' AS type FROM chat.chat_event", 'chat');
foreach my $file (glob "$root/src/*.[ch]")
{
	my $source = slurp_file($file) =~ s/"\s*\n\s*"//gr;
	$types{$1} = 1 while $source =~ /\{\\"type\\":\\"([a-z]+-[a-z-]+)\\"/g;
}
my ($events) = $text =~ /^## Events\n(.*?)^## /ms;
# parts of UIMessages
delete @types{qw(dynamic-tool step-start)};
cmp_ok(scalar keys %types, '>', 15, 'there are events');
foreach my $type (sort keys %types)
{
	like($events, qr/^\| `$type` \|/m, "event $type is described");
}

# members of those that came
my %members;
foreach my $row (rows($node, <<'EOS', 'chat'))
SELECT DISTINCT payload->>'type' AS type, k.name
FROM chat.chat_event AS e, json_object_keys(e.payload) AS k (name)
EOS
{
	$members{ $row->{type} }{ $row->{name} } = 1;
}
foreach my $type (sort keys %members)
{
	my ($row) = $events =~ /^\| `$type` \|([^|]*)\|/m;
	my @missing = grep { $row !~ /`$_`/ } grep { !/^(?:type|taskId|seq)$/ }
	  sort keys %{ $members{$type} };
	is_deeply(\@missing, [], "with its members: event $type");
}

# messages that the last resort is to look up are those that there are
my $sources = join '', map { slurp_file($_) } glob "$root/src/*.c";
my ($trouble) = $text =~ /^## Troubleshooting\n(.*?)^## /ms;
foreach my $message ($trouble =~ /^\| (?:WARNING )?`(?:ERROR: )?([^`]+)` \|/mg)
{
	# the server's own
	next if $message =~ /^permission denied for schema|^cannot drop extension/;
	like($sources, qr/"[^"]*\Q$message\E/, "there is a message: $message");
}

# settings
my %documented =
  map { $_->[0] => $_ }
  map { [ /^\| `(chat\.\w+)` \| (\S*) ?\| (\S*) ?\| (\S+) \|/ ] }
  grep { /^\| `chat\.\w+` \|.*\|.*\|.*\|/ } split /\n/, $text;
my @settings = rows($node, <<'EOS', 'chat');
SELECT name, boot_val, unit, context FROM pg_settings
WHERE name LIKE 'chat.%' ORDER BY name
EOS
is_deeply(
	[ map { $documented{$_} } sort keys %documented ],
	[
		map {
			[ $_->{name}, map { $_ // '' } @$_{qw(boot_val unit context)} ]
		} @settings
	],
	'the table of settings is that of the server');

# error codes
my %codes = slurp_file("$root/src/openai.c") =~
  /^\t\[CHAT_ERROR_\w+\] = \{\s*"(\w+)",\s*(true|false)\s*\}/mg;
$codes{$_} = $codes{$_} eq 'true' ? 'yes' : 'no' foreach keys %codes;
$codes{endpoint_error} = 'by status';
my ($errors) = $text =~ /^## Errors\n(.*?)^## /ms;
is_deeply({ $errors =~ /^\| `(\w+)` \| (yes|no|by status) \|/mg },
	\%codes, 'the table of errors is the closed list');

# codes of the results of tools
my $tools = join '', map { slurp_file("$root/src/$_.c") }
  qw(tool toolworker turn httptool operation queue);
my $call = qr/\b(?:chat_tool_error|error_result|outcome_text|end_call)\(/;
my %tool_codes = map { $_ => 1 } grep { defined }
  $tools =~ /$call(?:[^;{"]|"[^"]*")*?,\s*"([a-z_]+)"(?:, NULL)?\)/g,
  $tools =~ /'code',\s+(?:'(\w+)'|CASE status WHEN 'denied' THEN '(\w+)'"\s+"\s*ELSE '(\w+)')/g;
my ($tool_errors) = $errors =~ /^The result of a tool call(.*)/ms;
is_deeply(
	[ sort $tool_errors =~ /^\| `([a-z_]+)` \|/mg ],
	[ sort keys %tool_codes ],
	'the table of errors of tools is that of the source');

# names that are told to somebody who got one wrong: where they stand
foreach my $names (
	[ "create_chat_session(settings => '{\"x\": 1}')", 'Server options' ],
	[ "upsert_chat_session('{\"x\": 1}')", 'Functions' ],
	[ "add_chat_messages_batch((chat.create_chat_session()).id, '[{\"x\": 1}]')", 'Functions' ])
{
	my ($call, $where) = @$names;
	my ($rc, $out, $err) = $node->psql('chat', "SELECT chat.$call");
	my ($valid) = $err =~ /Valid are: (.*)\./;
	my @missing = grep { $chapter{$where} !~ /[`"]$_[`"]/ } split /, /, $valid // '-';

	is_deeply(\@missing, [], "its valid names are in \"$where\": $call");
}

# options
foreach my $command (
	'CREATE SERVER x FOREIGN DATA WRAPPER chat_llm OPTIONS (x \'\')',
	'CREATE SERVER x FOREIGN DATA WRAPPER chat_tool OPTIONS (x \'\')',
	'CREATE SERVER x FOREIGN DATA WRAPPER chat_langfuse OPTIONS (x \'\')',
	'CREATE USER MAPPING FOR CURRENT_USER SERVER openai OPTIONS (x \'\')',
	'CREATE USER MAPPING FOR CURRENT_USER SERVER langfuse OPTIONS (x \'\')')
{
	my ($rc, $out, $err) = $node->psql('chat', $command);
	my ($valid) = $err =~ /Valid options in this context are: (.*)\./;
	my ($chapter) = $text =~ /^## Server options\n(.*?)^### Session/ms;

	ok($valid, "the valid options are listed: $command");

	foreach my $option (split /, /, $valid // '')
	{
		like($chapter, qr/`$option`/, "option $option is described");
	}
}

# what takes the place of another product's functions
my ($coming) = $text =~ /^## Coming from .*?\n(.*?)^## /ms;
my $known = "$reference $chapter{'Server options'} $chapter{Tables}";
foreach my $word ($coming =~ /^\|.*\| (.*) \|$/mg)
{
	foreach my $name ($word =~ /`(\w+)`/g)
	{
		next if $name eq 'UNLISTEN' || $name =~ /^(?:limit|offset)$/;
		ok($known =~ /\b$name\b/, "there is what takes over: $name");
	}
}

# what else is named: goals of make, and files
my $makefile = slurp_file("$root/Makefile");
my %goals = map { $_ => 1 } qw(clean install installcheck),
  map { split } $makefile =~ /^FRONT = (.*)$/m;
foreach my $goal ($text =~ /`make (?!\w+=)(\w[\w-]*)/g)
{
	ok($goals{$goal}, "make $goal is a goal of the Makefile");
}
foreach my $file ($text =~ m{\]\(([^#)][^):]*)\)}g, $text =~ m{\b(test/[\w/.]*\w)}g)
{
	ok(-e "$root/$file" || $file eq 'LICENSE', "there is a file: $file");
}

# links
my @broken = grep { index(anchors(), " $_ ") < 0 }
  $text =~ /\]\((#[^)]+)\)/g;
is_deeply(\@broken, [], 'links within the document lead somewhere');

# Returns the anchors of all headings.
sub anchors
{
	my @headings = $text =~ /^#+ (.*)$/mg;
	return ' ' . join(' ',
		map { my $a = lc; $a =~ s/[^\w -]//g; $a =~ tr/ /-/; "#$a" } @headings)
	  . ' ';
}

if ($ENV{README_OUT})
{
	my @lines = split /\n/, $text;

	foreach my $block (reverse grep { $_->{seen} } @blocks)
	{
		splice @lines, $block->{line}, scalar @{ $block->{lines} },
		  @{ $block->{seen} };
	}
	unlink $ENV{README_OUT};
	append_to_file($ENV{README_OUT}, join "\n", @lines, '');
}

done_testing();
