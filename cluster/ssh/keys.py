"""Authentication by key: which of the user's keys are offered to a hop, once each. Never a password."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import paramiko
from paramiko.pkey import PublicBlob, UnknownKeyType

from cluster.errors import UnreachableError
from cluster.ssh.faults import try_ssh, unreachable
from cluster.ssh.route import DEFAULT_IDENTITIES, Hop

AGENT = 5.0  # seconds for an agent to list its keys


@dataclass(frozen=True, slots=True)
class Keys:
    """Authentication by key: each key is offered once, in OpenSSH's order, and nothing else is tried."""

    hop: Hop

    def authenticate(self, transport: paramiko.Transport) -> None:
        """Offer the keys; called by paramiko, after the host key was verified."""
        tried: list[str] = []
        agent = _agent(tried)
        try:
            for name, key in self._offers(agent, tried):
                tried.append(name)
                if self._offer(transport, key):
                    return
        finally:
            if agent:
                agent.close()
        raise self._denied(tuple(tried))

    def _offer(self, transport: paramiko.Transport, key: paramiko.PKey) -> bool:
        try:
            rest = transport.auth_publickey(self.hop.user, key)
        except paramiko.BadAuthenticationType as error:
            raise self._refused("the server takes no public keys", str(error)) from error
        except (OSError, EOFError, paramiko.SSHException) as error:
            if "timeout" in str(error):
                raise self._refused("no answer to a key", "") from error
            if not transport.is_active():
                raise self._refused("the server closed the connection while keys were offered", "") from error
            return False
        if rest:
            raise self._refused(f"the server asks for more than a key: {', '.join(rest)}", "")
        return True

    def _offers(self, agent: paramiko.Agent | None, tried: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
        held = {key.asbytes(): key for key in agent.get_keys()} if agent else {}
        offered: set[bytes] = set()
        for file in self.hop.identities:
            key = _load_key(file, held)
            if isinstance(key, str):
                if key:
                    tried.append(f"{file} ({key})")
            elif key.asbytes() not in offered:
                offered.add(key.asbytes())
                yield file, key
        for blob, key in held.items():
            if blob not in offered and not self.hop.only_identities:
                yield f"agent: {key.comment}", key

    def _denied(self, tried: tuple[str, ...]) -> UnreachableError:
        hop = self.hop
        return unreachable(
            hop,
            f"permission denied for user {hop.user!r}",
            detail=(f"tried keys: {', '.join(tried) or 'none were found'}",),
            next_step=f"ssh-copy-id {hop.user}@{hop.host}, or set user or identity_file for {hop.node} in cluster.yaml",
        )

    def _refused(self, what: str, detail: str) -> UnreachableError:
        advice = f"{try_ssh(self.hop)}; too many keys in the agent are a common cause"
        return unreachable(self.hop, what, detail=(detail,) if detail else (), next_step=advice)


def _agent(tried: list[str]) -> paramiko.Agent | None:
    """The user's agent, if it answers a first question: paramiko would wait for ever for one that hangs."""
    path = os.environ.get("SSH_AUTH_SOCK")
    if not path:
        return None
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(AGENT)
            probe.connect(path)
            probe.sendall(b"\0\0\0\x01\x0b")  # SSH_AGENTC_REQUEST_IDENTITIES
            probe.recv(1)
        return paramiko.Agent()
    except (TimeoutError, BlockingIOError):
        tried.append(f"agent (no answer within {AGENT:g} s)")
    except (paramiko.SSHException, OSError):
        pass
    return None


def _load_key(file: str, held: dict[bytes, paramiko.AgentKey]) -> paramiko.PKey | str:
    """The key in a file, or the agent's copy of it; else why not, in words (empty: a default that is not there)."""
    path = Path(file).expanduser()
    with suppress(OSError, ValueError, paramiko.SSHException):
        public = PublicBlob.from_file(f"{path}.pub")
        if public.key_blob in held:
            return held[public.key_blob]
    try:
        return paramiko.PKey.from_path(path)
    except FileNotFoundError:
        return "" if file in DEFAULT_IDENTITIES else "no such file"
    except OSError as error:
        return error.strerror or "unreadable"
    except TypeError:  # cryptography's word for a passphrase that is missing
        return "locked by a passphrase: run ssh-add"
    except (ValueError, paramiko.SSHException, UnknownKeyType):
        return "not a key that can be used here"
