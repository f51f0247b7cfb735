"""The gang guard: one node's end is every node's end, also while nobody watches. It knows no more than it is told.

The agents of a run tell each other how they are, in datagrams on the training network, every BEAT seconds and at once
when there is news. Each is signed with the run's key, which lies beside the agent in guard.key, and is JSON: nothing
that comes from the network is ever more than data. Lost datagrams are made up for by the next ones, since each holds
all there is to know: no handshake, no order, no leader.

An agent ends its part of the run when another one is ending, when another one has been silent for `grace` seconds or
its port is closed, and when no process of any node has written anything for `hang_timeout` seconds. Only who was
heard once can be lost: where a firewall keeps the datagrams out, the run is not guarded, and not ended either.

run.json holds "guard": {"peers": [{"node", "address", "port"}], by machine rank, "beat", "grace", "hang_timeout":
seconds, the last one null for never}.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import ipaddress
import json
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MISSED = 3  # beats without a word before a node is called silent; and refusals before it is taken for gone
URGENT = 0.2  # seconds between two tellings of news that the other one has not confirmed
HURRY = 2.0  # seconds for all goodbyes when we are told to stop
FAREWELL = 30.0  # seconds for the others to confirm that all went well here: else they would miss us, and end badly
GATHERING = 8.0  # seconds beyond the job's grace for the others to end and to say how
ARRIVAL = 10.0  # seconds from our start within which the others may still be starting
START = 300.0  # seconds at least that a run may take to its first line before that is called a hang
UNMET = 60.0  # seconds after which it is told that a node was never heard
LONGEST = 16 * 1024  # of a datagram, in bytes
BURST = 1000  # datagrams read in one turn
KEPT = 4  # failures in one datagram
SHORT = 300  # of a failure's message there, in characters
SIGNATURE = hashlib.sha256().digest_size
UP, ENDING, ENDED = "up", "ending", "ended"
# Linux: have refusals told, and read them. Not all of it has a name in Python.
RECVERR = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}
ERRQUEUE = 0x2000


@dataclass(slots=True, kw_only=True)
class Peer:
    """Another node, as far as it has been heard. Moments are of our monotonic clock, `told` of both wall clocks."""

    name: str
    heard: float | None = None  # None: not met
    count: int = 0  # of its last datagram
    told: tuple[float, float] | None = None  # when that was sent, and when it arrived
    quiet: float = 0.0  # seconds that its ranks had been quiet then
    state: str = UP
    news: int = 0  # the newest that it told
    knows: int = 0  # the newest of ours that it confirmed
    report: dict[str, Any] = field(default_factory=dict)
    refused: int = 0  # since it was last heard
    silent: bool = False
    sent: float = float("-inf")
    clocks: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=8))  # (delay, ahead of us)

    @property
    def ahead(self) -> float | None:
        """How far its clock is ahead of ours, in seconds; by the exchange that took the least time (as NTP does)."""
        return min(self.clocks)[1] if self.clocks else None


class Gang:
    """All nodes of the run as this one sees them: what arrives, what follows from it, what is to be told. No I/O."""

    def __init__(self, run: Mapping[str, Any], *, now: float, say: Callable[[str], None]) -> None:
        settings = run["guard"]
        self._name, self._rank, self._say = str(run["node"]), int(run["machine_rank"]), say
        self._beat, self._grace = float(settings["beat"]), float(settings["grace"])
        self._hang_timeout: float | None = settings["hang_timeout"]
        self.peers = {rank: Peer(name=one["node"]) for rank, one in enumerate(settings["peers"]) if rank != self._rank}
        self.verdict = ""  # why this node's part must end
        self.hanging = False  # because nothing goes on any more
        self.decided = False  # and we were the one to see that
        self._state, self._news = UP, 0
        self._report: dict[str, Any] = {}
        self._count = 0
        self._began = self._turned = self._progress = now
        self._spoken = self._unmet_told = False

    # What happens here

    def progress(self, now: float) -> None:
        """A rank of this node has written something."""
        self._progress, self._spoken = now, True

    def ending(self, why: str, *, failures: Sequence[dict[str, Any]] = ()) -> None:
        """This node's part is about to end badly; how exactly, the last report will say."""
        if self._state == UP:
            usual = {"code": 1, "stopped": not failures, "failures": failures}
            self._tell(ENDING, {**usual, "why": why, "hang": self.hanging})

    def ended(self, report: Mapping[str, Any], *, why: str) -> None:
        """This node's part has ended; this is the last word."""
        why = self._report.get("why") or why or f"node {self._name}: exit {report['code']}"
        kept = {name: report[name] for name in ("code", "stopped", "oom", "failures")}
        self._tell(ENDED, {**kept, "time": report["ended"], "why": why, "hang": self.hanging})

    def _tell(self, state: str, report: dict[str, Any]) -> None:
        self._state, self._news, self._report = state, self._news + 1, _short(report)

    # What arrives

    def hear(self, message: Mapping[str, Any], *, now: float, wall: float) -> None:
        """A datagram whose signature is right; an old one that somebody repeats is passed over."""
        peer = self.peers.get(message["from"])
        if peer is None or message["to"] != self._rank or message["count"] <= peer.count:
            return
        if peer.silent and peer.state != ENDED:
            self._say(f"launcher: node {peer.name} is heard again, after {now - (peer.heard or now):.0f} s")
        peer.count, peer.heard, peer.refused, peer.silent = message["count"], now, 0, False
        peer.told, peer.quiet, peer.knows = (message["sent"], wall), message["quiet"], message["heard"]
        if message["echo"]:
            sent, arrived = message["echo"]
            delay = (wall - sent) - (message["sent"] - arrived)
            if delay >= 0:  # else a clock was set meanwhile
                peer.clocks.append((delay, ((arrived - sent) + (message["sent"] - wall)) / 2))
        self._spoken |= message["spoken"]
        if message["asks"]:  # for a confirmation
            peer.sent = float("-inf")
        if message["news"] > peer.news:
            peer.news, peer.state, peer.report = message["news"], message["state"], message["report"]

    def refused(self, rank: int) -> None:
        """A datagram came back: that machine is up, and no agent listens there."""
        peer = self.peers.get(rank)
        if peer is not None:
            peer.refused += 1

    # What follows

    def wake(self, now: float) -> None:
        """If this process itself stood still (a paused container, a suspended machine), nobody else is to blame."""
        gap, self._turned = now - self._turned, now
        if gap > MISSED * self._beat:
            self._progress += gap
            for peer in self.peers.values():
                peer.heard = None if peer.heard is None else min(now, peer.heard + gap)

    def judge(self, now: float) -> None:
        """Come to a verdict if there is reason to; call out who falls silent."""
        for peer in self.peers.values():
            if not peer.silent and now - (peer.heard or now) > MISSED * self._beat:
                peer.silent = True
                if peer.state != ENDED:
                    self._say(f"launcher: node {peer.name} is silent on the training network")
        if self._state == ENDED:
            return
        self._tell_unmet(now)
        if not self.verdict:
            self.verdict = self._ending_of_another() or self._loss(now) or self._hang(now)
            if self.verdict:
                self.ending(self.verdict)

    def _living(self) -> Iterator[Peer]:
        """Those that were met and have not said their last word."""
        return (peer for peer in self.peers.values() if peer.heard is not None and peer.state != ENDED)

    def _tell_unmet(self, now: float) -> None:
        unmet = [peer.name for peer in self.peers.values() if peer.heard is None]
        if unmet and not self._unmet_told and now - self._began > UNMET:
            self._unmet_told = True
            self._say(
                f"launcher: nothing was heard of {', '.join(unmet)} on the training network: while no launcher "
                "watches, the end of one of these nodes will not be seen here (is its UDP port closed? see guard in "
                "run.json)"
            )

    def _ending_of_another(self) -> str:
        for peer in self.peers.values():
            if peer.state == ENDING or (peer.state == ENDED and peer.report["code"] != 0):
                self.hanging = bool(peer.report["hang"])
                return str(peer.report["why"])
        return ""

    def _loss(self, now: float) -> str:
        for peer in self._living():
            if why := self._lost(peer, now):
                return f"node {peer.name}: {why}"
        return ""

    def _lost(self, peer: Peer, now: float) -> str:
        gone = peer.refused >= MISSED or now - (peer.heard or now) >= self._grace
        return self._loss_of(peer, now) if gone else ""

    def _loss_of(self, peer: Peer, now: float) -> str:
        if peer.refused >= MISSED:
            return "lost: its agent is gone, though the machine answers"
        return f"lost: silent for {now - (peer.heard or now):.0f} s on the training network"

    def _hang(self, now: float) -> str:
        if self._hang_timeout is None or any(peer.heard is None for peer in self.peers.values()):
            return ""
        quiet = [now - self._progress, *(now - (peer.heard or now) + peer.quiet for peer in self._living())]
        if min(quiet) < (self._hang_timeout if self._spoken else max(self._hang_timeout, START)):
            return ""
        self.hanging = self.decided = True
        return f"no progress: no process of any node wrote anything for {min(quiet):.0f} s"

    # What is to be told

    def due(self, now: float) -> list[int]:
        """The peers to whom a datagram is to be sent now."""
        return [
            rank
            for rank, peer in self.peers.items()
            if now - peer.sent >= (URGENT if peer.knows < self._news and not peer.refused else self._beat)
        ]

    def message(self, rank: int, *, now: float, wall: float) -> dict[str, Any]:
        """Everything that this peer has to know."""
        peer = self.peers[rank]
        peer.sent = now
        self._count += 1
        return {
            "from": self._rank,
            "to": rank,
            "count": self._count,
            "sent": wall,
            "echo": peer.told,
            "quiet": max(0.0, now - self._progress),
            "spoken": self._spoken,
            "state": self._state,
            "news": self._news,
            "heard": peer.news,
            "asks": peer.knows < self._news,
            "report": self._report,
        }

    # The end

    def is_told(self, now: float) -> bool:
        """Whether nobody is left who has yet to hear of our end, or (if it was a bad one) to tell us of his."""
        arriving = now - self._began < ARRIVAL and self._report["code"] != 0
        return all(self._is_done(peer) or (peer.heard is None and not arriving) for peer in self.peers.values())

    def _is_done(self, peer: Peer) -> bool:
        if peer.heard is None:
            return False
        well = self._report["code"] == 0
        if (peer.silent and not well) or peer.refused >= (1 if peer.state == ENDED else MISSED):
            return True
        return peer.knows >= self._news and (well or peer.state == ENDED)

    def others(self, *, now: float, wall: float) -> list[dict[str, Any]]:
        """What is known of the other nodes, with times by our clock: what they said, or that they are gone."""
        return [
            report
            for peer in self.peers.values()
            if peer.heard is not None and (report := self._heard_of(peer, now=now, wall=wall))
        ]

    def _heard_of(self, peer: Peer, *, now: float, wall: float) -> dict[str, Any]:
        usual = {"node": peer.name, "time": wall, "code": 0, "stopped": False, "oom": False, "lost": "", "failures": []}
        if peer.report:
            ahead = peer.ahead or 0.0
            said = {name: peer.report.get(name, usual[name]) for name in usual}
            failures = [{**one, "time": one["time"] - ahead} for one in said["failures"]]
            return {**said, "time": said["time"] - ahead, "failures": failures}
        if not peer.silent and peer.refused < MISSED:
            return {}
        heard = wall - (now - (peer.heard or now))
        return {**usual, "time": heard, "code": 1, "lost": self._loss_of(peer, now)}

    @property
    def clock(self) -> float | None:
        """How far our clock is ahead of the first node's, in seconds; None when that could not be found out."""
        if self._rank == 0:
            return 0.0
        ahead = self.peers[0].ahead if 0 in self.peers else None
        return None if ahead is None else -ahead


def _short(report: dict[str, Any]) -> dict[str, Any]:
    """A report that fits into a datagram."""
    failures = [{**one, "message": one["message"][:SHORT]} for one in report["failures"][:KEPT]]
    return {**report, "failures": failures}


class Guard(Gang):
    """The gang with its socket, bound to this node's own training address."""

    def __init__(self, run: Mapping[str, Any], *, say: Callable[[str], None]) -> None:
        super().__init__(run, now=time.monotonic(), say=say)
        peers = run["guard"]["peers"]
        self._grace_of_job = float(run["stop_grace"])
        self._addresses = {rank: (_as_the_kernel(one["address"]), int(one["port"])) for rank, one in enumerate(peers)}
        self._ranks = {address: rank for rank, address in self._addresses.items()}
        self._key = b""
        self._socket: socket.socket | None = None
        if not self.peers:
            return
        address, port = self._addresses[self._rank]
        try:
            self._key = _load_key(Path(run["files"], "guard.key"))
            self._socket = _listen(address, port)
        except (OSError, ValueError, OverflowError) as error:
            say(f"launcher: this node is not guarded: cannot listen on {address} port {port} (UDP): {error}")
            self._unmet_told = True

    @property
    def fd(self) -> int | None:
        """What to wait for; None when there is nothing to be heard."""
        return None if self._socket is None else self._socket.fileno()

    def patience(self) -> float:
        """How long the next turn may wait when nothing arrives, in seconds."""
        return URGENT if self.peers else 1.0

    def turn(self) -> None:
        """Hear what has arrived, judge, tell what is due."""
        self.wake(time.monotonic())
        if self._socket is not None:
            self._receive(self._socket)
        self.judge(time.monotonic())
        if self._socket is not None:
            self._send(self._socket)

    def part(self, report: Mapping[str, Any], *, why: str, hurry: Callable[[], bool]) -> None:
        """Say how this node's part ended until the others have heard it, and hear how theirs do; bounded in time."""
        self.ended(report, why=why)
        if self._socket is None:
            return
        began = time.monotonic()
        patience = FAREWELL if report["code"] == 0 else self._grace_of_job + GATHERING
        self.turn()
        while not self.is_told(time.monotonic()):
            if time.monotonic() - began > (HURRY if hurry() else patience):
                return
            select.select([self._socket], [], [], URGENT / 2)
            self.turn()

    def _receive(self, ours: socket.socket) -> None:
        for _ in range(BURST):
            try:
                data = ours.recv(LONGEST)
            except BlockingIOError:
                return
            except OSError:
                self._take_refusals(ours)
                continue
            message = unseal(self._key, data)
            if message is not None:
                self.hear(message, now=time.monotonic(), wall=time.time())

    def _take_refusals(self, ours: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                _data, extras, _flags, address = ours.recvmsg(0, 512, ERRQUEUE)
                # The kernel's sock_extended_err begins with the error's number; the address is whom we had written to.
                codes = [struct.unpack_from("=I", extra)[0] for _level, _kind, extra in extras]
                if errno.ECONNREFUSED in codes:
                    self.refused(self._ranks.get(address[:2], -1))

    def _send(self, ours: socket.socket) -> None:
        for rank in self.due(time.monotonic()):
            data = seal(self._key, self.message(rank, now=time.monotonic(), wall=time.time()))
            for _twice in range(
                2
            ):  # what came back of an earlier datagram is told by the next call, which sends nothing
                with contextlib.suppress(OSError):
                    ours.sendto(data, self._addresses[rank])
                    break
        self._take_refusals(ours)


def _load_key(path: Path) -> bytes:
    key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    if len(key) < SIGNATURE:
        raise ValueError(f"{path} holds no key of {SIGNATURE} bytes")
    return key


def _as_the_kernel(address: str) -> str:
    """An address as the kernel writes it: by it we see whose a refusal is."""
    return str(ipaddress.ip_address(address))


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with contextlib.suppress(OSError):  # not Linux: a closed port then looks like silence
            made.setsockopt(*RECVERR[family], 1)
        made.bind((address, port))
    except BaseException:
        made.close()
        raise
    return made


def seal(key: bytes, message: Mapping[str, Any]) -> bytes:
    """A message as a datagram: its signature (HMAC-SHA256, RFC 2104) and its JSON."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return hmac.digest(key, text, "sha256") + text


def unseal(key: bytes, data: bytes) -> dict[str, Any] | None:
    """The message of a datagram; None where the signature is not one made with this key."""
    signature, text = data[:SIGNATURE], data[SIGNATURE:]
    if not hmac.compare_digest(signature, hmac.digest(key, text, "sha256")):
        return None
    message: dict[str, Any] = json.loads(text)
    return message
