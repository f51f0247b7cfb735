"""The way to a node, as the inventory and ~/.ssh/config say it. Never a connection.

Fabric would visit a ProxyJump list backwards and make connections that accept any key: so the hops are resolved here.
"""

from __future__ import annotations

import getpass
import glob
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import paramiko

from cluster.errors import InputError
from cluster.trust import SSH_PORT, Address

USER_CONFIG = Path("~/.ssh/config")
SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
DEFAULT_IDENTITIES = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
MOST_HOPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long each step of a connection may take, in seconds, and how soon a dead one is noticed."""

    connect: float = 5.0
    banner: float = 5.0
    auth: float = 5.0
    dead: float = 6.0


LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One connection on the way to a node, with everything that ~/.ssh/config has to say on it."""

    node: str
    jump: bool
    key_name: str
    host: str
    port: int
    user: str
    identities: tuple[str, ...]
    only_identities: bool
    proxy: str | None
    timeout: float

    @property
    def where(self) -> str:
        """The place, for an error."""
        place = f"{self.host}:{self.port}" if ":" not in self.host else f"[{self.host}]:{self.port}"
        return f"node {self.node}, jump host {place}" if self.jump else f"node {self.node} ({place})"


def hops(address: Address, *, ssh_config: Path = USER_CONFIG) -> tuple[Address, ...]:
    """Every machine on the way to a node, the node last: whose keys must be pinned, in the order to pin them."""
    return tuple(place for place, _ in _way(address, _config_text(ssh_config), MOST_HOPS))


def route(address: Address, ssh_config: Path, limits: Limits) -> tuple[Hop, ...]:
    """The way to a node, with ~/.ssh/config read into it."""
    way = _way(address, _config_text(ssh_config), MOST_HOPS)
    return tuple(_hop(place, options, limits, jump=place is not way[-1][0]) for place, options in way)


def _way(address: Address, text: str, most: int) -> tuple[tuple[Address, dict[str, object]], ...]:
    if not most:
        raise InputError(
            f"the way to node {address.node} has more than {MOST_HOPS} jump hosts",
            next_step="look for a ProxyJump in ~/.ssh/config that leads back to itself",
        )
    options = _options(address, text)
    jump = address.jump
    if jump is None and isinstance(said := options.get("proxyjump"), str):
        # A pattern such as `Host *` also matches the jump host, which must not be its own way.
        last_hop = _options(_jump(said.rpartition(",")[2], address), text)
        jump = None if _place(last_hop) == _place(options) else said
    # `none` turns a ProxyJump of the configuration off, there as in ssh.
    if jump is None or jump.lower() == "none":
        return ((address, options),)
    before, _, last = jump.rpartition(",")
    via = replace(_jump(last, address), jump=before or None)
    return (*_way(via, text, most - 1), (replace(address, jump=jump), options | {"proxycommand": None}))


def _place(options: dict[str, object]) -> tuple[str, int]:
    return str(options["hostname"]), int(str(options.get("port") or SSH_PORT))


def _jump(text: str, address: Address) -> Address:
    """A jump host from its text. One that the inventory names is reached by the inventory's key."""
    user, _, place = text.strip().removeprefix("ssh://").rpartition("@")
    host, port = place, ""
    if place.startswith("["):
        host, _, port = place[1:].partition("]")
        port = port.removeprefix(":")
    elif place.count(":") == 1:
        host, _, port = place.partition(":")
    if not host or not (port.isdecimal() or not port) or host.startswith("-"):
        raise InputError(f"{text!r} is no jump host for node {address.node}", next_step="write user@host:port")
    identity = address.identity_file if address.jump else None
    return Address(
        node=address.node, host=host, port=int(port) if port else None, user=user or None, identity_file=identity
    )


def _options(address: Address, text: str) -> dict[str, object]:
    # The first value counts, so what the inventory says stands first, as on ssh's command line.
    said = [f"Port {address.port}"] if address.port else []
    said += [f"User {address.user}"] if address.user else []
    try:
        return dict(paramiko.SSHConfig.from_text("\n".join([*said, text])).lookup(address.host))
    except (paramiko.SSHException, ValueError, KeyError) as error:
        raise InputError(f"~/.ssh/config cannot be used for {address.host}: {error}") from error


def _hop(address: Address, options: dict[str, object], limits: Limits, *, jump: bool) -> Hop:
    files = options.get("identityfile")
    said = [address.identity_file] if address.identity_file else []
    said += [str(file) for file in files] if isinstance(files, list) else []
    seconds = str(options.get("connecttimeout") or "")
    host, port = _place(options)
    proxy = options.get("proxycommand")
    return Hop(
        node=address.node,
        jump=jump,
        key_name=address.key_name,
        host=host,
        port=port,
        user=str(options.get("user") or getpass.getuser()),
        identities=tuple(said) or DEFAULT_IDENTITIES,
        only_identities=str(options.get("identitiesonly")).lower() == "yes",
        proxy=str(proxy) if proxy else None,
        timeout=float(seconds) if seconds.isdecimal() else limits.connect,
    )


def _config_text(user_config: Path) -> str:
    texts = (_read_config(path.expanduser(), MOST_HOPS) for path in (user_config, SYSTEM_CONFIG))
    # `Host *` ends the last block of one file before the next begins.
    return "\nHost *\n".join(texts)


def _read_config(path: Path, depth: int) -> str:
    """A configuration with its `Include`s put in, which paramiko would pass over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if depth else []
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise InputError(f"the SSH configuration cannot be read: {error.strerror}", where=str(path)) from error
    text, block = [], "Host *"
    for line in lines:
        keyword, _, rest = line.strip().replace("=", " ", 1).partition(" ")
        if keyword.lower() == "include":
            included = (_read_config(file, depth - 1) for file in _included(rest, path.parent))
            text += [*included, block]
            continue
        if keyword.lower() in ("host", "match"):
            block = line
        text.append(line)
    return "\n".join(text)


def _included(patterns: str, folder: Path) -> Iterator[Path]:
    for pattern in shlex.split(patterns):
        yield from map(Path, sorted(glob.glob(str(folder / Path(pattern).expanduser()))))  # noqa: PTH207
