"""What the loopback tests share: a server, a user's key, and a place to pin the server's key in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.ssh import Limits, SshTransport, scan_host_keys
from cluster.trust import Address, pin
from tests.loopback.desk import desk, engines  # noqa: F401 - fixtures
from tests.loopback.images import swept, tiny  # noqa: F401
from tests.loopback.sshd import SSHD, Sshd, make_key, running_sshd

# Long enough for a busy machine: where a test waits for a limit to pass, it sets its own.
PATIENT = Limits(connect=30, banner=30, auth=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A user with a key, a file of pinned keys and an SSH configuration, none of them the real user's."""

    folder: Path
    key: Path

    @property
    def known_hosts(self) -> Path:
        """The pinned keys."""
        return self.folder / "cluster" / "known_hosts"

    @property
    def config(self) -> Path:
        """The user's SSH configuration; there is none until a test writes it."""
        return self.folder / "config"

    def address(self, server: Sshd, *, jump: str | None = None, node: str = "gpu-01") -> Address:
        """Where a server is."""
        return Address(node=node, host=server.host, port=server.port, identity_file=str(self.key), jump=jump)

    def trust(self, address: Address) -> Address:
        """Pin what the address shows now, as `launcher trust` would after a yes."""
        pin(self.known_hosts, scan_host_keys(address, known_hosts=self.known_hosts, ssh_config=self.config))
        return address

    def reach(self, address: Address, *, limits: Limits = PATIENT) -> SshTransport:
        """A transport to the address."""
        return SshTransport(address, known_hosts=self.known_hosts, limits=limits, ssh_config=self.config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is of the ring `loopback`."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.loopback)


@pytest.fixture(scope="session")
def site_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's key."""
    if not SSHD.exists():
        pytest.skip("there is no sshd: apt install openssh-server")
    return make_key(tmp_path_factory.mktemp("user") / "id_ed25519")


@pytest.fixture
def site(tmp_path: Path, site_key: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A user whose agent and home have nothing to do with the person at the keyboard."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    return Site(folder=tmp_path, key=site_key)


@pytest.fixture(scope="session")
def shared_sshd(tmp_path_factory: pytest.TempPathFactory, site_key: Path) -> Iterator[Sshd]:
    """A server for tests that leave it as it was."""
    with running_sshd(tmp_path_factory.mktemp("sshd"), authorized=site_key) as server:
        yield server


Serve = Callable[..., Sshd]


@pytest.fixture
def serve(tmp_path: Path, site_key: Path) -> Iterator[Serve]:
    """Starts further servers; one of the same name has the same host key, unless it asks for another kind."""
    with ExitStack() as servers:

        def start(
            name: str, *, port: int | None = None, kinds: tuple[str, ...] = ("ed25519",), options: tuple[str, ...] = ()
        ) -> Sshd:
            server = running_sshd(tmp_path / name, authorized=site_key, port=port, kinds=kinds, options=options)
            return servers.enter_context(server)

        yield start
