"""Relay: an archive goes to many nodes as to one. Each keeps it in a file and hands it on while it grows.

The first node of the chain is fed from here, every other one fetches from the one before it, node to node. Between
nodes the bytes go over an sshd that each node runs for this one transfer, as its own user: it shows a key that was
made a moment ago and pinned by us, lets in the keys that the other nodes made a moment ago, and those can read this
one file and do nothing else. The keys lie in memory, never travel, and are worth nothing once that sshd has ended,
which is when our connection to the node does. Nobody's authorized_keys is touched. See docs/decisions/012.

A node that goes is routed around: who fetched from it goes on from the one before, at the byte where it was. What a
node has of an archive stays when the transfer breaks, so the next one goes on there.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from cluster.archive import Archive
from cluster.command import Result, script
from cluster.errors import CommandError, ImageError, NodeError, UnreachableError
from cluster.fleet import Answers, Machine
from launcher.delta import next_source, order
from launcher.errors import BusyError

Progress = Callable[[str, int, int], None]

PREFIX = b"launcher: "  # what an account's start-up files print is none of ours
READY = 30.0  # seconds for every node to make its keys
TICK = 5.0  # seconds between two signs of life from us; a node that hears none for a minute puts everything away
GOODBYE = 5.0  # seconds for all nodes to put their keys away
_HELD, _SPARE = 75, 64 << 20

# $1 folder, $2 name of the archive, $3 its bytes, $4 the node's address for the others; none: it is fed by us.
# Standard input is lines: `allow KEY ADDRESS`, `from NUMBER ADDRESS PORT USER KEY`, `stop NUMBER`, `tick`, `done`; its
# end is the end of it all. It says `ready`, `at BYTES`, `whole`, `broken NUMBER BYTES`.
RELAY = r"""
set -u; umask 077; LC_ALL=C; export LC_ALL; unset SSH_AUTH_SOCK SSH_ASKPASS
folder=$1 file=$1/$2.part total=$3 own=$4 main=$$ keys= done=
say() { printf 'launcher: %s\n' "$*"; }
size() { stat -c %s -- "$file" 2>/dev/null || echo 0; }
end() {
  trap '' HUP INT TERM PIPE
  [ -z "$keys" ] || rm -rf -- "$keys"
  [ -z "$done" ] || rm -f -- "$file"
  rm -f -- "$folder/lock"
  kill 0
}
mkdir -p -- "$folder" || exit 74
began() { cut -d' ' -f22 "/proc/$1/stat" 2>/dev/null; }
if ! (set -C; echo "$main $(began "$main")" > "$folder/lock") 2>/dev/null; then
  read -r other since < "$folder/lock" || :
  [ -z "${other:-}" ] || [ "$(began "$other")" != "$since" ] || exit 75
  echo "$main $(began "$main")" > "$folder/lock" || exit 74
fi
trap end EXIT
trap 'exit 129' HUP INT TERM PIPE
find "$folder" -name '*.part' ! -name "$2.part" -exec rm -f {} +
: >> "$file" || exit 74
[ "$(size)" -le "$total" ] || : > "$file"
for place in "${XDG_RUNTIME_DIR:-}" /dev/shm "${TMPDIR:-/tmp}"; do
  [ -n "$place" ] && [ -w "$place" ] && keys=$(mktemp -d "$place/launcher-XXXXXXXXXX") && break
done
[ -n "$keys" ] || exit 74
: > "$keys/allowed"
port= host= client=
if [ -n "$own" ]; then
  sshd=$(PATH=$PATH:/usr/sbin:/usr/local/sbin command -v sshd)
  if ssh-keygen -q -t ed25519 -N '' -C '' -f "$keys/host" && ssh-keygen -q -t ed25519 -N '' -C '' -f "$keys/client"
  then
    client=$(cut -d' ' -f2 < "$keys/client.pub")
    cat > "$keys/serve" <<'EOS'
# $1 the relay, $2 the file, $3 its bytes; from which byte on is what the other node asks.
at=${SSH_ORIGINAL_COMMAND:-}
case $at in ''|0?*|*[!0-9]*) exit 64 ;; esac
while [ "$at" -lt "$3" ] && kill -0 "$1"; do
  now=$(stat -c %s -- "$2") || exit
  if [ "$now" -gt "$at" ]; then
    dd if="$2" bs=1M iflag=skip_bytes,count_bytes skip="$at" count="$((now - at))" status=none || exit
    at=$now
  else
    sleep 0.05 || sleep 1
  fi
done
EOS
    quoted() { printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")"; }
    cat > "$keys/config" <<EOS
ListenAddress $own
HostKey $keys/host
AuthorizedKeysFile $keys/allowed
AuthenticationMethods publickey
ForceCommand exec sh $(quoted "$keys/serve") $main $(quoted "$file") $total 2>/dev/null
AllowUsers $(id -un)
PermitRootLogin yes
StrictModes no
UsePAM no
DisableForwarding yes
PermitTTY no
PermitUserRC no
PermitUserEnvironment no
PrintMotd no
MaxAuthTries 2
MaxSessions 1
LoginGraceTime 15
ClientAliveInterval 5
PidFile none
LogLevel INFO
EOS
    for attempt in 1 2 3 4 5; do
      port=$((20000 + $(od -An -N2 -tu2 /dev/urandom) % 12000))
      "$sshd" -D -e -f "$keys/config" -o "Port=$port" </dev/null >/dev/null 2>"$keys/log" &
      pid=$!
      while kill -0 "$pid" 2>/dev/null; do
        grep -q '^Server listening' "$keys/log" && break 2
        sleep 0.02
      done
      port=
    done
    [ -z "$port" ] || host=$(cut -d' ' -f2 < "$keys/host.pub")
  fi
fi
write() { dd bs=256k iflag=fullblock,count_bytes count="$1" status=none >> "$file"; }
fetch() {
  echo "peer ssh-ed25519 $5" > "$keys/known"
  rm -f "$keys/pipe"; mkfifo "$keys/pipe" || exit 74
  ssh -F /dev/null -T -x -a -i "$keys/client" -b "$own" -p "$3" -l "$4" \
    -o HostKeyAlias=peer -o "UserKnownHostsFile=$keys/known" -o GlobalKnownHostsFile=/dev/null \
    -o StrictHostKeyChecking=yes -o UpdateHostKeys=no -o CheckHostIP=no -o IdentitiesOnly=yes -o BatchMode=yes \
    -o PreferredAuthentications=publickey -o ConnectTimeout=5 -o ServerAliveInterval=2 -o ServerAliveCountMax=3 \
    -o Compression=no -o ControlMaster=no -o LogLevel=ERROR -c aes128-gcm@openssh.com,chacha20-poly1305@openssh.com \
    -- "$2" "$(size)" </dev/null >"$keys/pipe" 2>"$keys/said" &
  line=$!
  # What has come is written down before anybody goes on from there.
  trap 'kill "$line" 2>/dev/null; wait; say broken "$1" "$(size)"; exit' TERM
  write "$((total - $(size)))" < "$keys/pipe" 2>>"$keys/said" & wait $!
  trap '' TERM
  kill "$line" 2>/dev/null
  if [ "$(size)" -eq "$total" ]; then say whole; else say broken "$1" "$(size)" "$(tail -n 1 "$keys/said")"; fi
}
say ready "$(size)" "$(df -Pk -- "$folder" | awk 'NR == 2 { print $4 }')" "$(id -un)" \
  "${port:--}" "${host:--}" "${client:--}"
(
  trap - EXIT; last=; silent=0
  while sleep 0.5; do
    now=$(size); [ "$now" = "$last" ] || say at "$now"; last=$now
    if [ -e "$keys/tick" ]; then rm -f "$keys/tick"; silent=0; else silent=$((silent + 1)); fi
    [ "$silent" -lt 120 ] || kill "$main"
    kill -0 "$main" 2>/dev/null || end  # it was killed, and could not put anything away
  done
) &
fetching=
while read -r verb a b c d e; do
  case $verb in
    allow) echo "restrict,from=\"$b\" ssh-ed25519 $a" >> "$keys/allowed" ;;
    from) (trap - EXIT; fetch "$a" "$b" "$c" "$d" "$e") & fetching=$! ;;
    stop) kill "$fetching" 2>/dev/null ;;
    tick) : > "$keys/tick" ;;
    done) done=yes ;;
  esac
done
"""

# $1 file, $2 how many bytes it has, $3 how many it shall have.
FEED = r"""
umask 077
[ "$(stat -c %s -- "$1")" = "$2" ] || { echo "the file changed meanwhile" >&2; exit 1; }
dd bs=256k iflag=fullblock,count_bytes count="$(($3 - $2))" status=none >> "$1" && [ "$(stat -c %s -- "$1")" = "$3" ]
"""

# $1 file. The engine verifies every layer; what it refuses is not gone on from.
LOAD = r"""
said=$(docker load -q -i "$1" 2>&1) && exit
rm -f -- "$1"; printf '%s\n' "$said" >&2; exit 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Road:
    """Where a node keeps what is being sent, and its address for the other nodes (none: it stands alone)."""

    folder: str
    address: str | None = None


def relay(archive: Archive, machines: Sequence[Machine], roads: Mapping[str, Road], progress: Progress) -> Answers[int]:
    """Bring the archive to these machines' engines; gives back the bytes that each one took.

    Every machine that can be brought there is; the others' errors are told beside them.
    """
    chain = _Chain(archive, machines, roads, progress)
    try:
        chain.run()
    finally:
        chain.close()
    return Answers(good=chain.sent, bad=chain.failed)


@dataclass(kw_only=True)
class _Node:
    machine: Machine
    road: Road
    orders: queue.Queue[bytes | None] = field(default_factory=queue.Queue)
    at: int = 0
    first: int = 0  # where it was when it began
    ready: bool = False
    user: str = ""
    port: str = "-"
    host_key: str = "-"
    client_key: str = "-"
    whole: bool = False
    source: str | None = None
    turn: int = 0  # the number of its source, of all that it has had
    tried: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def gives(self) -> bool:
        """Whether others can fetch from it."""
        return self.port != "-"

    @property
    def takes(self) -> bool:
        """Whether it can fetch from others."""
        return self.client_key != "-"


class _Chain:
    """The state of one transfer. Threads put events into a queue; one thread takes them out and decides."""

    def __init__(
        self, archive: Archive, machines: Sequence[Machine], roads: Mapping[str, Road], progress: Progress
    ) -> None:
        alone = len(machines) == 1
        self._archive = archive
        self._nodes = {
            one.name: _Node(machine=one, road=Road(folder=roads[one.name].folder) if alone else roads[one.name])
            for one in machines
        }
        self._progress = progress
        self._events: queue.Queue[Callable[[], None]] = queue.Queue()
        self._order: tuple[str, ...] = ()
        self._sessions: list[threading.Thread] = []
        self.sent: dict[str, int] = {}
        self.failed: dict[str, NodeError] = {}

    def run(self) -> None:
        self._sessions = [
            threading.Thread(target=self._attend, args=(node,), daemon=True) for node in self._nodes.values()
        ]
        for session in self._sessions:
            session.start()
        self._decide_until(lambda: all(node.ready for node in self._open()), seconds=READY)
        for node in self._open():
            if not node.ready:
                self._lose(node, UnreachableError(node.name, f"no answer within {READY:g} s"))
        self._begin()
        self._decide_until(lambda: not self._open())

    def close(self) -> None:
        """Let every node put its keys away; who has loaded drops the file, the others keep what they have."""
        for node in self._nodes.values():
            if node.name in self.sent:
                node.orders.put(b"done\n")
            node.orders.put(None)
        end = time.monotonic() + GOODBYE
        for session in self._sessions:
            session.join(max(0.0, end - time.monotonic()))

    def _open(self) -> list[_Node]:
        """Nodes of which it is not known yet how it ends with them."""
        return [node for name, node in self._nodes.items() if name not in self.sent and name not in self.failed]

    def _decide_until(self, true: Callable[[], bool], *, seconds: float = float("inf")) -> None:
        end = time.monotonic() + seconds
        while not true() and time.monotonic() < end:
            with suppress(queue.Empty):  # short waits keep Ctrl-C prompt
                self._events.get(timeout=0.5)()

    # What the threads do

    def _attend(self, node: _Node) -> None:
        """One node's session, to its end."""
        command = script(RELAY, node.road.folder, self._archive.name, str(self._archive.size), node.road.address or "")
        left = b""

        def hear(data: bytes) -> None:
            nonlocal left
            *lines, left = (left + data).split(b"\n")
            for line in lines:
                if line.startswith(PREFIX):
                    words = line[len(PREFIX) :].decode(errors="replace").split()
                    self._events.put(lambda words=words: self._heard(node, words))  # type: ignore[misc]

        error: NodeError
        try:
            code = node.machine.transport.pipe(command, _orders(node.orders), hear)
            error = _ended(node, code)
        except NodeError as gone:
            error = gone
        self._events.put(lambda: self._lose(node, error))

    def _feed(self, node: _Node, at: int) -> None:
        """Send the archive from here, from byte `at` on."""

        def chunks() -> Iterator[bytes]:
            taken = at
            for chunk in self._archive.chunks(at):
                yield chunk
                taken += len(chunk)
                if node.name in self.failed:
                    return

        command = script(FEED, self._file(node), str(at), str(self._archive.size))
        try:
            said = node.machine.transport.send(command, chunks())
        except NodeError as error:
            self._events.put(lambda error=error: self._lose(node, error))  # type: ignore[misc]
            return
        self._events.put(lambda: self._fed(node, said))

    def _load(self, node: _Node) -> None:
        try:
            said = node.machine.transport.send(script(LOAD, self._file(node)), ())
        except NodeError as error:
            self._events.put(lambda error=error: self._lose(node, error))  # type: ignore[misc]
            return
        self._events.put(lambda: self._loaded(node, said))

    def _file(self, node: _Node) -> str:
        return f"{node.road.folder}/{self._archive.name}.part"

    # What is decided

    def _begin(self) -> None:
        nodes = self._open()
        self._order = order({node.name: node.at for node in nodes})
        for node in nodes:
            for other in nodes:
                if other is not node and other.takes and node.gives:
                    node.orders.put(f"allow {other.client_key} {other.road.address}\n".encode())
        for name in self._order:
            node = self._nodes[name]
            if node.at == self._archive.size:
                self._is_whole(node)
            else:
                self._assign(node)

    def _assign(self, node: _Node) -> None:
        able = {other.name for other in self._nodes.values() if other.gives and other.name not in self.failed}
        name = next_source(node.name, self._order, able=able, tried=node.tried) if node.takes else None
        node.source = name
        node.turn += 1
        if name is None:
            threading.Thread(target=self._feed, args=(node, node.at), daemon=True).start()
            return
        other = self._nodes[name]
        node.orders.put(f"from {node.turn} {other.road.address} {other.port} {other.user} {other.host_key}\n".encode())

    def _heard(self, node: _Node, words: list[str]) -> None:
        match words:
            case ["ready", at, free, user, port, host_key, client_key]:
                node.at = node.first = int(at)
                node.user, node.port, node.host_key, node.client_key = user, port, host_key, client_key
                node.ready = True
                if free.isdigit() and int(free) * 1024 < self._archive.size - node.at + _SPARE:
                    what = f"no room in {node.road.folder} for the {self._archive.size - node.at} bytes that it lacks"
                    self._lose(node, CommandError(node.name, what, next_step="make room there, or set paths.state"))
            case ["at", at]:
                node.at = max(node.at, int(at))
                self._progress(node.name, node.at, self._archive.size)
            case ["whole"]:
                self._is_whole(node)
            case ["broken", turn, at, *_] if int(turn) == node.turn and node in self._open():
                node.at = int(at)
                node.tried |= {node.source} if node.source else set()
                self._assign(node)

    def _fed(self, node: _Node, said: Result) -> None:
        if said.ok:
            self._is_whole(node)
            return
        what = f"the image cannot be kept in {node.road.folder}"
        self._lose(node, CommandError(node.name, what, detail=said.tail(), next_step="make room there"))

    def _is_whole(self, node: _Node) -> None:
        if node.whole or node not in self._open():
            return
        node.whole, node.at = True, self._archive.size
        self._progress(node.name, node.at, self._archive.size)
        threading.Thread(target=self._load, args=(node,), daemon=True).start()

    def _loaded(self, node: _Node, said: Result) -> None:
        if said.ok:
            self.sent[node.name] = self._archive.size - node.first
            return
        detail = said.tail()
        self._lose(node, ImageError(node.name, "the image does not load", detail=detail, next_step="run it again"))

    def _lose(self, node: _Node, error: NodeError) -> None:
        """A node is out; who fetched from it turns to another one, without waiting to notice."""
        if node not in self._open():
            return
        self.failed[node.name] = error
        node.orders.put(None)
        for other in self._open():
            if other.source == node.name and not other.whole:
                other.orders.put(f"stop {other.turn}\n".encode())


def _orders(lines: queue.Queue[bytes | None]) -> Iterator[bytes]:
    """What a node is told, as it comes; and now and then that we are still there."""
    while True:
        try:
            line = lines.get(timeout=TICK)
        except queue.Empty:
            line = b"tick\n"
        if line is None:
            return
        yield line


def _ended(node: _Node, code: int) -> NodeError:
    if code == _HELD:
        return BusyError(node.name, "another command is sending an image to it", next_step="wait for that one to end")
    return CommandError(
        node.name,
        f"the transfer ended with status {code}",
        next_step=f"see whether {node.road.folder} can be written to",
    )
