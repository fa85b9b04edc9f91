# The package in a clean root: installed, used, removed. In a mount namespace of its own; $1 is the root, $2 the package.
# A line for each step: `ok WHAT`, or `FAILED WHAT` and what was seen.
set -u
root=$1 package=$2
mount -t proc proc "$root/proc" || exit 1
cp "$package" "$root/tmp/libsmc.deb" || exit 1
inside() { chroot "$root" /usr/bin/env -i PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LC_ALL=C TMPDIR=/tmp "$@"; }
# dpkg's own records and what it logs are not the package's.
files() {
  (cd "$root" && find . -xdev \( -path ./proc -o -path ./tmp -o -path ./var/lib/dpkg -o -path ./var/log \
    -o -path ./var/cache \) -prune -o -printf '%M %U:%G %p\n' | sort)
}
try() { # WHAT COMMAND…
  local what=$1 said
  shift
  if said=$("$@" 2>&1); then echo "ok $what"; else
    echo "FAILED $what"
    printf '%s\n' "$said" | sed 's/^/  | /'
  fi
}

before=$(files)
try "dpkg installs it" inside dpkg --install /tmp/libsmc.deb
try "dpkg finds nothing changed" test -z "$(inside dpkg --verify libsmc 2>&1)"
check() {
  local said
  said=$(inside smc check) && grep -q '^ok .*upgrade' <<<"$said" && grep -q '^ok .*library .*/usr/lib/[^/]*/libsmc.so$' <<<"$said" ||
    { echo "$said"; return 1; }
}
try "smc check" check

# A client and a server that know nothing of libsmc, in Perl, which each Debian has.
cat >"$root/tmp/talk.pl" <<'PERL'
use strict; use warnings; use IO::Socket::INET;
my $listener = IO::Socket::INET->new(Listen => 1, LocalAddr => "127.0.0.1", Proto => "tcp") or die "listen: $!";
my $line = "x" x 999 . "\n";
my $child = fork // die "fork: $!";
if (!$child) {
    my $s = IO::Socket::INET->new(PeerAddr => "127.0.0.1", PeerPort => $listener->sockport) or die "connect: $!";
    close $listener;
    for (1 .. 500) {
        my $n = syswrite($s, $line) // die "write: $!";
        my $back = "";
        while (length $back < $n) { sysread($s, $back, 4096, length $back) or die "read: $!" }
        $back eq $line or die "other bytes came back";
    }
    exit 0;
}
my $s = $listener->accept or die "accept: $!";
while (sysread($s, my $got, 4096)) { syswrite($s, $got) // die "write: $!" }
waitpid $child, 0;
exit($? ? 1 : 0);
PERL
upgraded() { # how it is started; then look into what both ends counted
  rm -f "$root"/tmp/talk.*.json
  inside "$@" perl /tmp/talk.pl || return 1
  [ "$(cat "$root"/tmp/talk.*.json | grep -o '"shm":1' | wc -l)" = 2 ] || { cat "$root"/tmp/talk.*.json; return 1; }
}
try "smc run: upgraded" upgraded smc run --stats /tmp/talk.%p.json --
try "LD_PRELOAD=libsmc.so, by name: upgraded" upgraded env SMC_STATS=/tmp/talk.%p.json LD_PRELOAD=libsmc.so
rm -f "$root"/tmp/talk.*

# One page for the command and each of its commands; none is empty, and troff understands them.
pages() {
  local page name missing=0
  for name in '' $(inside smc --help | sed -n '/^Commands:/,/^$/s/^  \([a-z]*\) .*/\1/p' | grep -v help); do
    page=$root/usr/share/man/man1/smc${name:+-$name}.1.gz
    if [ "$(zcat "$page" 2>/dev/null | wc -l)" -lt 10 ]; then echo "no page: smc $name"; missing=1; fi
    if command -v groff >/dev/null; then
      zcat "$page" | groff -man -Tascii -ww -z || missing=1
    fi
  done
  [ -z "$(ls "$root/usr/share/man/man1" | grep probe)" ] || { echo "a page for what is hidden"; missing=1; }
  return $missing
}
try "man pages" pages
# Loaded as the shell does it, then asked for what follows `smc ru`.
bash_completes() {
  inside bash -c '
    . /usr/share/bash-completion/completions/smc || exit 1
    function=$(complete -p smc | sed "s/.*-F \([^ ]*\).*/\1/")
    COMP_WORDS=(smc ru) COMP_CWORD=1 COMPREPLY=()
    $function smc ru smc
    [ "${COMPREPLY[*]}" = run ] || { echo "completed to: ${COMPREPLY[*]}"; exit 1; }'
}
try "completion for bash" bash_completes
try "completion for zsh" grep -q '^#compdef smc' "$root/usr/share/zsh/vendor-completions/_smc"
try "completion for fish" grep -q '^complete -c smc' "$root/usr/share/fish/vendor_completions.d/smc.fish"
config() {
  local lib
  lib=$(sed -n 's/^libdir=${prefix}//p' "$root"/usr/lib/*/pkgconfig/libsmc.pc)
  test -f "$root/usr$lib/libsmc.so"
}
try "pkg-config's file names the library" config

try "dpkg takes it away" inside dpkg --purge libsmc
after=$(files)
try "nothing is left" diff <(echo "$before") <(echo "$after")
