"""Facts: what a machine says of itself. A probe is a question (shell) and a pure reading of the answer.

All probes of a survey travel as one POSIX script and come back in one answer, so that a survey costs one round trip;
nothing but `sh` is needed on the machine, and a tool that is missing there makes its fact empty, not the survey fail.
A tool that hangs is left behind after some seconds, where the machine has `timeout`, and its probe is called stuck.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.command import Command, script


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One CUDA device. `memory` in bytes; `capability` as (major, minor)."""

    index: int
    name: str
    uuid: str
    memory: int
    driver: str
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A network interface that is up, with its global addresses."""

    name: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """What stands at a configured path. `free` in bytes; `on_root` when it shares the root file system's device.

    `stuck`: to look at it hangs, as on a network disk whose server is gone. `leads_to`: the real path, where links make
    it another one than `path`.
    """

    path: str
    exists: bool
    is_dir: bool = False
    on_root: bool = False
    writable: bool = False
    free: int = 0
    stuck: bool = False
    leads_to: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A TCP port somebody listens on, and who, where the system says so. `exposed`: not only for this machine."""

    port: int
    owner: str = ""
    exposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerFact:
    """The container engine as its own client sees it; `error` when it cannot be used."""

    version: str = ""
    runtimes: tuple[str, ...] = ()
    rootless: bool = False
    root: str = ""
    memlock: int | None = None  # bytes a container may lock unless it is given more; None: unlimited, or unknown
    error: str = ""
    runc: str = ""  # the versions of what starts the containers, empty where unknown
    toolkit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Who and what: architecture, kernel, and the account that we log in with."""

    kernel: str
    arch: str
    user: str
    uid: int
    gid: int
    home: str
    cpus: int
    memory: int
    shm: int
    clock: float
    groups: tuple[int, ...] = ()  # every group of the account, `gid` among them


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """Everything one machine said. `clock_offset` is its clock minus ours, in seconds; `stuck` the probes that hang."""

    system: System
    gpus: tuple[Gpu, ...]
    nics: tuple[Nic, ...]
    disks: tuple[Disk, ...]
    listeners: tuple[Listener, ...]
    docker: DockerFact
    routes: Mapping[str, str]  # peer, as it was asked for -> interface that leads there
    clock_offset: float = 0.0
    stuck: tuple[str, ...] = ()

    def disk(self, path: str) -> Disk:
        """The fact about a path; one that was never asked for does not exist."""
        unknown = Disk(path=path, exists=False, stuck="disks" in self.stuck)
        return next((disk for disk in self.disks if disk.path == path), unknown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A question and the pure reading of its answer. `text` sees the survey's arguments as shell variables.

    `bounded`: it asks what may hang, so it gets a shell of its own and `PATIENCE`.
    """

    name: str
    text: str
    read: Callable[[str], object]
    bounded: bool = False


def read_system(text: str) -> System:
    """Reads the `key=value` lines of the system probe."""
    said = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return System(
        kernel=said.get("kernel", ""),
        arch=said.get("arch", ""),
        user=said.get("user", ""),
        uid=_integer(said.get("uid", "")),
        gid=_integer(said.get("gid", "")),
        home=said.get("home", ""),
        cpus=_integer(said.get("cpus", "")) or 1,
        memory=_integer(said.get("memory", "")) * 1024,
        shm=_integer(said.get("shm", "")) * 1024,
        clock=_seconds(said.get("clock", "")),
        groups=tuple(int(word) for word in said.get("groups", "").split() if word.isdecimal()),
    )


def read_gpus(text: str) -> tuple[Gpu, ...]:
    """Reads `nvidia-smi --query-gpu=index,name,uuid,memory.total,driver_version,compute_cap --format=csv,…`."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 6 or not cells[0].isdigit():  # noqa: PLR2004 - six columns were asked for
            continue
        major, _, minor = cells[5].partition(".")
        gpus.append(
            Gpu(
                index=int(cells[0]),
                name=cells[1],
                uuid=cells[2],
                memory=_integer(cells[3]) * 1024**2,
                driver=cells[4],
                capability=(_integer(major), _integer(minor)),
            )
        )
    return tuple(gpus)


def read_nics(text: str) -> tuple[Nic, ...]:
    """Reads `ip -o addr show up scope global`."""
    addresses: dict[str, list[str]] = {}
    for line in text.splitlines():
        match = re.match(r"\d+:\s+(\S+)\s+inet6?\s+([0-9a-fA-F.:]+)(?:/| peer )", line)
        if match:
            addresses.setdefault(match[1].split("@")[0], []).append(match[2])
    return tuple(Nic(name=name, addresses=tuple(found)) for name, found in addresses.items())


def read_disks(text: str) -> tuple[Disk, ...]:
    """Reads `dir|file|none|stuck <device> <root device> <w|-> <free KiB> <path>` lines, a tab, and the real path."""
    disks = []
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind in ("none", "stuck"):
            disks.append(Disk(path=rest.split(" ", 4)[4], exists=False, stuck=kind == "stuck"))
        elif kind in ("dir", "file"):
            device, root, mode, free, places = rest.split(" ", 4)
            path, _, real = places.partition("\t")
            disks.append(
                Disk(
                    path=path,
                    exists=True,
                    is_dir=kind == "dir",
                    on_root=device == root,
                    writable=mode == "w",
                    free=_integer(free) * 1024,
                    leads_to=real if path.startswith("/") and real != path else "",
                )
            )
    return tuple(disks)


def read_listeners(text: str) -> tuple[Listener, ...]:
    """Reads `ss -Hltnp`, or /proc/net/tcp and tcp6 where there is no ss."""
    owners: dict[int, str] = {}
    exposed: set[int] = set()
    for line in text.splitlines():
        if match := re.match(r"LISTEN\s+\d+\s+\d+\s+(\S*):(\d+)\s+\S+(?:\s+users:\(\(\"([^\"]+)\",pid=(\d+))?", line):
            port, owner = int(match[2]), f"{match[3]} (pid {match[4]})" if match[3] else ""
            inward = re.match(r"(\[?::ffff:)?127\.|\[::1\]", match[1], re.IGNORECASE)
        elif match := re.match(r"\s*\d+:\s+([0-9A-F]+):([0-9A-F]{4})\s+\S+\s+0A\s", line):
            port, owner = int(match[2], 16), ""
            # Words of four bytes, the lowest first.
            inward = re.fullmatch(r"(0{16}FFFF0000)?.{6}7F|0{24}01000000", match[1])
        else:
            continue
        owners[port] = owners.get(port) or owner
        if not inward:
            exposed.add(port)
    return tuple(Listener(port=port, owner=owner, exposed=port in exposed) for port, owner in sorted(owners.items()))


def read_docker(text: str) -> DockerFact:
    """Reads `docker info --format '{{json .}}'`, or what the client said instead."""
    line = next((line for line in text.splitlines() if line.startswith("{")), "")
    try:
        said = json.loads(line) if line else {}
    except ValueError:
        said = {}
    if isinstance(said.get("version"), dict) and isinstance(said.get("host"), dict):
        return _read_podman(said)
    if not said.get("ServerVersion"):
        errors = said.get("ServerErrors") or [text.strip() or "docker is not installed"]
        return DockerFact(error=" ".join(str(errors[-1]).split()))
    return DockerFact(
        version=str(said["ServerVersion"]),
        runtimes=tuple(sorted(said.get("Runtimes") or ())),
        rootless=any("rootless" in str(option) for option in said.get("SecurityOptions") or ()),
        root=str(said.get("DockerRootDir") or ""),
        memlock=int(limit) if (limit := _said(text, "memlock")).isdecimal() else None,
        runc=_said(text, "runc"),
        toolkit=_said(text, "toolkit"),
    )


def _said(text: str, name: str) -> str:
    """The value of a `name=value` line beside what Docker said."""
    found = re.search(rf"^{name}=(\S+)$", text, re.MULTILINE)
    return found[1] if found else ""


def _read_podman(said: Mapping[str, Any]) -> DockerFact:
    """What `docker info` says where `docker` is podman's imitation."""
    host = said["host"]
    runtime = (host.get("ociRuntime") or {}).get("name")
    return DockerFact(
        version=f"podman {said['version'].get('Version', '')}".strip(),
        runtimes=(str(runtime),) if runtime else (),
        rootless=bool((host.get("security") or {}).get("rootless")),
        root=str((said.get("store") or {}).get("graphRoot") or ""),
    )


def read_routes(text: str) -> dict[str, str]:
    """Reads `<peer> <answer of ip route get>` lines into peer -> interface."""
    routes = {}
    for line in text.splitlines():
        peer, _, answer = line.partition(" ")
        if match := re.search(r"\bdev (\S+)", answer):
            routes[peer] = match[1]
    return routes


def _seconds(text: str) -> float:
    # BusyBox knows no %N and leaves it standing: whole seconds then.
    match = re.match(r"\d+(\.\d+)?", text)
    return float(match[0]) if match else 0.0


def _integer(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0


PATIENCE = 5  # whole seconds for a probe that may hang; a single path gets one less, so that the others are told

# How a command ends that `timeout` ended: GNU's, BusyBox's.
_LATE = "124|143"

_LOOK = """
path=$1
case $path in '~/'*) full=$HOME/${path#??} ;; *) full=$path ;; esac
if [ -d "$full" ]; then kind=dir; elif [ -e "$full" ]; then kind=file
else printf 'none - - - - %s\\n' "$path"; exit; fi
[ -w "$full" ] && mode=w || mode=-
set -- $(df -Pk "$full" | sed -n 2p); free=$4
real=$(readlink -f "$full" | head -n 1)
printf '%s %s %s %s %s %s\\t%s\\n' "$kind" "$(stat -Lc %d "$full")" "$root" "$mode" "${free:-0}" "$path" "$real"
"""

PROBES = (
    Probe(
        name="system",
        read=read_system,
        text="""
echo "kernel=$(uname -sr)"; echo "arch=$(uname -m)"; echo "user=$(id -un)"; echo "uid=$(id -u)"; echo "gid=$(id -g)"
echo "groups=$(id -G)"
echo "home=$HOME"; echo "cpus=$(getconf _NPROCESSORS_ONLN)"
echo "memory=$(sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)"
echo "shm=$(df -Pk /dev/shm | sed -n '2s/^[^ ]* *\\([0-9]*\\).*/\\1/p')"; echo "clock=$(date +%s.%N)"
""",
    ),
    Probe(
        name="gpus",
        read=read_gpus,
        bounded=True,
        text="""
command -v nvidia-smi >/dev/null && nvidia-smi --format=csv,noheader,nounits \\
  --query-gpu=index,name,uuid,memory.total,driver_version,compute_cap
""",
    ),
    Probe(name="nics", read=read_nics, text="ip -o addr show up scope global"),
    Probe(
        name="disks",
        read=read_disks,
        bounded=True,
        # All paths at once: several may lie on the same dead server.
        text=f"""
export root=$(stat -Lc %d /)
printf '%s\\n' "$paths" | {{
  while IFS= read -r path; do
    [ -n "$path" ] || continue
    {{
      ${{limit:+timeout $((patience - 1))}} sh -c {shlex.quote(_LOOK)} sh "$path"
      case $? in {_LATE}) printf 'stuck - - - - %s\\n' "$path" ;; esac
    }} &
  done
  wait
}}
""",
    ),
    Probe(
        name="listeners",
        read=read_listeners,
        text="ss -Hltnp 2>/dev/null || cat /proc/net/tcp /proc/net/tcp6",
    ),
    Probe(
        name="docker",
        read=read_docker,
        bounded=True,
        # A container inherits its daemon's limits.
        text="""
[ "$engine" = docker ] || exit 0
docker info --format '{{json .}}' || exit 0
runc --version 2>/dev/null | sed -n 's/^runc version /runc=/p'
nvidia-ctk --version 2>/dev/null | sed -n 's/.* version \\([0-9]\\)/toolkit=\\1/p'
for process in /proc/[0-9]*; do
  read -r name <"$process/comm" || continue
  [ "$name" = dockerd ] && sed -n 's/^Max locked memory *[^ ]* *\\([^ ]*\\).*/memlock=\\1/p' "$process/limits"
done 2>/dev/null
""",
    ),
    Probe(
        name="routes",
        read=read_routes,
        bounded=True,
        # `ip route get` takes no names.
        text="""
for peer in $peers; do
  case $peer in
    *:*) address=$peer ;;
    *[!0-9.]*) address=$(getent ahostsv4 "$peer" | head -n 1); address=${address%% *} ;;
    *) address=$peer ;;
  esac
  echo "$peer $(ip route get "$address" 2>/dev/null | head -n 1)"
done
""",
    ),
)

_MARK = "--8<-- fact "
_STUCK = "--8<-- stuck"
_END = "--8<-- end"


def survey_command(*, paths: Iterable[str], peers: Iterable[str], engine: str, patience: int = PATIENCE) -> Command:
    """One script that asks everything. `paths` to look at, `peers` (addresses or names) to find a way to."""
    asks = "\n".join(f"printf '\\n%s\\n' '{_MARK}{probe.name}'\n{_ask(probe)}" for probe in PROBES)
    # What hangs in the kernel survives any signal and holds its output open: sed ends the answer at its last line.
    # BusyBox's sed wants one more before it ends.
    return script(
        f"""\
exec </dev/null
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin" paths="$1" peers="$2" engine="$3" patience="$4" limit=
timeout 5 true 2>/dev/null && limit=yes
{{
{asks}
printf '\\n%s\\n\\n' '{_END}'
}} 2>&1 | sed '/^{_END}$/q'
exit 0""",
        "\n".join(paths),
        " ".join(peers),
        engine,
        str(patience),
    )


def _ask(probe: Probe) -> str:
    if not probe.bounded:
        return f"( {probe.text.strip()}\n)"
    # The last line keeps sh from becoming the tool itself: `timeout` would wait for one that cannot be ended.
    text = shlex.quote(f"{probe.text.strip()}\n:")
    return f"${{limit:+timeout $patience}} sh -c {text}\ncase $? in {_LATE}) printf '\\n%s\\n' '{_STUCK}' ;; esac"


def read_survey(text: str, *, sent: float, received: float) -> NodeFacts:
    """Reads the script's whole answer; `sent` and `received` (our clock) bound the clock offset."""
    parts = dict(part.split("\n", 1) for part in text.split(f"\n{_MARK}")[1:] if "\n" in part)
    answers = {probe.name: probe.read(parts.get(probe.name, "").split(f"\n{_STUCK}")[0]) for probe in PROBES}
    stuck = tuple(name for name, part in parts.items() if f"\n{_STUCK}" in part)
    if "docker" in stuck:
        answers["docker"] = DockerFact(error=f"docker info gives no answer within {PATIENCE} s")
    system = answers["system"]
    assert isinstance(system, System)
    # The clock was read somewhere between sending and receiving: within that window there is no skew to speak of.
    early, late = system.clock - received, system.clock - sent
    offset = early if early > 0 else late if late < 0 else 0.0
    return NodeFacts(**answers, stuck=stuck, clock_offset=offset if system.clock else 0.0)  # type: ignore[arg-type]
