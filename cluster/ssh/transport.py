"""The Transport contract over SSH: which connection carries which command."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.command import Command, Result, script
from cluster.errors import UnreachableError
from cluster.ssh.dial import dial
from cluster.ssh.route import LIMITS, USER_CONFIG, Limits, route
from cluster.ssh.session import Link, Session, patiently, wire_line
from cluster.transport import Channel, Sink
from cluster.trust import Address

LASTING_SESSIONS = 4  # of a connection's sessions, for what may last: the rest is always free for short commands

# Runs a command and reads the session's standard input beside it. The input's end, by our hand or because the
# connection broke, is the command's end: without a terminal sshd would let it run on.
# $1: how many bytes of the input belong to the command. The group is ours alone: sshd gave us a session of our own.
WATCHED = """\
exec 3<&0 </dev/null
{ sh -c 'echo "$PPID"'
  [ "$1" = 0 ] || head -c "$1" <&3
  exec >/dev/null 2>&1
  while read -r line <&3; do :; done
  trap '' TERM; kill -s TERM -- "-$$"; sleep 2; kill -s KILL -- "-$$"
} | { read -r watcher; shift; "$@" 3<&-; code=$?; kill -s KILL "$watcher"; exit "$code"; }
"""


class SshTransport:
    """A machine over SSH, with keys that are pinned in `known_hosts`; the Transport contract.

    Sessions share a connection, at most eight; what may last (stream, send, interact, dial) takes at most four of
    them and opens further connections, so that a short command never waits for a log that is followed.
    """

    def __init__(
        self, address: Address, *, known_hosts: Path, limits: Limits = LIMITS, ssh_config: Path = USER_CONFIG
    ) -> None:
        self.node = address.node
        self._address, self._ssh_config = address, ssh_config
        self._known_hosts, self._limits = known_hosts, limits
        self._links: list[Link] = []
        self._closings = 0
        self._lock = threading.Lock()  # of the two above; never held while anything is waited for
        self._connecting = threading.Lock()

    @property
    def user(self) -> str:
        """The login name, as the inventory or ~/.ssh/config says it."""
        return route(self._address, self._ssh_config, self._limits)[-1].user

    def open(self) -> None:
        """Connect now; harmless when connected."""
        self._link(lasting=False)

    def run(self, command: Command, *, timeout: float | None = None) -> Result:
        """Run a command to its end; no end within `timeout` seconds is an `UnreachableError`."""
        with self._session(command.shell()) as session, session.deadline(timeout, command):
            return session.exchange((command.stdin,))

    def send(self, command: Command, chunks: Iterable[bytes]) -> Result:
        """Run a command with `chunks` as its standard input; what it leaves unread when it ends is dropped."""
        with self._session(command.shell(), lasting=True) as session:
            return session.exchange(chunks)

    def stream(self, command: Command, sink: Sink, *, stop: Callable[[], bool]) -> int:
        """Hand over standard output as it comes, until the command's end or `stop()`; standard error is dropped."""
        watched = script(WATCHED, str(len(command.stdin)), *command.argv)
        with self._session(watched.shell(), lasting=True) as session:
            threading.Thread(target=session.feed, args=((command.stdin,),), daemon=True).start()
            threading.Thread(target=session.drain_errors, daemon=True).start()
            while not stop():
                data = session.receive(wait=0.1)
                if data:
                    sink(data)
                elif data is not None:
                    return session.code()
            session.hang_up()
            return -1

    def pipe(self, command: Command, chunks: Iterable[bytes], sink: Sink) -> int:
        """Feed a command while its standard output is handed over; standard error is dropped."""
        with self._session(command.shell(), lasting=True) as session:
            threading.Thread(target=session.pour, args=(chunks,), daemon=True).start()
            threading.Thread(target=session.drain_errors, daemon=True).start()
            while data := patiently(session.channel.recv):
                sink(data)
            return session.code()

    def interact(self, command: Command, *, tty: bool) -> int:
        """Run a command on the user's own standard streams; with `tty`, on a terminal like theirs."""
        with self._session(command.shell(), lasting=True, tty=tty) as session:
            return session.converse(tty=tty)

    def dial_docker(self) -> Channel:
        """A socket whose other end is the machine's Docker Engine, as the docker command there finds it."""
        stack = ExitStack()
        line = Command(argv=("docker", "system", "dial-stdio")).shell()
        return dial(stack.enter_context(self._session(line, lasting=True)), stack.close)

    def close(self) -> None:
        """Let go of the machine, without waiting for a connection that is being made. What runs there goes on."""
        with self._lock:
            links, self._links = self._links, []
            self._closings += 1
        for link in links:
            link.close()

    @contextmanager
    def _session(self, line: str, *, lasting: bool = False, tty: bool = False) -> Iterator[Session]:
        link = self._link(lasting=lasting)
        with ExitStack() as stack:
            if lasting:
                stack.callback(self._let_go, link)
            stack.enter_context(link.sessions)
            session = link.begin(wire_line(line), tty=tty)
            stack.callback(session.close)
            yield session

    def _link(self, *, lasting: bool) -> Link:
        link = self._take(lasting=lasting)
        if link:
            return link
        with self._connecting:  # one at a time: on the first one's connection there may be room for the next
            return self._take(lasting=lasting) or self._connect(lasting=lasting)

    def _take(self, *, lasting: bool) -> Link | None:
        with self._lock:
            dead = [link for link in self._links if not link.alive]
            self._links = [link for link in self._links if link not in dead]
            free = (link for link in self._links if not lasting or link.lasting < LASTING_SESSIONS)
            found = next(free, None)
            if found:
                found.lasting += lasting
        for link in dead:
            link.close()
        return found

    def _connect(self, *, lasting: bool) -> Link:
        closings = self._closings
        link = Link(route(self._address, self._ssh_config, self._limits), self._known_hosts, self._limits)
        with self._lock:
            if closings == self._closings:
                link.lasting += lasting
                self._links.append(link)
                return link
        link.close()
        raise UnreachableError(self.node, "we closed the connection while it was made")

    def _let_go(self, link: Link) -> None:
        with self._lock:
            link.lasting -= 1
