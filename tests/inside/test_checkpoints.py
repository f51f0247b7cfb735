"""Checkpoints of several nodes on this machine: real files, real programs on every node, lines that drop."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.command import Command, Result
from cluster.container import LABEL_CLUSTER, LABEL_NODE, LABEL_OWNER, LABEL_ROLE, ContainerSpec
from cluster.document import read
from cluster.errors import CommandError, InputError, IntegrityError, LockedError, PreconditionError, UnreachableError
from cluster.fleet import Machine
from cluster.inventory import read_inventory
from cluster.local import LocalTransport
from cluster.processes import ProcessEngine
from cluster.transport import Sink
from launcher import checkpoints, gathering, render, shards
from launcher.checks import Finding
from launcher.events import CheckpointPlaced, CheckpointVerified
from launcher.image import Progress
from launcher.record import Memory
from launcher.session import Session
from launcher.views import checkpoints as views
from tests.pure import kept

UNIT = f"{kept.RUN}/step-00000004"
OLDER = f"{kept.RUN}/step-00000002"
GATHERED = f"gathered/{UNIT}"
MIB = 1 << 20


class Line(LocalTransport):
    """This machine as a node, over a line that may drop: `cuts` are the bytes after which it does, once each."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.cuts: list[int] = []
        self.carried = 0
        self._lock = threading.Lock()

    def stream(self, command: Command, sink: Sink, *, stop: Callable[[], bool]) -> int:
        def count(chunk: bytes) -> None:
            with self._lock:
                self.carried += len(chunk)
                cut = bool(self.cuts) and self.carried >= self.cuts[0]
            if cut:
                raise UnreachableError(self.node, "the connection was lost")
            sink(chunk)

        try:
            return super().stream(command, count, stop=stop)
        except UnreachableError:
            self.cuts.pop(0)
            raise

    def send(self, command: Command, chunks: Iterable[bytes]) -> Result:
        return super().send(command, chunks)


@dataclass
class Heard:
    """A voice that remembers."""

    said: list[str] = field(default_factory=list)
    carried: list[tuple[int, int]] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, finding: Finding) -> None:
        self.said.append(str(finding))

    def building(self, progress: Progress) -> None:
        raise NotImplementedError

    def shipping(self, node: str, taken: int, total: int) -> None:
        raise NotImplementedError

    def carrying(self, name: str, taken: int, total: int, left: float | None) -> None:  # noqa: ARG002
        self.carried.append((taken, total))

    def done(self) -> None:
        pass


@dataclass
class Site:
    """Nodes that are up, each with a checkpoints folder of its own, and a session with them."""

    now: Session
    cluster: kept.Cluster
    lines: dict[str, Line]
    voice: Heard
    home: Path

    def machine(self, node: str) -> Machine:
        return next(one for one in self.now.machines if one.name == node)

    def tree(self, folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def whole(self, unit: str = UNIT) -> dict[str, bytes]:
        """All files of all nodes."""
        return {
            path: content
            for node in self.cluster.names
            for path, content in self.tree(self.cluster.of(node) / unit).items()
        }

    def events(self) -> list[object]:
        return list(self.now.memory.run(kept.RUN).events())


def idle(machine: Machine, checkpoints_folder: Path) -> str:
    """A node's idle container."""
    labels = {
        LABEL_CLUSTER: "lab",
        LABEL_OWNER: machine.transport.user,
        LABEL_NODE: machine.name,
        LABEL_ROLE: render.ROLE_NODE,
    }
    spec = ContainerSpec(
        name=f"launcher-lab-{machine.name}-node",
        image="process",
        argv=("tail", "-f", "/dev/null"),
        labels=labels,
        env={"LAUNCHER_CHECKPOINTS": str(checkpoints_folder)},
        workdir="/",
    )
    made = machine.engine.create(spec)
    machine.engine.start(made)
    return made


def make_site(tmp_path: Path, cluster: kept.Cluster) -> Iterator[Site]:
    nodes = [{"name": name, "host": "localhost", "transport": "local"} for name in cluster.names]
    text = json.dumps({"name": "lab", "engine": "process", "accelerator": "cpu", "nodes": nodes})
    inventory = read_inventory(read(text, "cluster.yaml"), home=tmp_path)
    lines = {name: Line(name) for name in cluster.names}
    machines = tuple(
        Machine(name=name, transport=lines[name], engine=ProcessEngine(name, tmp_path / "processes" / name))
        for name in cluster.names
    )
    voice = Heard()
    memory = Memory(tmp_path / "state").cluster("lab")
    (memory.folder / "runs" / kept.RUN).mkdir(parents=True)
    now = Session(inventory=inventory, memory=memory, machines=machines, voice=voice)
    containers = [(machine, idle(machine, cluster.of(machine.name))) for machine in machines]
    try:
        yield Site(now=now, cluster=cluster, lines=lines, voice=voice, home=tmp_path)
    finally:
        for machine, container in containers:
            machine.engine.remove(container)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    yield from make_site(tmp_path, kept.trained(tmp_path / "nodes"))


def spoil(file: Path, at: int = 77) -> None:
    """Flip one bit, as a disk does: the time stays."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


# To one place


@pytest.mark.parametrize("to", ["folder", "gpu-01"])
def test_a_gathered_checkpoint_is_the_union_of_all_parts(site: Site, to: str) -> None:
    target = str(site.home / "kept") if to == "folder" else to
    root = site.home / "kept" if to == "folder" else site.cluster.of(to)
    done = gathering.gather(site.now, to=target)
    assert site.tree(root / GATHERED) == site.whole()
    size = sum(len(content) for path, content in site.whole().items() if not path.startswith((".", "latest")))
    here = site.tree(site.cluster.of("gpu-01") / UNIT)
    own = sum(len(content) for path, content in here.items() if not path.startswith((".", "latest")))
    assert (done.unit, done.bytes, done.sent) == (UNIT, size, size if to == "folder" else size - own)
    again = gathering.gather(site.now, to=target)
    assert (again.folder, again.sent) == (done.folder, 0)
    assert [type(event) for event in site.events()] == [CheckpointPlaced, CheckpointPlaced]
    taken, total = site.voice.carried[-1]
    assert taken == total == size


def test_a_gather_takes_the_checkpoint_that_is_named(site: Site) -> None:
    for asked in ("2", "step-00000002", OLDER):
        shutil.rmtree(site.home / "kept", ignore_errors=True)
        assert gathering.gather(site.now, tag=asked, to=str(site.home / "kept")).unit == OLDER
    with pytest.raises(InputError, match="no checkpoint '7'"):
        gathering.gather(site.now, tag="7", to=str(site.home / "kept"))
    with pytest.raises(InputError, match="no checkpoint of 20990101-000000-0000"):
        gathering.gather(site.now, run="20990101-000000-0000", to=str(site.home / "kept"))
    with pytest.raises(InputError, match="neither a node nor a folder"):
        gathering.gather(site.now, to="/dev/null/x")


def test_a_node_that_is_not_up_is_named_with_the_cure(site: Site) -> None:
    machine = site.machine("gpu-02")
    for one in machine.engine.find({}):
        machine.engine.remove(one.id)
    with pytest.raises(CommandError, match="node gpu-02: it is not up\n  next: launcher up"):
        gathering.gather(site.now, to=str(site.home / "kept"))


def big(tmp_path: Path, *, mib: int) -> kept.Cluster:
    """Two nodes with a large shard each."""
    cluster = kept.Cluster(tmp_path / "nodes", ("gpu-01", "gpu-02"), 1, 3)
    cluster.save(UNIT, step=4)
    for node, rank in (("gpu-01", 0), ("gpu-02", 1)):
        name = f"pytorch_model/offloaded_tensors/rank0{rank}/a.swp"
        path = cluster.of(node) / UNIT / name
        path.parent.mkdir(parents=True)
        path.write_bytes(os.urandom(mib * MIB))
    cluster.seal()
    return cluster


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Site]:
    yield from make_site(tmp_path, big(tmp_path, mib=40))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_f51_an_interrupted_gather_goes_on_from_where_it_was(large: Site, share: float) -> None:
    line, to = large.lines["gpu-02"], large.home / "kept"
    size = len(large.whole()["pytorch_model/offloaded_tensors/rank01/a.swp"])
    # The line drops at every try, a little later each time: the command gives up, and says how to go on.
    first = int(share * size)
    line.cuts = [first, first, first, first]
    with pytest.raises(UnreachableError, match="the same command goes on from where it was"):
        gathering.gather(large.now, to=str(to))
    assert not (to / GATHERED).exists()
    line.cuts = []
    done = gathering.gather(large.now, to=str(to))
    assert large.tree(to / GATHERED) == large.whole()
    assert done.bytes > 2 * 40 * MIB
    resent = line.carried - size
    assert resent <= 0.05 * size + 4 * shards.PIECE  # one piece for each time that the line dropped


def test_f51_one_dropped_line_costs_at_most_a_piece(large: Site) -> None:
    line, to = large.lines["gpu-02"], large.home / "kept"
    size = sum(len(content) for content in large.tree(large.cluster.of("gpu-02") / UNIT).values())
    line.cuts = [size // 2]
    gathering.gather(large.now, to=str(to))
    assert large.tree(to / GATHERED) == large.whole()
    assert line.carried - size <= 0.05 * size + shards.PIECE


def lease(site: Site, token: str) -> Path:
    folder = site.home / "kept/gathered" / kept.RUN
    folder.mkdir(parents=True)
    file = folder / ".launcher-lease-step-00000004"
    file.write_text(token)
    return file


def test_f46_two_gathers_to_one_place_do_not_meet(site: Site) -> None:
    file = lease(site, "elsewhere:1:0123")
    with pytest.raises(LockedError, match="another command is bringing this there") as caught:
        gathering.gather(site.now, to=str(site.home / "kept"))
    assert caught.value.exit_code == 7
    assert caught.value.detail[0] == "held by elsewhere:1:0123"
    assert file.read_text() == "elsewhere:1:0123"
    # One that lives here, as this test does; and one that is proven dead.
    file.write_text(f"{os.uname().nodename}:{os.getpid()}:0123")
    with pytest.raises(LockedError):
        gathering.gather(site.now, to=str(site.home / "kept"))
    gone = subprocess.Popen(["true"])
    gone.wait()
    file.write_text(f"{os.uname().nodename}:{gone.pid}:0123")
    gathering.gather(site.now, to=str(site.home / "kept"))
    assert not file.exists()


def test_f50_what_changed_since_is_named_and_nothing_is_shown(site: Site) -> None:
    to = site.home / "kept"
    gathering.gather(site.now, to=str(to))
    before = site.tree(to / GATHERED)
    path = "pytorch_model/zero_pp_rank_3_mp_rank_00_optim_states.pt"
    spoil(site.cluster.of("gpu-02") / UNIT / path)
    with pytest.raises(IntegrityError, match="changed: node gpu-02: ") as caught:
        gathering.gather(site.now, to=str(site.home / "other"))
    assert path in str(caught.value)
    assert not (site.home / "other" / GATHERED).exists()
    assert site.tree(to / GATHERED) == before


def test_a_shard_that_is_missing_is_refused_before_anything_travels(site: Site) -> None:
    path = "pytorch_model/zero_pp_rank_2_mp_rank_00_model_states.pt"
    file = site.cluster.of("gpu-02") / UNIT / path
    length = file.stat().st_size
    file.unlink()
    with pytest.raises(IntegrityError, match=f"missing: node gpu-02: {path}"):
        gathering.gather(site.now, tag="4", to=str(site.home / "kept"))
    assert list((site.home).glob("kept/**/*.pt")) == []
    # Without a name the newest that verifies is taken instead, and this is said.
    done = gathering.gather(site.now, to=str(site.home / "kept"))
    assert done.unit == OLDER
    assert done.notes == (f"{UNIT} does not verify: missing: node gpu-02: {path}: it had {length:,} bytes",)


def test_f52_a_tree_with_a_link_is_refused(site: Site) -> None:
    (site.cluster.of("gpu-02") / UNIT / "pytorch_model/x.pt").symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError, match=r"refused: node gpu-02: pytorch_model/x.pt: a link"):
        gathering.gather(site.now, tag="4", to=str(site.home / "kept"))
    assert not (site.home / "kept").exists()


def test_f53_where_there_is_no_room_nothing_is_touched(large: Site) -> None:
    place = large.home / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "launcher-test", place], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting needs root")
    try:
        (place / GATHERED).mkdir(parents=True)
        (place / GATHERED / "old").write_text("old")
        with pytest.raises(PreconditionError, match="there is no room for it") as caught:
            gathering.gather(large.now, to=str(place))
        assert caught.value.where == str(place)
        assert large.tree(place) == {f"{GATHERED}/old": b"old"}
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize("latest", ["", "pytorch_mo", "elsewhere", None])
def test_f54_a_bad_latest_is_said_and_mended_in_the_copy(site: Site, latest: str | None) -> None:
    file = site.cluster.of("gpu-01") / UNIT / "latest"
    file.unlink()
    if latest is not None:
        file.write_text(latest)
    done = gathering.gather(site.now, to=str(site.home / "kept"))
    assert (done.unit, len(done.notes)) == (UNIT, 1)
    assert done.notes[0].startswith(f"{UNIT}/latest: it ")
    assert (site.home / "kept" / GATHERED / "latest").read_text() == "pytorch_model"
    (verdict,) = checkpoints.verify(site.now)
    assert [flaw.kind for flaw in verdict.flaws] == ["latest"]


def test_f54_deepspeeds_own_tags_follow_latest_while_it_is_right(tmp_path: Path) -> None:
    cluster = kept.Cluster(tmp_path / "nodes", ("gpu-01", "gpu-02"), 1, 2)
    for step in (10, 20):
        cluster.save(f"{kept.RUN}/global_step{step}", step=step, style="deepspeed")
    cluster.seal()
    latest = cluster.of("gpu-01") / kept.RUN / "latest"
    sites = make_site(tmp_path, cluster)
    site = next(sites)
    try:
        latest.write_text("global_step10")
        done = gathering.gather(site.now, to=str(tmp_path / "kept"))
        assert (done.unit, done.notes) == (f"{kept.RUN}/global_step10", ())
        assert (tmp_path / f"kept/gathered/{kept.RUN}/latest").read_text() == "global_step10"
        latest.write_text("")
        done = gathering.gather(site.now, to=str(tmp_path / "kept"))
        assert (done.unit, done.notes) == (f"{kept.RUN}/global_step20", (f"{kept.RUN}/latest: it is empty",))
        assert (tmp_path / f"kept/gathered/{kept.RUN}/latest").read_text() == "global_step20"
        (copied,) = gathering.scatter(
            site.now, str(tmp_path / f"kept/gathered/{kept.RUN}/global_step20"), to=("gpu-02",)
        )
        assert (cluster.of("gpu-02") / copied.folder / "../latest").read_text() == "global_step20"
    finally:
        sites.close()  # type: ignore[attr-defined]


# Whether it is whole


def test_every_byte_is_read_again_and_the_verdict_is_remembered(site: Site) -> None:
    (good,) = checkpoints.verify(site.now)
    assert (good.ok, good.kept.unit, good.kept.world_size) == (True, UNIT, 4)
    spoil(site.cluster.of("gpu-01") / OLDER / "random_states_1.pkl")
    older, newer = checkpoints.verify(site.now, every=True)
    assert [(flaw.kind, flaw.place, flaw.path) for flaw in older.flaws] == [
        ("changed", "gpu-01", "random_states_1.pkl")
    ]
    assert newer.ok
    events = [event for event in site.events() if isinstance(event, CheckpointVerified)]
    assert [(event.unit, len(event.flaws)) for event in events] == [(UNIT, 0), (OLDER, 1), (UNIT, 0)]
    rows = views.rows(checkpoints.kept(checkpoints.places(site.now)), checkpoints.last_verified(events))
    assert [(row["unit"], row["state"], row["verified"] is not None) for row in rows] == [
        (OLDER, "whole", False),
        (UNIT, "whole", True),
    ]


def test_a_copy_is_verified_too(site: Site) -> None:
    gathering.gather(site.now, to="gpu-02")
    assert checkpoints.verify(site.now)[0].copies == {"gpu-02": ()}
    spoil(site.cluster.of("gpu-02") / GATHERED / "random_states_0.pkl")
    (verdict,) = checkpoints.verify(site.now)
    assert (verdict.flaws, [flaw.kind for flaw in verdict.copies["gpu-02"]], verdict.ok) == ((), ["changed"], False)
    # A new gather replaces it.
    gathering.gather(site.now, to="gpu-02")
    assert checkpoints.verify(site.now)[0].ok


def test_what_strayed_from_another_run_or_step_is_known(tmp_path: Path) -> None:
    cluster = kept.trained(tmp_path / "nodes")
    kept.trained(tmp_path / "nodes", run=kept.OTHER_RUN)
    for site in make_site(tmp_path, cluster):
        path = "pytorch_model/zero_pp_rank_2_mp_rank_00_optim_states.pt"
        folder = cluster.of("gpu-02")
        shutil.copy(folder / kept.OTHER_RUN / "step-00000004" / path, folder / UNIT / path)
        (verdict,) = checkpoints.verify(site.now, run=kept.RUN)
        assert [(flaw.kind, flaw.place, flaw.path, flaw.what) for flaw in verdict.flaws] == [
            ("foreign", "gpu-02", path, f"it is {path} of {kept.OTHER_RUN}/step-00000004")
        ]


def test_nobody_s_word_can_be_given_late(tmp_path: Path) -> None:
    cluster = kept.Cluster(tmp_path / "nodes", ("gpu-01", "gpu-02"), 2, 3)
    cluster.save(UNIT, step=4)
    cluster.seal("gpu-01")
    for site in make_site(tmp_path, cluster):
        with pytest.raises(IntegrityError, match=rf"unsealed: node gpu-02.*\n.*--seal {kept.RUN} --tag step-00000004"):
            gathering.gather(site.now, to=str(tmp_path / "kept"))
        (verdict,) = checkpoints.verify(site.now, seal=True)
        assert (verdict.ok, verdict.sealed) == (True, ("gpu-02",))
        assert checkpoints.verify(site.now)[0].ok
        assert gathering.gather(site.now, to=str(tmp_path / "kept")).unit == UNIT


def test_what_is_torn_is_not_sealed_late(tmp_path: Path) -> None:
    cluster = kept.Cluster(tmp_path / "nodes", ("gpu-01", "gpu-02"), 2, 3)
    cluster.save(UNIT, step=4)
    os.truncate(cluster.of("gpu-02") / UNIT / "random_states_2.pkl", 300)
    for site in make_site(tmp_path, cluster):
        (verdict,) = checkpoints.verify(site.now, seal=True)
        assert (verdict.sealed, {flaw.kind for flaw in verdict.flaws}) == ((), {"unsealed", "torn"})


def test_what_a_run_can_go_on_from_is_the_newest_that_verifies(site: Site) -> None:
    newest = checkpoints.newest_verified(site.now)
    assert newest is not None
    assert (newest.run, newest.unit, newest.step, newest.world_size) == (kept.RUN, UNIT, 4, 4)
    assert newest.nodes == {"gpu-01": (0, 1), "gpu-02": (2, 3)}
    assert (newest.copies, newest.why) == ((), ())
    spoil(site.cluster.of("gpu-02") / UNIT / "random_states_2.pkl")
    assert checkpoints.newest_verified(site.now) == newest  # nothing was read
    older = checkpoints.newest_verified(site.now, read=True)
    assert older is not None
    assert (older.unit, older.step) == (OLDER, 2)
    assert older.why[0].startswith(f"{UNIT} does not verify: changed: node gpu-02: random_states_2.pkl")
    shutil.rmtree(site.cluster.of("gpu-01"))
    site.cluster.of("gpu-01").mkdir()
    assert checkpoints.newest_verified(site.now) is None
    assert checkpoints.newest_verified(site.now, run="20990101-000000-0000") is None


# And onto all


def test_a_gathered_checkpoint_comes_onto_every_node(site: Site) -> None:
    gathering.gather(site.now, to=str(site.home / "kept"))
    done = gathering.scatter(site.now, str(site.home / "kept" / GATHERED))
    assert [one.place for one in done] == ["gpu-01", "gpu-02"]
    for node in site.cluster.names:
        assert site.tree(site.cluster.of(node) / GATHERED) == site.whole()
    assert [one.sent for one in gathering.scatter(site.now, f"gpu-01:{GATHERED}")] == [0, 0]


def test_a_scatter_from_a_node_leaves_that_one_as_it_is(site: Site) -> None:
    gathering.gather(site.now, to="gpu-02")
    done = gathering.scatter(site.now, f"gpu-02:{GATHERED}", to=("gpu-01",))
    assert [(one.place, one.sent > 0) for one in done] == [("gpu-01", True)]
    assert site.tree(site.cluster.of("gpu-01") / GATHERED) == site.whole()


def test_only_what_is_whole_is_scattered(site: Site) -> None:
    gathering.gather(site.now, to=str(site.home / "kept"))
    spoil(site.home / "kept" / GATHERED / "random_states_0.pkl")
    with pytest.raises(IntegrityError, match=r"changed: node this machine: random_states_0.pkl"):
        gathering.scatter(site.now, str(site.home / "kept" / GATHERED))
    assert not (site.cluster.of("gpu-01") / "gathered").exists()
    for source, why in (
        (str(site.home / "nothing"), "no such folder here"),
        (str(site.home), "no checkpoint that was gathered"),
        ("gpu-01:gathered/x", "no checkpoint that was gathered"),
        ("gpu-09:gathered/x", "no such folder here"),
    ):
        with pytest.raises(InputError, match=why):
            gathering.scatter(site.now, source)
    with pytest.raises(IntegrityError, match="leads out"):
        gathering.scatter(site.now, "gpu-01:../x")
    with pytest.raises(InputError, match="there is no node 'gpu-09'"):
        gathering.scatter(site.now, str(site.home / "kept" / GATHERED), to=("gpu-09",))


def test_tables_tell_what_there_is(site: Site) -> None:
    gathering.gather(site.now, to="gpu-02")
    found = checkpoints.kept(checkpoints.places(site.now))
    text = views.list_text(views.rows(found, {}), now=found[-1].modified)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["CHECKPOINT", "STEP", "SIZE", "PROCESSES", "NODES", "STATE", "VERIFIED", "COPIES", "AGE"]
    assert lines[2][:2] + lines[2][4:8] == [UNIT, "4", "4", "gpu-01,gpu-02", "whole", "-"]
    assert "gpu-02" in lines[2][8]
    assert views.size(999) == "999 B"
    assert views.size(12_345_678) == "12.3 MB"
    assert views.size(5 * 10**12) == "5.00 TB"
