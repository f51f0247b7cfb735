"""A word that must be nowhere: looked for in all processes of a machine, again and again, and in what was written.

The same few lines of Perl look on the control machine and on every node, which have no Python.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# The words come over standard input, so that the sampler does not show them itself; its end is the end of that. A
# process is looked at in each round while it is young, for it may yet become another program, and then in each tenth.
_SAMPLE = r"""
my @words = split ' ', <STDIN>;
my ($rounds, $wait, %seen, %age) = (0, '');
vec($wait, fileno(STDIN), 1) = 1;
until (select(my $end = $wait, undef, undef, 0.004)) {
    $rounds++;
    opendir(my $all, '/proc') or die;
    for my $pid (grep { /^\d+$/ } readdir $all) {
        $age{$pid} = $rounds > 1 ? 0 : 50 unless exists $age{$pid};
        next if $age{$pid}++ >= 50 and ($pid + $rounds) % 10;
        for my $file ('cmdline', 'environ') {
            open(my $in, '<', "/proc/$pid/$file") or next;
            local $/;
            my $text = <$in> // next;
            for my $word (@words) {
                $seen{"$word $file"} //= $text if index($text, $word) >= 0;
            }
        }
    }
}
print "rounds $rounds\n";
for my $found (sort keys %seen) { $seen{$found} =~ tr/\0\n/  /; print "$found $seen{$found}\n"; }
"""
# Ends as soon as it has been seen: its words stand in its arguments and in its environment.
_PLANT = ("sh", "-c", "sleep 0.5; :")
_CONTROL = "this machine"
# Before the others, where that is allowed: on a busy machine it would look too seldom.
_AT_ONCE = ("nice", "-n", "-15", "perl", "-e")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What one machine's processes showed: `found` holds (word, cmdline or environ), `rate` is looks per second."""

    found: frozenset[tuple[str, str]]
    rate: float
    text: str


@contextmanager
def sampled(words: Sequence[str], *nodes: str) -> Iterator[dict[str, Sampled]]:
    """Look at all processes of this machine and of the lab's nodes; the answers are there when the block has ended."""
    places = {_CONTROL: (), **{node: ("docker", "exec", "-i", node) for node in nodes}}
    began, answers = time.monotonic(), dict[str, Sampled]()
    samplers = {
        place: subprocess.Popen([*way, *_AT_ONCE, _SAMPLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for place, way in places.items()
    }
    try:
        for sampler in samplers.values():
            assert sampler.stdin is not None
            sampler.stdin.write(" ".join(words).encode() + b"\n")
            sampler.stdin.flush()
        yield answers
    finally:
        for place, sampler in samplers.items():
            said = sampler.communicate(timeout=60)[0].decode(errors="replace")
            found = frozenset((word, file) for word, file in re.findall(r"^(\S+) (cmdline|environ) ", said, re.M))
            rounds = re.match(r"rounds (\d+)\n", said)
            rate = int(rounds[1]) / (time.monotonic() - began) if rounds else 0.0
            answers[place] = Sampled(found=found, rate=rate, text=said)


def plant(word: str, *nodes: str) -> None:
    """Show a word where it must be seen, for half a second, on this machine and on the nodes."""
    argv = ["env", f"PLANTED={word}", *_PLANT, word]
    shown = [subprocess.Popen([*way, *argv]) for way in ((), *(("docker", "exec", node) for node in nodes))]
    assert [one.wait() for one in shown] == [0] * len(shown)


def search(word: str, *folders: str, since: float) -> tuple[str, ...]:
    """A command that names the files that hold the word among those written since a moment; it does not show it."""
    hidden = f"{word[:-1]}[{word[-1]}]"
    return ("sh", "-c", _SEARCH, "sh", f"@{int(since)}", hidden, *folders)


_SEARCH = r"""
since=$1 word=$2; shift 2
find "$@" \( -path /proc -o -path /sys \) -prune -o -type f -newermt "$since" -exec grep -sle "$word" {} + 2>/dev/null
true
"""
