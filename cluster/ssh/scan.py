"""The host keys that a machine shows, for somebody to compare and to pin. Never an authentication."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from cluster.ssh.connect import ECDSA, connect, insist, reach, transports
from cluster.ssh.faults import read_key
from cluster.ssh.route import LIMITS, USER_CONFIG, Hop, Limits, route
from cluster.trust import Address, HostKey


def scan_host_keys(
    address: Address, *, known_hosts: Path, limits: Limits = LIMITS, ssh_config: Path = USER_CONFIG
) -> tuple[HostKey, ...]:
    """The keys that a machine shows, one of each type; nobody is authenticated and nothing is asked of it.

    Jump hosts on the way must be pinned already: scan and pin `hops(address)` in their order.
    """
    way = route(address, ssh_config, limits)
    with ExitStack() as stack:
        before = connect(way[:-1], known_hosts, limits, stack) if way[1:] else None
        families = (("ssh-ed25519",), ECDSA, ("ssh-rsa",))
        shown = [_shown(way[-1], family, before, limits) for family in families]
    return tuple(key for key in shown if key)


def _shown(hop: Hop, types: tuple[str, ...], before: paramiko.Transport | None, limits: Limits) -> HostKey | None:
    """The machine's key of one of these types, if it has one."""

    def attempt() -> HostKey | None:
        transport = transports(types, limits)(reach(hop, before, limits))
        try:
            transport.start_client()
            return read_key(hop, transport.get_remote_server_key())
        except IncompatiblePeer as error:
            if "host key" in str(error):
                return None
            raise
        finally:
            transport.close()

    return insist(hop, limits, attempt)
