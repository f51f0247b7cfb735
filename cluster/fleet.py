"""Many machines at once: everyone answers, within a deadline, before anyone is judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import BoundedSemaphore, Thread
from typing import Generic, Protocol, TypeVar

from cluster.engine import Engine
from cluster.errors import CommandError, NodeError, UnreachableError
from cluster.facts import NodeFacts, read_survey, survey_command
from cluster.inventory import Inventory, Node
from cluster.transport import Transport
from cluster.trust import Address

T = TypeVar("T")


class Named(Protocol):
    """Whatever stands for one machine."""

    @property
    def name(self) -> str:
        """The node's name."""


M = TypeVar("M", bound=Named)

# sshd's MaxStartups begins to drop unauthenticated connections at 10, and a bastion sees all of ours: the transport
# retries those; 32 threads were the fastest in a fan-out to a thousand hosts.
WIDTH = 32
GOODBYE = 1.0  # seconds for all machines together


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One node's two hands."""

    name: str
    transport: Transport
    engine: Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers(Generic[T]):
    """What everyone said: values by node name, errors by node name."""

    good: Mapping[str, T] = field(default_factory=dict)
    bad: Mapping[str, NodeError] = field(default_factory=dict)

    def then(self, later: Answers[T]) -> Answers[T]:
        """These answers, and later ones, which count instead where they are of the same node."""
        again = {*later.good, *later.bad}
        good = {node: value for node, value in self.good.items() if node not in again}
        bad = {node: error for node, error in self.bad.items() if node not in again}
        return Answers(good={**good, **later.good}, bad={**bad, **later.bad})

    def all_or_raise(self) -> Mapping[str, T]:
        """The values; or the first node's error, with the other nodes' errors as its detail."""
        if not self.bad:
            return self.good
        first, *others = self.bad.values()
        cure = f"  next: {first.next_step}"  # once, where it is the same for all
        said = (line for other in others for line in str(other).splitlines() if line != cure)
        first.detail = (*first.detail, *said)
        raise first


def each(
    machines: Sequence[M],
    act: Callable[[M], T],
    *,
    deadline: float | None = None,
    width: int = WIDTH,
) -> Answers[T]:
    """Do `act` on every machine at once (at most `width`); a `NodeError` is an answer, any other error is a bug.

    A machine that has not answered after `deadline` seconds is reported as unreachable; its thread is left behind.
    """
    gate = BoundedSemaphore(width)
    futures: dict[Future[T], str] = {}
    for machine in machines:
        future: Future[T] = Future()
        futures[future] = machine.name
        # Daemon threads, not a pool: a pool's exit would wait for the one that hangs.
        Thread(target=_answer, args=(future, gate, act, machine), daemon=True).start()
    end = None if deadline is None else time.monotonic() + deadline
    pending = set(futures)
    while pending:
        left = None if end is None else max(0.0, end - time.monotonic())
        # Short waits keep Ctrl-C prompt: a lock held for ever cannot be interrupted everywhere.
        done, pending = wait(pending, timeout=0.5 if left is None else min(0.5, left), return_when=FIRST_COMPLETED)
        if left == 0.0 and not done:
            break
    return _collect(futures, deadline)


def _answer(future: Future[T], gate: BoundedSemaphore, act: Callable[[M], T], machine: M) -> None:
    with gate:
        if not future.set_running_or_notify_cancel():
            return  # the deadline passed while this one waited for its turn: nobody would hear of what it did
        try:
            future.set_result(act(machine))
        except BaseException as error:  # noqa: BLE001 - handed to the caller, who re-raises what is no NodeError
            future.set_exception(error)


def _collect(futures: Mapping[Future[T], str], deadline: float | None) -> Answers[T]:
    good: dict[str, T] = {}
    bad: dict[str, NodeError] = {}
    for future, node in futures.items():
        if future.cancel() or not future.done():
            bad[node] = UnreachableError(node, f"no answer within {deadline:g} s")
            continue
        error = future.exception()
        if error is None:
            good[node] = future.result()
        elif isinstance(error, NodeError):
            bad[node] = error
        else:
            raise error
    return Answers(good=good, bad=bad)


@contextmanager
def closing(machines: Sequence[Machine]) -> Iterator[Sequence[Machine]]:
    """Lets go of every machine at the end, whatever happened; of one that hangs after a moment without a goodbye."""
    try:
        yield machines
    finally:
        threads = [Thread(target=_let_go, args=(machine,), daemon=True) for machine in machines]
        for thread in threads:
            thread.start()
        end = time.monotonic() + GOODBYE
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))


def _let_go(machine: Machine) -> None:
    machine.engine.close()
    machine.transport.close()


def ask_facts(machine: Machine, *, paths: Sequence[str], peers: Sequence[str], engine: str) -> NodeFacts:
    """Ask one machine for its facts, in one round trip."""
    machine.transport.open()
    sent = time.time()
    answer = machine.transport.run(survey_command(paths=paths, peers=peers, engine=engine), timeout=30)
    received = time.time()
    if not answer.ok:
        raise CommandError(
            machine.name,
            f"the survey ended with exit code {answer.code}",
            detail=answer.tail(),
            next_step="the account must be able to run commands with sh",
        )
    return read_survey(answer.text, sent=sent, received=received)


def connect(inventory: Inventory, *, known_hosts: Path) -> tuple[Machine, ...]:
    """Hands for every node of an inventory. Nothing is reached yet: that happens when they are first asked."""
    return tuple(_machine(inventory, node, known_hosts) for node in inventory.nodes)


def _machine(inventory: Inventory, node: Node, known_hosts: Path) -> Machine:
    # The hands are imported here: each loads a large library that the other ones do not need.
    transport: Transport
    engine: Engine
    if node.transport == "local":
        from cluster.local import LocalTransport

        transport = LocalTransport(node.name)
    else:
        from cluster.ssh import SshTransport

        transport = SshTransport(address_of(node), known_hosts=known_hosts)
    if inventory.engine == "process":
        from cluster.processes import ProcessEngine

        engine = ProcessEngine(
            node.name, Path(node.paths.state).expanduser() / inventory.name / node.name / "processes"
        )
    else:
        from cluster.dockerd import DockerEngine

        engine = DockerEngine(transport)
    return Machine(name=node.name, transport=transport, engine=engine)


def address_of(node: Node) -> Address:
    """Where SSH finds a node, as the inventory says it."""
    return Address(
        node=node.name,
        host=node.host,
        port=node.port,
        user=node.user,
        identity_file=str(node.identity_file) if node.identity_file else None,
        jump=node.jump,
    )
