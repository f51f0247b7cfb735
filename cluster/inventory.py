"""The inventory: which machines there are and how to use them. Read and judged as text, never by asking a machine.

Inventory ── image: ImageRecipe
          ├─ container: Container ── mounts: Mount
          ├─ defaults: NodeDefaults ── paths: Paths
          └─ nodes: Node (NodeDefaults with a name and a host; the defaults are applied) ── access: Access
"""

from __future__ import annotations

import difflib
import ipaddress
import itertools
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from cluster.document import Document, Place, load
from cluster.errors import InputError

Engine = Literal["docker", "process"]
Accelerator = Literal["cuda", "cpu"]
Problem = tuple[Place, str]

# Where a container has our own things; nothing of the user's may lie there, inside or above.
OUR_TARGETS = ("/launcher", "/run/secrets", "/nvme", "/checkpoints", "/data", "/cache", "/opt/venv")

# The system's own folders: a container that can write there owns the machine.
_SYSTEM = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr"),
    *("/var/lib/containerd", "/var/lib/containers", "/var/lib/docker", "/var/log", "/var/run", "/var/spool"),
)
# Folders that hold other people's things; what lies below them may be used.
_SHARED = ("/", "/home", "/opt", "/root", "/tmp", "/var", "/var/lib", "/var/tmp")  # noqa: S108 - named to be refused
_HOME = re.compile(r"/home/[^/]+")
_KEYS = frozenset({".aws", ".docker", ".gnupg", ".kube", ".ssh"})
_RAW_DEVICES = re.compile(
    r"/dev/(?:k?mem|port|kmsg|console|tty.*|disk|mapper|block|(?:[shv]|xv)d[a-z].*|nvme\d.*|(?:dm-|md|loop|sr|ram)\d.*)"
    r"(?:/.*)?"
)
_ULIMITS = (
    *("core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile"),
    *("nproc", "rss", "rtprio", "rttime", "sigpending", "stack"),
)

_NAME = "^[a-z0-9][a-z0-9-]{1,40}$"
_USER = "^[A-Za-z_][A-Za-z0-9_.-]{0,31}$"
_ENV_NAME = "^[A-Za-z_][A-Za-z0-9_]*$"
_NIC = "^[A-Za-z0-9][A-Za-z0-9_.:@-]{0,14}$"
_SHM_SIZE = "^[1-9][0-9]{0,5}[mg]$"
_ARCHITECTURES = r"^[0-9]{1,2}\.[0-9][af]?(\+PTX)?(;[0-9]{1,2}\.[0-9][af]?(\+PTX)?)*$"
_IMAGE = (
    r"^([a-z0-9.-]+(:[0-9]{1,5})?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$"
)
_PATTERNS = {
    _NAME: "must be 2 to 41 lower-case letters, digits and '-', beginning with a letter or digit",
    _USER: "must be a login name: letters, digits, '_', '.', '-', at most 32",
    _ENV_NAME: "is not a variable's name: letters, digits and '_', not beginning with a digit",
    _NIC: "must be the name of one network interface, such as eth1 or ib0",
    _SHM_SIZE: "must be a size in m or g, such as 512m or 16g",
    _ARCHITECTURES: "must be compute capabilities with ';' between them, such as \"8.0;9.0\"",
    _IMAGE: "must be the name of an image, such as debian:bookworm-slim or registry.example:5000/team/image:1.2",
}

# We set these for every process.
_RESERVED = re.compile(
    r"MASTER_ADDR|MASTER_PORT|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|GROUP_WORLD_SIZE"
    r"|ROLE_(?:NAME|RANK|WORLD_SIZE)|(?:ACCELERATE|LAUNCHER|TORCHELASTIC)_.*"
)
_SECRET = re.compile(
    r".*(?:TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIALS?)", re.IGNORECASE
)
_LONGEST_VALUE = 100_000  # Linux allows 128 KiB for one "NAME=value"
_PASSWORD = re.compile(r".*(?:passw(?:or)?d|passphrase|secret|token)", re.IGNORECASE)

# What other tools call our keys.
_SYNONYMS = {
    "hostname": "host",
    "ip": "address",
    "ssh_port": "port",
    "username": "user",
    "ssh_user": "user",
    "login": "user",
    "key": "identity_file",
    "ssh_key": "identity_file",
    "key_file": "identity_file",
    "bastion": "jump",
    "gateway": "jump",
    "proxy_jump": "jump",
    "gpus": "slots",
    "num_gpus": "slots",
    "processes": "slots",
    "interface": "nic",
    "environment": "env",
    "volumes": "mounts",
    "hosts": "nodes",
    "device": "accelerator",
}


# --- single values: each check returns the value or raises ValueError with the end of a sentence about it ------------


def _check_host(host: str) -> str:
    if len(host) > _LONGEST_HOST:
        raise ValueError(f"must be a host name or address of at most {_LONGEST_HOST} characters")
    if ":" in host and not re.search(r"[@/\[\]% ]", host) and not re.fullmatch(r"[^:]*:\d*", host):
        return _check_address(host)
    for wrong, why in _HOST_FAULTS:
        if re.search(wrong, host):
            raise ValueError(why)
    if not host.isascii():
        raise ValueError(f"must be written in ASCII: {_punycode(host)}")
    if re.search(r"(?:^|\.)(?:[0-9]+|0[xX][0-9a-fA-F]*)$", host):
        return _check_address(host)
    label = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
    if not all(label.fullmatch(part) for part in host.split(".")):
        raise ValueError("must be a host name (letters, digits, '-', '.'; at most 63 between two dots)")
    return host


_LONGEST_HOST = 253
_HOST_FAULTS = (
    (r"^$", "must not be empty"),
    (r"^-", "must not begin with '-'"),
    (r"[\s\x00-\x1f\x7f]", "must not hold spaces or line ends"),
    (r"://", "must be a host alone, not a URL"),
    (r"@", "must be a host alone; the user belongs under 'user'"),
    (r"[\[\]]", "must be an IPv6 address without brackets"),
    (r":.*%", "must be an IPv6 address without a zone ('%…'): use a global address or a host name"),
    (r"^[^:]*:\d*$", "must be a host alone; the port belongs under 'port'"),
    (r"[^.]\.$", "must not end with a dot"),
)


def _punycode(host: str) -> str:
    try:
        return f"write {host.encode('idna').decode()}"
    except UnicodeError:
        return "an international name is written as xn--…"


def _check_address(address: str) -> str:
    if "%" in address:
        raise ValueError("must be an address without a zone ('%…')")
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise ValueError("must be a whole IPv4 or IPv6 address, such as 10.0.0.11 or 2001:db8::11") from None
    if parsed.is_unspecified or parsed.is_multicast or address == "255.255.255.255":
        raise ValueError("is no single machine's address")
    return str(parsed)


def _check_jump(jump: str) -> str:
    _read_jump(jump)
    return jump


def _read_jump(jump: str) -> Access:
    """`[user@]host[:port]`, an IPv6 host in brackets."""
    if "," in jump:
        raise ValueError("must be one host; write a chain of jumps into ~/.ssh/config as ProxyJump")
    user, at, rest = jump.rpartition("@")
    found = re.fullmatch(r"(?:\[(?P<six>[^\]]*)\]|(?P<host>[^:]*))(?::(?P<port>\d{1,5}))?", rest)
    if ":" in user or not found:
        raise ValueError("must be user@host:port (an IPv6 host in brackets), without a password")
    if at and not re.fullmatch(_USER, user):
        raise ValueError(f"must begin with a login name and '@', not {_shown(user)}")
    if found["port"] and not 1 <= int(found["port"]) <= _LAST_PORT:
        raise ValueError("must end with a port from 1 to 65535")
    host = _check_host(found["host"] if found["six"] is None else found["six"])
    return Access(host=host, port=int(found["port"]) if found["port"] else None, user=user or None)


_LAST_PORT = 65535


def _check_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("must be an http:// or https:// address") from None
    if parts.username is not None:
        raise ValueError("must not hold a user or password; put them into ~/.netrc or pip's own configuration")
    if parts.scheme not in ("http", "https") or re.search(r"\s", url) or port == 0:
        raise ValueError("must be an http:// or https:// address")
    _check_host(parts.hostname or "")
    return url


def _check_plain_path(path: str) -> str:
    if re.search(r"[\x00-\x1f\x7f]", path):
        raise ValueError("must not hold line ends or control characters")
    if not path.startswith("/"):
        raise ValueError(f"must be an absolute path, not {_shown(path)}")
    if ".." in path.split("/"):
        raise ValueError("must not hold '..'")
    if path != (plain := "/" + posixpath.normpath(path).lstrip("/")):
        raise ValueError(f"must be written plainly: {_shown(plain)}")
    if len(path) > _LONGEST_PATH:
        raise ValueError(f"is longer than {_LONGEST_PATH} characters")
    return path


_LONGEST_PATH = 1024


def _check_node_path(path: str) -> str:
    """A folder of a node that a container will see."""
    _check_plain_path(path)
    parts = path.split("/")
    if any(_is_within(path, system) for system in _SYSTEM):
        raise ValueError(
            f"must not be {_shown(path)}: it belongs to the system, and whoever writes there owns the machine"
        )
    if path in _SHARED or _HOME.fullmatch(path):
        raise ValueError(
            f"must not be {_shown(path)} itself, which holds other things too; name a folder of its own below"
        )
    if path.endswith(".sock") or _KEYS.intersection(parts):
        raise ValueError(f"must not be {_shown(path)}: it opens other doors")
    return path


def _check_state_path(path: str) -> str:
    if path.startswith("~/"):
        return "~" + _check_node_path("/home/user" + _check_plain_path(path[1:])).removeprefix("/home/user")
    if path.startswith("~"):
        raise ValueError("must be an absolute path or begin with '~/' and name a folder")
    return _check_node_path(path)


def _check_target(path: str) -> str:
    _check_plain_path(path)
    ours = next((one for one in OUR_TARGETS if _is_within(path, one) or _is_within(one, path)), None)
    if ours:
        raise ValueError(f"must not be {_shown(path)}: the launcher puts its own things at {ours}")
    if any(_is_within(path, system) for system in _SYSTEM):
        raise ValueError(f"must not be {_shown(path)}: the container's system lies there")
    return path


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _check_device(path: str) -> str:
    _check_plain_path(path)
    if not path.startswith("/dev/"):
        raise ValueError("must be a device or folder below /dev, such as /dev/infiniband")
    if _RAW_DEVICES.fullmatch(path):
        raise ValueError(f"must not be {_shown(path)}: with it a container can read or write the whole machine")
    return path


def _check_local_path(value: object, info: ValidationInfo) -> object:
    """A file of the control machine: `~` and relative paths are made whole where the inventory's folder is known."""
    if not isinstance(value, str):
        return value
    if not value or re.search(r"[\x00-\x1f\x7f]", value):
        raise ValueError("must be a path, without line ends or control characters")
    if value.startswith("~") and not value.startswith("~/"):
        raise ValueError("must be an absolute path, begin with '~/', or be relative to the inventory's folder")
    if not info.context:
        return value
    if value.startswith("~/") and info.context["home"] is None:
        raise ValueError("begins with '~', but no home folder is known; set HOME, or write the whole path")
    if value.startswith("~/"):
        return str(Path(info.context["home"], value[2:]))
    return str(Path(info.context["folder"], value))


def _check_identity(path: Path) -> Path:
    if path.suffix == ".pub":
        raise ValueError("must be the private half of the key, not the .pub")
    return path


def _check_env(env: dict[str, str]) -> dict[str, str]:
    _raise(_env_problems(env))
    return env


def _env_problems(env: Mapping[str, str]) -> Iterator[Problem]:
    for name, value in env.items():
        if _RESERVED.fullmatch(name):
            yield (name,), "is set by the launcher; leave it out"
        elif _SECRET.fullmatch(name) and value:
            yield (name,), "looks like a secret, and is not kept here; put the name under container.secrets"
        elif "\0" in value or len(value) > _LONGEST_VALUE:
            yield (name,), f"must be text of at most {_LONGEST_VALUE} characters, without NUL"


def _check_secrets(names: tuple[str, ...]) -> tuple[str, ...]:
    reserved = (
        ((i,), "is set by the launcher; leave it out") for i, name in enumerate(names) if _RESERVED.fullmatch(name)
    )
    _raise(itertools.chain(reserved, _repeated(names, "the name")))
    return names


def _check_ulimits(ulimits: dict[str, int]) -> dict[str, int]:
    _raise(((name,), f"is no limit{_nearest(name, _ULIMITS)}") for name in ulimits if name not in _ULIMITS)
    return ulimits


def _check_nvme(paths: tuple[str, ...]) -> tuple[str, ...]:
    _raise(_nested(paths))
    return paths


def _check_mounts(mounts: tuple[Mount, ...]) -> tuple[Mount, ...]:
    _raise(((i, "target"), why) for (i, *_), why in _nested([mount.target for mount in mounts]))
    return mounts


def _nested(paths: Iterable[str]) -> Iterator[Problem]:
    seen: list[str] = []
    for index, path in enumerate(paths):
        if other := next((one for one in seen if _is_within(path, one) or _is_within(one, path)), None):
            yield (index,), f"{_shown(path)} is the same as, inside, or above {_shown(other)}"
        seen.append(path)


def _repeated(values: Iterable[object], what: str) -> Iterator[Problem]:
    seen: dict[object, int] = {}
    for index, value in enumerate(values):
        if value is not None and seen.setdefault(value, index) != index:
            yield (index,), f"{what} {_shown(value)} is given twice (here and in item {seen[value] + 1})"


def _raise(problems: Iterable[Problem]) -> None:
    """Hand all problems to pydantic at once, each with its place."""
    if found := list(problems):
        raise ValidationError.from_exception_data("refused", [_line_error(place, what) for place, what in found])


def _line_error(place: Place, what: str) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("refused", "{what}", {"what": what}), loc=place, input=None)


HostName = Annotated[str, AfterValidator(_check_host)]
Address = Annotated[str, AfterValidator(_check_address)]
JumpText = Annotated[str, AfterValidator(_check_jump)]
Url = Annotated[str, AfterValidator(_check_url)]
NodePath = Annotated[str, AfterValidator(_check_node_path)]
StatePath = Annotated[str, AfterValidator(_check_state_path)]
TargetPath = Annotated[str, AfterValidator(_check_target)]
Device = Annotated[str, AfterValidator(_check_device)]
LocalPath = Annotated[Path, BeforeValidator(_check_local_path)]
IdentityPath = Annotated[LocalPath, AfterValidator(_check_identity)]
EnvName = Annotated[str, Field(pattern=_ENV_NAME)]
Env = Annotated[dict[EnvName, str], AfterValidator(_check_env)]


# --- the models: their descriptions are the schema that editors show -------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How SSH reaches a machine. What is None is left to ~/.ssh/config, and else to SSH's own defaults."""

    host: str
    port: int | None = None
    user: str | None = None
    identity_file: Path | None = None
    jump: Access | None = None


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Mount(_Model):
    """A folder of the node that the containers see besides our own. It must exist."""

    source: NodePath = Field(description="Absolute path on the node; it must exist.", examples=["/mnt/models"])
    target: TargetPath = Field(description="Absolute path in the container.", examples=["/models"])
    read_only: bool = Field(default=True, description="Whether the job may only read it.", examples=[True])


class ImageRecipe(_Model):
    """How the image is built, or which ready one is used."""

    flavour: Accelerator | None = Field(
        default=None, description="What to build for: cuda or cpu. Default: the accelerator.", examples=["cuda"]
    )
    use: str | None = Field(
        default=None,
        pattern=_IMAGE,
        description="A ready image by name, instead of building one. Excludes all build settings.",
        examples=["registry.example:5000/ml/deepspeed:1.2"],
    )
    base: str | None = Field(
        default=None, pattern=_IMAGE, description="The image to build on.", examples=["debian:bookworm-slim"]
    )
    ca_bundle: LocalPath | None = Field(
        default=None,
        description="Certificates (PEM) that the build must trust, on this machine; relative to this file's folder.",
        examples=["certs/site.pem"],
    )
    pip_index: Url | None = Field(
        default=None, description="A package index instead of PyPI.", examples=["https://pypi.example/simple"]
    )
    apt_mirror: Url | None = Field(
        default=None,
        description="A Debian mirror instead of deb.debian.org.",
        examples=["http://mirror.example/debian"],
    )
    wheels: LocalPath | None = Field(
        default=None,
        description="A folder of wheels that pip prefers, on this machine; relative to this file's folder.",
        examples=["wheels"],
    )
    cuda_architectures: str = Field(
        default="8.0;8.6;8.9;9.0;10.0;12.0+PTX",
        pattern=_ARCHITECTURES,
        description="The GPU generations that the CUDA operators are compiled for.",
        examples=["8.0;9.0"],
    )
    build_network: Literal["default", "host"] = Field(
        default="default", description="The network of the build: docker's default, or the host's.", examples=["host"]
    )

    @model_validator(mode="after")
    def _check_use(self) -> ImageRecipe:
        fields = type(self).model_fields.items()
        build = [name for name, field in fields if getattr(self, name) != field.default]
        _raise(
            ((name,), "says how to build, but 'use' names a ready image; keep one of them")
            for name in build
            if self.use and name not in ("use", "flavour")
        )
        return self


class Container(_Model):
    """What every container gets. It never gets privileges or capabilities."""

    shm_size: str | None = Field(
        default=None,
        pattern=_SHM_SIZE,
        description="Shared memory (/dev/shm), in m or g. Default: half of the node's memory.",
        examples=["16g"],
    )
    ulimits: Annotated[dict[str, Annotated[int, Field(ge=-1)]], AfterValidator(_check_ulimits)] = Field(
        default={"memlock": -1, "stack": 67108864},
        description="Limits by name; -1 is unlimited. Giving any replaces the default.",
        examples=[{"memlock": -1, "stack": 67108864}],
        json_schema_extra={"propertyNames": {"enum": list(_ULIMITS)}},
    )
    mounts: Annotated[tuple[Mount, ...], Field(max_length=64), AfterValidator(_check_mounts)] = Field(
        default=(),
        description="More folders of the node; NVMe, checkpoints, data and cache have their own keys.",
        examples=[[{"source": "/mnt/models", "target": "/models"}]],
    )
    devices: Annotated[tuple[Device, ...], Field(max_length=64)] = Field(
        default=(), description="Devices besides the GPUs.", examples=[["/dev/infiniband"]]
    )
    env: Env = Field(
        default={}, description="Environment on all nodes; a node's own env wins.", examples=[{"NCCL_DEBUG": "WARN"}]
    )
    secrets: Annotated[tuple[EnvName, ...], Field(max_length=64), AfterValidator(_check_secrets)] = Field(
        default=(),
        description="Names of secrets; their values come from the caller's environment and are never written down.",
        examples=[["HF_TOKEN"]],
    )

    @property
    def shm_bytes(self) -> int | None:
        """`shm_size` as a number."""
        if self.shm_size is None:
            return None
        return int(self.shm_size[:-1]) << {"m": 20, "g": 30}[self.shm_size[-1]]


class Paths(_Model):
    """Folders on a node."""

    state: StatePath = Field(
        default="~/.launcher",
        description="Where the launcher keeps its own files; may begin with '~/', the user's home on the node.",
        examples=["~/.launcher"],
    )
    checkpoints: NodePath | None = Field(
        default=None,
        description="Where checkpoints are written (/checkpoints in the container). Default: a folder of state.",
        examples=["/mnt/checkpoints"],
    )
    data: NodePath | None = Field(
        default=None, description="Training data (/data in the container, read-only).", examples=["/mnt/data"]
    )
    cache: NodePath | None = Field(
        default=None, description="What may be lost: model and dataset caches (/cache).", examples=["/mnt/cache"]
    )


class NodeDefaults(_Model):
    """What may be said once for all nodes, or for one node, which wins."""

    user: str | None = Field(
        default=None,
        pattern=_USER,
        description="SSH user. Default: ~/.ssh/config, else your own name.",
        examples=["ml"],
    )
    port: int | None = Field(
        default=None, ge=1, le=_LAST_PORT, description="SSH port. Default: ~/.ssh/config, else 22.", examples=[22]
    )
    identity_file: IdentityPath | None = Field(
        default=None,
        description="Private key on this machine; relative to this file's folder. Default: agent, ~/.ssh/config.",
        examples=["~/.ssh/id_ed25519"],
    )
    jump: JumpText | None = Field(
        default=None, description="One jump host, user@host:port. Default: none.", examples=["ml@bastion.example:22"]
    )
    slots: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Processes on the node. Default: one for each GPU found; 1 where the accelerator is cpu.",
        examples=[8],
    )
    env: Env = Field(
        default={}, description="Environment of the job on the node.", examples=[{"NCCL_IB_HCA": "mlx5_0"}]
    )
    nic: str | None = Field(
        default=None,
        pattern=_NIC,
        description="Network interface for training traffic. Default: the one that has the node's address.",
        examples=["eth1"],
    )
    nvme: Annotated[tuple[NodePath, ...], Field(max_length=64), AfterValidator(_check_nvme)] = Field(
        default=(),
        description="Folders on local NVMe disks for ZeRO offload (/nvme/0, /nvme/1 in the container).",
        examples=[["/mnt/nvme0", "/mnt/nvme1"]],
    )
    paths: Paths = Field(default=Paths(), description="Folders on the node.", examples=[{"data": "/mnt/data"}])
    transport: Literal["ssh", "local"] = Field(
        default="ssh", description="How the node is reached: over SSH, or as this very machine.", examples=["ssh"]
    )


class Node(NodeDefaults):
    """One machine."""

    name: str = Field(pattern=_NAME, description="What the node is called, here and in messages.", examples=["gpu-01"])
    host: HostName = Field(description="SSH host: a name, an IPv4 or an IPv6 address.", examples=["10.0.0.11"])
    address: Address | None = Field(
        default=None,
        description="Address in the training network. Default: found by asking the node.",
        examples=["192.168.1.11"],
    )

    @property
    def access(self) -> Access:
        """How SSH reaches it."""
        return Access(
            host=self.host,
            port=self.port,
            user=self.user,
            identity_file=self.identity_file,
            jump=_read_jump(self.jump) if self.jump else None,
        )


class Inventory(_Model):
    """A cluster: its machines and how jobs are run on them. `nodes` have the defaults applied."""

    name: str = Field(pattern=_NAME, description="The cluster's name, on every container.", examples=["lab"])
    accelerator: Accelerator = Field(default="cuda", description="What computes: cuda or cpu.", examples=["cuda"])
    engine: Engine = Field(
        default="docker",
        description="What runs the job: docker, or process (this machine only, without containers).",
        examples=["docker"],
    )
    master_port: int = Field(
        default=29500,
        ge=1024,
        le=_LAST_PORT,
        description="Where the processes meet, on the first node.",
        examples=[29500],
    )
    image: ImageRecipe = Field(
        default=ImageRecipe(),
        description="How the image is built, or which one is used.",
        examples=[{"flavour": "cuda"}],
    )
    container: Container = Field(
        default=Container(), description="What every container gets.", examples=[{"shm_size": "16g"}]
    )
    defaults: NodeDefaults = Field(
        default=NodeDefaults(),
        description="What holds for every node that does not say otherwise.",
        examples=[{"user": "ml"}],
    )
    nodes: Annotated[tuple[Node, ...], Field(max_length=1024)] = Field(
        description="The machines; the first is the master.",
        examples=[[{"name": "gpu-01", "host": "10.0.0.11"}]],
        json_schema_extra={"minItems": 1},
    )

    @property
    def flavour(self) -> Accelerator:
        """What the image is built for."""
        return self.image.flavour or self.accelerator

    @model_validator(mode="after")
    def _complete(self) -> Inventory:
        """Apply the defaults, then look for what cannot be together."""
        slots = 1 if self.accelerator == "cpu" else None
        nodes = tuple(_merged(node, self.defaults, slots=slots) for node in self.nodes)
        object.__setattr__(self, "nodes", nodes)  # frozen for everybody else
        _raise(_conflicts(self))
        return self


def _merged(node: Node, defaults: NodeDefaults, *, slots: int | None) -> Node:
    values = {name: getattr(defaults, name) for name in defaults.model_fields_set - node.model_fields_set}
    values["env"] = {**defaults.env, **node.env}
    values["paths"] = defaults.paths.model_copy(update=node.paths.model_dump(exclude_unset=True))
    merged = node.model_copy(update=values)
    return merged.model_copy(update={"slots": merged.slots or slots})


def _conflicts(inventory: Inventory) -> Iterator[Problem]:
    nodes = inventory.nodes
    if not nodes:
        yield ("nodes",), "must name at least one node"
    if inventory.accelerator == "cuda" and inventory.image.flavour == "cpu":
        yield ("image", "flavour"), "must be cuda, as the accelerator is"
    yield from _secrets_in(inventory.container.env, inventory, ("container", "env"))
    distant = [node.transport == "ssh" for node in nodes]
    yield from _at("name", _repeated([node.name for node in nodes], "the node name"))
    hosts = [
        f"{node.host.lower()}:{node.port or 22}" if far else None for node, far in zip(nodes, distant, strict=True)
    ]
    yield from _at("host", _repeated(hosts, "the machine"))
    addresses = [node.address if far else None for node, far in zip(nodes, distant, strict=True)]
    yield from _at("address", _repeated(addresses, "the address"))
    for index, node in enumerate(nodes):
        for place, what in _node_conflicts(inventory, node):
            yield ("nodes", index, *place), what


def _at(key: str, problems: Iterable[Problem]) -> Iterator[Problem]:
    for (index, *_), what in problems:
        yield ("nodes", index, key), what


def _node_conflicts(inventory: Inventory, node: Node) -> Iterator[Problem]:
    if inventory.engine == "process" and node.transport != "local":
        yield ("transport",), f"must be local, since engine is process; {node.name} is to be reached over SSH"
    if inventory.engine == "docker" and node.transport == "local" and len(inventory.nodes) > 1:
        local = [other.name for other in inventory.nodes if other.transport == "local"]
        if node.name != local[0]:
            yield ("transport",), f"is local, as for {local[0]}: that is the same machine twice"
    yield from _secrets_in(node.env, inventory, ("env",))
    yield from _folder_conflicts(node)


def _secrets_in(env: Mapping[str, str], inventory: Inventory, place: Place) -> Iterator[Problem]:
    for name in inventory.container.secrets:
        if name in env:
            yield (*place, name), "is also a name under container.secrets; keep one of them"


def _folder_conflicts(node: Node) -> Iterator[Problem]:
    used = dict.fromkeys(node.nvme, "nvme")
    for key in ("checkpoints", "data", "cache"):
        path = getattr(node.paths, key)
        if path in used:
            yield ("paths", key), f"{_shown(path)} is already used for {used[path]}"
        elif path:
            used[path] = key


# --- reading ---------------------------------------------------------------------------------------------------------


def load_inventory(path: Path, *, engine: Engine | None = None) -> Inventory:
    """Read an inventory file; `engine` stands in for the file's own."""
    return read_inventory(load(path), engine=engine)


def read_inventory(document: Document, *, engine: Engine | None = None, home: Path | None = None) -> Inventory:
    """Judge a document; one `InputError` names everything that is wrong in it."""
    data = document.data
    if not isinstance(data, dict):
        what = "the file is empty" if data is None else "the file must be a mapping (lines of 'key: value')"
        raise InputError(what, where=f"{document.name}:1:1", next_step=_NEXT_STEP)
    if engine:
        data = {**data, "engine": engine}
    context = {"folder": document.folder, "home": home or _home()}
    try:
        # As JSON: there pydantic's strict mode takes a list for a tuple and a mapping for a model, and nothing else.
        return Inventory.model_validate_json(json.dumps(data), context=context)
    except ValidationError as error:
        raise _input_error(error.errors(include_url=False), document) from None


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Inventory.model_json_schema()}


_NEXT_STEP = "configs/cluster.yaml explains every key"
_MOST_SHOWN = 20


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None


def _input_error(errors: list[ErrorDetails], document: Document) -> InputError:
    """All problems in the order of the file: the first is the message, the others are its detail."""
    first, *others = sorted(_without_echoes(errors), key=lambda error: document.position(_place(error)))
    detail = [f"{document.where(_place(error))}: {_sentence(error)}" for error in others[:_MOST_SHOWN]]
    if len(others) > _MOST_SHOWN:
        detail.append(f"and {len(others) - _MOST_SHOWN} more")
    where = document.where(_place(first))
    return InputError(_sentence(first), where=where, detail=tuple(detail), next_step=_NEXT_STEP)


def _without_echoes(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """A misspelt key is one mistake, not two: the right one is not told to be missing as well."""
    unknown = [error["loc"] for error in errors if error["type"] == "extra_forbidden"]
    meant = {(*loc[:-1], _meant(loc)) for loc in unknown[:_MOST_SHOWN]}
    return [error for error in errors if error["type"] != "missing" or error["loc"] not in meant]


def _place(error: ErrorDetails) -> Place:
    return tuple(part for part in error["loc"] if part != "[key]")


def _sentence(error: ErrorDetails) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{_legible(part)}" for part in _place(error))
    return f"{''.join(parts).lstrip('.')} {_says(error)}"


def _says(error: ErrorDetails) -> str:
    """The end of a sentence that begins with the place."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind in _EXPECTED:
        return _wrong_type(_EXPECTED[kind], given, secret="env" in error["loc"])
    says: dict[str, Callable[[], str]] = {
        "refused": lambda: str(context["what"]),
        "value_error": lambda: str(context["error"]),
        "missing": lambda: "is missing",
        "extra_forbidden": lambda: _unknown_key(error["loc"]),
        "string_pattern_mismatch": lambda: _mismatch(context["pattern"], given),
        "literal_error": lambda: _wrong_word(str(context["expected"]), given),
        "too_long": lambda: f"must hold at most {context['max_length']} items",
        "greater_than_equal": lambda: f"must be at least {context['ge']}, not {given}",
        "less_than_equal": lambda: f"must be at most {context['le']}, not {given}",
    }
    return says[kind]()


_EXPECTED = {
    "string_type": "text",
    "path_type": "text",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping ('key: value')",
    "model_type": "a mapping ('key: value')",
}


def _mismatch(pattern: str, given: object) -> str:
    # What should have been a variable's name may hold the secret itself.
    return _PATTERNS[pattern] + ("" if pattern == _ENV_NAME else f"; this is {_shown(given)}")


def _wrong_type(expected: str, given: object, *, secret: bool) -> str:
    if given is None:
        return f"must be {expected}, but nothing is given; leave the key out or give it a value"
    if expected == "text" and isinstance(given, (bool, int, float)):
        return f"must be text: write {'it' if secret else json.dumps(str(json.dumps(given)))} in quotes"
    return f"must be {expected}, not {_kind(given)}"


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"the text {_shown(value)}" if isinstance(value, str) else json.dumps(value)


def _wrong_word(expected: str, given: object) -> str:
    if isinstance(given, str):
        words = re.findall("'([^']*)'", expected)
        return f"must be {expected}, not {_shown(given)}{_nearest(given, words)}"
    return f"must be {expected}, not {_kind(given)}"


def _unknown_key(loc: Place) -> str:
    key, keys = _plain_key(loc), _keys(loc)
    if _PASSWORD.fullmatch(key):
        return "is no key: passwords are not kept here; use a key file or the agent, and container.secrets for a job"
    if meant := _meant(loc):
        return f"is no key; did you mean {meant!r}?"
    if elsewhere := [name or "the top" for name, model in _MODELS.items() if key in model.model_fields]:
        return f"is no key here; it belongs under {' or '.join(elsewhere)}"
    return f"is no key; the keys here are {', '.join(keys)}"


def _meant(loc: Place) -> str | None:
    """The key of the same mapping that a wrong one stands for, if it resembles any."""
    key, keys = _plain_key(loc), _keys(loc)
    if key in keys or _SYNONYMS.get(key) in keys:
        return key if key in keys else _SYNONYMS[key]
    if any(key in model.model_fields for model in _MODELS.values()):
        return None
    return next(iter(difflib.get_close_matches(key, keys, n=1)), None)


def _plain_key(loc: Place) -> str:
    return str(loc[-1]).lower().replace("-", "_")


def _keys(loc: Place) -> list[str]:
    above = next((part for part in reversed(loc[:-1]) if isinstance(part, str)), "")
    return list(_MODELS[above].model_fields)


_MODELS: dict[str, type[_Model]] = {
    "": Inventory,
    "image": ImageRecipe,
    "container": Container,
    "mounts": Mount,
    "defaults": NodeDefaults,
    "nodes": Node,
    "paths": Paths,
}


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower(), list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: object) -> str:
    return repr(_legible(str(value)))


def _legible(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


_LONGEST_SHOWN = 80
