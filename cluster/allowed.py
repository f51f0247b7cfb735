"""What a single value of the inventory may be. Pure checks; what two values are to each other is the models' matter.

A check returns the value or raises ValueError with the end of a sentence about it; the types at the end carry them.
"""

from __future__ import annotations

import difflib
import ipaddress
import itertools
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from cluster.document import Place
from cluster.errors import InputError

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
ULIMITS = (
    *("core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile"),
    *("nproc", "rss", "rtprio", "rttime", "sigpending", "stack"),
)

_NAME = "^[a-z0-9][a-z0-9-]{1,40}$"
_USER = "^[A-Za-z_][A-Za-z0-9_.-]{0,31}$"
ENV_NAME = "^[A-Za-z_][A-Za-z0-9_]*$"
_NIC = "^[A-Za-z0-9][A-Za-z0-9_.:@-]{0,14}$"
_SHM_SIZE = "^[1-9][0-9]{0,5}[mg]$"
_ARCHITECTURES = r"^[0-9]{1,2}\.[0-9][af]?(\+PTX)?(;[0-9]{1,2}\.[0-9][af]?(\+PTX)?)*$"
_IMAGE = (
    r"^([a-z0-9.-]+(:[0-9]{1,5})?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$"
)
_APT = r"^[a-z0-9][a-z0-9.+-]*[a-z0-9+](:[a-z0-9]+)?(=[A-Za-z0-9.+:~-]+)?$"
PATTERNS = {
    _NAME: "must be 2 to 41 lower-case letters, digits and '-', beginning with a letter or digit",
    _USER: "must be a login name: letters, digits, '_', '.', '-', at most 32",
    ENV_NAME: "is not a variable's name: letters, digits and '_', not beginning with a digit",
    _NIC: "must be the name of one network interface, such as eth1 or ib0",
    _SHM_SIZE: "must be a size in m or g, such as 512m or 16g",
    _ARCHITECTURES: "must be compute capabilities with ';' between them, such as \"8.0;9.0\"",
    _APT: "must be the name of a Debian package, such as libgl1 or ffmpeg",
    _IMAGE: "must be the name of an image, such as debian:bookworm-slim or registry.example:5000/team/image:1.2",
}

_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{12,64}")

# We set these for every process.
_RESERVED = re.compile(
    r"MASTER_ADDR|MASTER_PORT|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|GROUP_WORLD_SIZE"
    r"|ROLE_(?:NAME|RANK|WORLD_SIZE)|(?:ACCELERATE|LAUNCHER|TORCHELASTIC)_.*"
)
_SECRET = re.compile(
    r".*(?:TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIALS?)", re.IGNORECASE
)
_LONGEST_VALUE = 100_000  # Linux allows 128 KiB for one "NAME=value"


def check_image(name: str) -> str:
    """The name or digest of an image, as a command names one; `InputError` for what cannot be either."""
    if not re.fullmatch(_IMAGE, name) and not _DIGEST.fullmatch(name):
        raise InputError(f"an image {PATTERNS[_IMAGE]}, not {name!r}")
    return name


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
    read_jump(jump)
    return jump


def read_jump(jump: str) -> tuple[str | None, str, int | None]:
    """User, host and port of `[user@]host[:port]`, an IPv6 host in brackets."""
    if "," in jump:
        raise ValueError("must be one host; write a chain of jumps into ~/.ssh/config as ProxyJump")
    user, at, rest = jump.rpartition("@")
    found = re.fullmatch(r"(?:\[(?P<six>[^\]]*)\]|(?P<host>[^:]*))(?::(?P<port>\d{1,5}))?", rest)
    if ":" in user or not found:
        raise ValueError("must be user@host:port (an IPv6 host in brackets), without a password")
    if at and not re.fullmatch(_USER, user):
        raise ValueError(f"must begin with a login name and '@', not {shown(user)}")
    if found["port"] and not 1 <= int(found["port"]) <= LAST_PORT:
        raise ValueError("must end with a port from 1 to 65535")
    host = _check_host(found["host"] if found["six"] is None else found["six"])
    return user or None, host, int(found["port"]) if found["port"] else None


LAST_PORT = 65535


def _check_requirement(requirement: str) -> str:
    """One requirement as pip reads it; nothing that pip would take for an option, and no file that stays here."""
    if requirement.startswith("-"):
        raise ValueError(f"must be a requirement, not an option of pip; this is {shown(requirement)}")
    found = _REQUIREMENT.fullmatch(requirement)
    if not found:
        raise ValueError(
            f"must be a requirement such as einops==0.8.0 or name @ https://…; this is {shown(requirement)}"
        )
    url = found["url"] or ""
    if url.startswith("file:"):
        raise ValueError("must not name a file of this machine; put it into a folder and name that under image.wheels")
    if re.search(r"://[^/@]*:[^/@]*@", url):
        raise ValueError("must not hold a password: it would stand in the image")
    return requirement


_REQUIREMENT = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])? *(?:\[[A-Za-z0-9._, -]*\])?"
    r" *(?:@ *(?P<url>[a-z0-9+]+:[\x21-\x7e]+)|\(?(?:[=<>!~]=?=?[ A-Za-z0-9.*+!_-]+,?)+\)?)? *(?:;[\x20-\x7e]+)?"
)


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
        raise ValueError(f"must be an absolute path, not {shown(path)}")
    if ".." in path.split("/"):
        raise ValueError("must not hold '..'")
    if path != (plain := "/" + posixpath.normpath(path).lstrip("/")):
        raise ValueError(f"must be written plainly: {shown(plain)}")
    if len(path) > _LONGEST_PATH:
        raise ValueError(f"is longer than {_LONGEST_PATH} characters")
    return path


_LONGEST_PATH = 1024


def check_node_path(path: str) -> str:
    """A folder of a node that a container will see; `ValueError` for one that it must not."""
    _check_plain_path(path)
    parts = path.split("/")
    if any(_is_within(path, system) for system in _SYSTEM):
        raise ValueError(
            f"must not be {shown(path)}: it belongs to the system, and whoever writes there owns the machine"
        )
    if path in _SHARED or _HOME.fullmatch(path):
        raise ValueError(
            f"must not be {shown(path)} itself, which holds other things too; name a folder of its own below"
        )
    if path.endswith(".sock") or _KEYS.intersection(parts):
        raise ValueError(f"must not be {shown(path)}: it opens other doors")
    return path


def _check_state_path(path: str) -> str:
    if path.startswith("~/"):
        return "~" + check_node_path("/home/user" + _check_plain_path(path[1:])).removeprefix("/home/user")
    if path.startswith("~"):
        raise ValueError("must be an absolute path or begin with '~/' and name a folder")
    return check_node_path(path)


def _check_target(path: str) -> str:
    _check_plain_path(path)
    ours = next((one for one in OUR_TARGETS if _is_within(path, one) or _is_within(one, path)), None)
    if ours:
        raise ValueError(f"must not be {shown(path)}: the launcher puts its own things at {ours}")
    if any(_is_within(path, system) for system in _SYSTEM):
        raise ValueError(f"must not be {shown(path)}: the container's system lies there")
    return path


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def check_device(path: str) -> str:
    """A device of a node that a container will see; `ValueError` for one that it must not."""
    _check_plain_path(path)
    if not path.startswith("/dev/"):
        raise ValueError("must be a device or folder below /dev, such as /dev/infiniband")
    if _RAW_DEVICES.fullmatch(path):
        raise ValueError(f"must not be {shown(path)}: with it a container can read or write the whole machine")
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
    refuse(_env_problems(env))
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
    refuse(itertools.chain(reserved, repeated(names, "the name")))
    return names


def _check_ulimits(ulimits: dict[str, int]) -> dict[str, int]:
    refuse(((name,), f"is no limit{nearest(name, ULIMITS)}") for name in ulimits if name not in ULIMITS)
    return ulimits


def _check_nvme(paths: tuple[str, ...]) -> tuple[str, ...]:
    refuse(nested(paths))
    return paths


def nested(paths: Iterable[str]) -> Iterator[Problem]:
    """Folders of which one holds another."""
    seen: list[str] = []
    for index, path in enumerate(paths):
        if other := next((one for one in seen if _is_within(path, one) or _is_within(one, path)), None):
            yield (index,), f"{shown(path)} is the same as, inside, or above {shown(other)}"
        seen.append(path)


def repeated(values: Iterable[object], what: str) -> Iterator[Problem]:
    """Values that are given twice."""
    seen: dict[object, int] = {}
    for index, value in enumerate(values):
        if value is not None and seen.setdefault(value, index) != index:
            yield (index,), f"{what} {shown(value)} is given twice (here and in item {seen[value] + 1})"


def refuse(problems: Iterable[Problem]) -> None:
    """Hand all problems to pydantic at once, each with its place."""
    if found := list(problems):
        raise ValidationError.from_exception_data("refused", [_line_error(place, what) for place, what in found])


def _line_error(place: Place, what: str) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("refused", "{what}", {"what": what}), loc=place, input=None)


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a sentence that asks for the word that was meant, if one resembles it."""
    close = difflib.get_close_matches(word.lower(), list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """A value as messages quote it."""
    return repr(legible(str(value)))


def legible(text: str) -> str:
    """Text, cut where it is too long for a message."""
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


_LONGEST_SHOWN = 80


Name = Annotated[str, Field(pattern=_NAME)]
Login = Annotated[str, Field(pattern=_USER)]
HostName = Annotated[str, AfterValidator(_check_host)]
Address = Annotated[str, AfterValidator(_check_address)]
JumpText = Annotated[str, AfterValidator(_check_jump)]
Url = Annotated[str, AfterValidator(_check_url)]
NodePath = Annotated[str, AfterValidator(check_node_path)]
StatePath = Annotated[str, AfterValidator(_check_state_path)]
TargetPath = Annotated[str, AfterValidator(_check_target)]
Device = Annotated[str, AfterValidator(check_device)]
LocalPath = Annotated[Path, BeforeValidator(_check_local_path)]
IdentityPath = Annotated[LocalPath, AfterValidator(_check_identity)]
Nic = Annotated[str, Field(pattern=_NIC)]
Requirement = Annotated[str, AfterValidator(_check_requirement)]
AptName = Annotated[str, Field(pattern=_APT)]
Image = Annotated[str, Field(pattern=_IMAGE)]
Architectures = Annotated[str, Field(pattern=_ARCHITECTURES)]
ShmSize = Annotated[str, Field(pattern=_SHM_SIZE)]
EnvName = Annotated[str, Field(pattern=ENV_NAME)]
Env = Annotated[dict[EnvName, str], AfterValidator(_check_env)]
Secrets = Annotated[tuple[EnvName, ...], Field(max_length=64), AfterValidator(_check_secrets)]
Ulimits = Annotated[dict[str, Annotated[int, Field(ge=-1)]], AfterValidator(_check_ulimits)]
NvmePaths = Annotated[tuple[NodePath, ...], Field(max_length=64), AfterValidator(_check_nvme)]
