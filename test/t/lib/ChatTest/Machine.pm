# ChatTest::Machine: where commands of an administrator do what they say
#
#	my $machine = ChatTest::Machine->new($node, $source);	$node: not started
#	my ($rc, $out) = $machine->run("sudo make install\n");
#	my $path = $machine->path('/etc/postgresql/openai.key');
#
# The commands run in sh, in a copy of the sources.  First in PATH are the
# programs of test/t/lib/shims: those that need root, or change the system.
# They do the same on the private cluster and below a directory of the test,
# or refuse; everything else is what is installed.
#
# The cluster has nothing of chat: none of its settings is chat's, and it finds
# what "make install" puts into the directory of the test, no other extension.

package ChatTest::Machine;

use strict;
use warnings;

use FindBin;
use PostgreSQL::Test::Utils;

my $shims = "$FindBin::RealBin/lib/shims";

sub new
{
	my ($class, $node, $source) = @_;
	my $self = bless {
		node => $node,
		source => $node->basedir . '/source',
		root => $node->basedir . '/root'
	}, $class;

	mkdir $_ or die "$_: $!\n" foreach @$self{qw(source root)};
	system_or_bail('cp', '-r',
		(map { "$source/$_" } qw(Makefile chat.control sql src test)),
		$self->{source});
	# what is compiled already is newer than its sources, now too
	utime undef, undef, glob "$self->{source}/src/*.o";
	# what the packages of PostgreSQL make
	system_or_bail('mkdir', '-p', $self->path('/etc/postgresql'));
	$self->configure;
	return $self;
}

# Returns where a file of the machine is.
sub path
{
	my ($self, $path) = @_;
	return $self->{root} . $path;
}

# Takes chat out of the settings of the cluster.
sub configure
{
	my ($self) = @_;
	my $file = $self->{node}->data_dir . '/postgresql.conf';
	my $chat = qr/^(?:shared_preload_libraries|chat\.).*\n/m;
	my $lib = pg_config('--pkglibdir');
	my $conf = slurp_file($file);
	my ($stage) = $conf =~ /^dynamic_library_path = '(.*?)\Q$lib\E:/m;

	$conf =~ s/$chat//g;
	$conf =~ s/\Q$stage\E/$self->{root}/g if $stage;
	unlink $file;
	append_to_file($file, $conf);
	return;
}

# Returns what pg_config says.
sub pg_config
{
	my ($what) = @_;
	my $program = $ENV{PG_CONFIG} // 'pg_config';

	chomp(my $out = `$program $what`);
	return $out;
}

# Runs commands; returns their exit code and all that they print.
sub run
{
	my ($self, $script) = @_;
	my $node = $self->{node};
	my $name = "$PostgreSQL::Test::Utils::tmp_check/machine";
	my ($major) = pg_config('--version') =~ /(\d+)/;
	local %ENV = (
		%ENV,
		PATH => "$shims:$ENV{PATH}",
		PGHOST => $node->host,
		PGPORT => $node->port,
		PGUSER => 'nobody_in_particular',
		# for the shims
		MACHINE_PATH => $ENV{PATH},
		MACHINE_ROOT => $self->{root},
		MACHINE_USER => '',
		MACHINE_SUPERUSER => scalar getpwuid $<,
		MACHINE_MAJOR => $major,
		MACHINE_DATA => $node->data_dir,
		MACHINE_LOG => $node->logfile);
	delete @ENV{qw(PGDATABASE MAKEFLAGS MFLAGS MAKELEVEL DESTDIR)};

	unlink "$name.sh", "$name.out";
	append_to_file("$name.sh", $script);
	# not through a pipe, which a server that is started would keep open
	my $rc = system "cd '$self->{source}'"
	  . " && exec sh -eu '$name.sh' </dev/null >'$name.out' 2>&1";
	# the server may be another now, or gone
	$node->_update_pid(-1);
	return ($rc, slurp_file("$name.out"));
}

1;
