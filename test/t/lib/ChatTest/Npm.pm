# ChatTest::Npm: programs that need packages of npm
#
#	require_npm();				skips the whole test where there are none
#	my $out = run_node($stdin, 'verify.mjs', 7);	dies unless it succeeds
#	my $pid_etc = start_node($log, 'gateway.mjs', ...);	an IPC::Run handle
#
# test/run installs them, as test/npm/package-lock.json says; installcheck
# takes the directory from CHAT_NPM.

package ChatTest::Npm;

use strict;
use warnings;

use Exporter 'import';
use IPC::Run ();
use PostgreSQL::Test::Utils ();
use Test::More;

our @EXPORT = qw(require_npm run_node node_file);

# Skips the test unless node and the packages are there.
sub require_npm
{
	my $dir = $ENV{CHAT_NPM} // '';
	return if -d "$dir/node_modules/ai7" && !system 'node --version >/dev/null 2>&1';
	diag('SKIPPED: node, npm or the npm registry cannot be had');
	plan(skip_all => 'no packages of npm');
	return;
}

# Returns the path of a program beside the packages.
sub node_file
{
	my ($name) = @_;
	return "$ENV{CHAT_NPM}/$name";
}

# Runs a program; returns what it prints.
sub run_node
{
	my ($stdin, $name, @args) = @_;
	my ($out, $err) = ('', '');

	IPC::Run::run([ 'node', node_file($name), @args ],
		'<', \$stdin, '>', \$out, '2>', \$err,
		IPC::Run::timer($PostgreSQL::Test::Utils::timeout_default))
	  or die "$name: $err\n";
	return $out;
}

1;
