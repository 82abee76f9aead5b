# Is the repository consistent: one version, every test listed, nothing
# exported that the server does not look for?

use strict;
use warnings;

use FindBin;
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;

chdir "$FindBin::RealBin/../.." or die "chdir: $!";

# what belongs to the top of it
my @missing = grep { !-s } qw(Makefile chat.control README.md LICENSE CHANGELOG.md
  META.json .gitignore .editorconfig .clang-format .ci/run);
is_deeply(\@missing, [], 'nothing is missing at the top');
like(slurp_file('LICENSE'), qr/PostgreSQL Licen[cs]e/i, 'the licence is PostgreSQL\'s');
ok(-x '.ci/run', 'CI can run');

# the version
my ($version) = slurp_file('chat.control') =~ /^default_version = '([\d.]+)'$/m;
ok($version, 'chat.control has a version');
my $meta = JSON::PP->new->decode(slurp_file('META.json'));
is($meta->{version}, $version, 'META.json: version of the distribution');
is($meta->{provides}{chat}{version},
	$version, 'META.json: version of the extension');
is($meta->{provides}{chat}{file},
	"sql/chat--$version.sql", 'META.json: install script');
ok(-e "sql/chat--$version.sql", 'there is an install script');
like(slurp_file('CHANGELOG.md'),
	qr/^## \Q$version\E /m, 'CHANGELOG.md has an entry');

# every regression test is run and has its output, and the other way round
my ($regress) = slurp_file('Makefile') =~ /^REGRESS = ((?:.*\\\n)*.*)$/m;
my @listed = sort grep { $_ ne '\\' } split ' ', $regress;
my @inputs = sort grep { !/^chat--/ } map { m{sql/(.*)\.sql} } glob 'sql/*.sql';
my @outputs = sort grep { !/_\d$/ } map { m{expected/(.*)\.out} }
  glob 'expected/*.out';
is_deeply(\@inputs, \@listed, 'regression tests in sql/ are in REGRESS');
is_deeply(\@outputs, \@listed, 'regression tests have their output');
my @specs = map { m{specs/(.*)\.spec} } glob 'test/isolation/specs/*.spec';
my @results = grep { !/_\d$/ } map { m{expected/(.*)\.out} }
  glob 'test/isolation/expected/*.out';
is_deeply(\@results, \@specs, 'isolation specs have their output');

# exported symbols: what CREATE FUNCTION names, what processes start in, and
# what a module must have
my $library = $ENV{CHAT_LIBRARY};
if (!$library)
{
	chomp(my $dir = `pg_config --pkglibdir`);
	$library = "$dir/chat.so";
}
my @exported = map { (split)[2] } grep { / [TBDRVW] / }
  split /\n/, `nm -D --defined-only '$library'`;
my %wanted = map { $_ => 1 } qw(Pg_magic_func _PG_init);
foreach my $file (glob 'src/*.c')
{
	my $source = slurp_file($file);
	while ($source =~ /^PG_FUNCTION_INFO_V1\((\w+)\)/mg)
	{
		@wanted{ $1, "pg_finfo_$1" } = (1, 1);
	}
}
foreach my $file (glob 'src/*.h')
{
	my $source = slurp_file($file);
	$wanted{$1} = 1 while $source =~ /^extern PGDLLEXPORT void (\w+)\(/mg;
}
ok(@exported > 0, 'the library exports something');
is_deeply([ sort @exported ], [ sort keys %wanted ],
	'it exports what the server looks up and nothing else');

# C functions of the install script are there
my $script = slurp_file("sql/chat--$version.sql");
my %symbols;
$symbols{$1} = 1 while $script =~ /'MODULE_PATHNAME',\s*'(\w+)'/g;
is_deeply([ grep { !$wanted{$_} } sort keys %symbols ],
	[], 'the install script names no C function that is missing');

# all differences between versions stand in compat.h
my @elsewhere = grep {
	$_ ne 'src/compat.h'
	  && slurp_file($_) =~ /^\s*#\s*(?:el)?if.*(?:PG_VERSION|CURL_VERSION)/m
} glob 'src/*.[ch]';
is_deeply(\@elsewhere, [], 'versions are told apart in compat.h only');

# the fake endpoint, the load generator and their kin share no source with us
my @shared = grep { slurp_file($_) =~ /^\s*#\s*include\s+"(?!unit\/)/m }
  glob 'test/*.c';
is_deeply(\@shared, [], 'programs of the tests include no file of ours');
my ($rule) = slurp_file('Makefile') =~ /^\$\(TOOLS\): (.*\n(?:\t.*\n)+)/m;
ok($rule && $rule !~ /src|OBJS/, 'nor are they built with one');

# T70: a test waits for a state, not for a time, and counts what it asserts
my %allowed = (
	'test/t/037_p9_idle.pl' => 'nothing happens for ten seconds',
	'test/t/051_wait.pl' => 'polls',
	'test/t/086_tool_chaos.pl' => 'the moment of a kill is random');
my (@sleepers, @open);
foreach my $file (glob 'test/t/*.pl')
{
	my $source = slurp_file($file);
	push @sleepers, $file
	  if $source =~ /^(?!\s*#).*(?:\bselect undef, undef, undef|^\s*(?:\w+::)*sleep\b)/m
	  && !$allowed{$file} && $file !~ /000_repository/;
	push @open, $file unless $source =~ /^done_testing\(\);$/m;
}
is_deeply(\@sleepers, [], 'T70: no test sleeps');
is_deeply(\@open, [], 'T70: every test counts its assertions at its end');

# the arrows between the files of src/, as src/README.md has them
my (%layer, %known, %uses);
foreach my $row (slurp_file('src/README.md') =~ /^(\| \d \|.*)$/mg)
{
	my (undef, $number, $module, undef, $knows) = split / ?\| ?/, $row;
	my ($name) = $module =~ /^`(\w+)`$/;

	$layer{$name} = $number;
	$known{$name} = [ ($knows // '') =~ /`(\w+)`/g ];
}
foreach my $file (glob 'src/*.[ch]')
{
	my ($module) = $file =~ m{([^/]+)\.[ch]$};

	$uses{$module}{$_} = 1
	  foreach grep { $_ ne $module && -e "src/$_.h" }
	  slurp_file($file) =~ /^#include "([a-z]+)\.h"$/mg;
	$uses{$module} ||= {};
}
is_deeply([ sort keys %layer ], [ sort keys %uses ],
	'every file stands in the table of src/README.md');
my @upwards = map {
	my $m = $_;
	map { "$m includes $_" } grep { ($layer{$_} // 0) > ($layer{$m} // 0) } sort keys %{ $uses{$m} }
} sort keys %uses;
is_deeply(\@upwards, [], 'no file includes a header of a higher layer');
my %included = map { $_ => [ grep { $_ ne 'compat' } sort keys %{ $uses{$_} } ] } keys %uses;
foreach my $module (sort keys %uses)
{
	next if "@{ $known{$module} // [] }" eq "@{ $included{$module} }";
	fail("what it knows is what it includes: $module");
	diag('it includes: ' . join ', ', map { "`$_`" } @{ $included{$module} });
}

# they point one way: none comes back to where it began
for (my $left = -1; $left != keys %uses;)
{
	$left = keys %uses;
	# what uses nothing that is left is below all that is
	delete @uses{ grep { my $m = $_; !grep { $uses{$_} } keys %{ $uses{$m} } } keys %uses };
}
is_deeply([ sort keys %uses ], [], 'no file uses one that uses it');

# every promise and every trap has a test that is named after it
my $tests = join '', map { slurp_file($_) } glob('test/t/*.pl'),
  glob('sql/*.sql'), glob('test/isolation/specs/*.spec');
is_deeply([ grep { $tests !~ /\b$_\b/ } map { "P$_" } 1 .. 10 ],
	[], 'every promise has a test');
is_deeply([ grep { $tests !~ /\b$_\b/ } map { "T$_" } 1 .. 70 ],
	[], 'every trap has a test');

done_testing();
