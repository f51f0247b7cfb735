"""Host keys: nobody is talked to whose key is not pinned, on any hop and by any door."""

from __future__ import annotations

import ast
import base64
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.command import Command, script
from cluster.errors import InputError, UntrustedError
from cluster.ssh import SshTransport, hops, scan_host_keys
from cluster.trust import Address, HostKey, Verdict, compare, key_name, pin, pinned
from tests.loopback.conftest import Serve, Site
from tests.loopback.sshd import LOCALHOST, Sshd, make_key

Door = Callable[[SshTransport, Path], object]

DOORS: dict[str, Door] = {
    "open": lambda transport, _: transport.open(),
    "run": lambda transport, canary: transport.run(Command(argv=("touch", str(canary)))),
    "send": lambda transport, canary: transport.send(script('cat > "$1"', str(canary)), [b"x"]),
    "stream": lambda transport, canary: transport.stream(
        Command(argv=("touch", str(canary))), lambda _: None, stop=lambda: False
    ),
    "interact": lambda transport, canary: transport.interact(Command(argv=("touch", str(canary))), tty=False),
    "dial": lambda transport, _: transport.dial_docker(),
}


def refused(site: Site, address: Address, door: Door) -> UntrustedError:
    canary = site.folder / "canary"
    transport = site.reach(address)
    try:
        with pytest.raises(UntrustedError) as caught:
            door(transport, canary)
    finally:
        transport.close()
    assert not canary.exists()
    assert caught.value.exit_code == 3
    return caught.value


def untouched(server: Sshd) -> bool:
    return server.attempts == 0 and server.commands == 0


@pytest.fixture
def impostor(serve: Serve) -> Callable[[Sshd], Sshd]:
    """Takes a server's place: the same port, another host key, and it would let the user in."""

    def replace(server: Sshd) -> Sshd:
        server.stop()
        return serve("impostor", port=server.port)

    return replace


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
class TestEveryDoor:
    def test_an_unknown_machine_is_not_even_called(self, site: Site, serve: Serve, door: Door) -> None:
        server = serve("node")
        error = refused(site, site.address(server), door)
        assert str(error) == (
            f"node gpu-01 (127.0.0.1:{server.port}): no host key is pinned; nothing was sent\n"
            "  next: run `launcher trust`, which shows the fingerprints and pins them"
        )
        assert "Connection from" not in server.log

    def test_an_impostor_gets_nothing(
        self, site: Site, serve: Serve, impostor: Callable[[Sshd], Sshd], door: Door
    ) -> None:
        server = serve("node")
        address = site.trust(site.address(server))
        (before,) = pinned(site.known_hosts)
        wrong = impostor(server)
        (after,) = scan_host_keys(address, known_hosts=site.known_hosts, ssh_config=site.config)
        error = refused(site, address, door)
        assert error.what == "the host key is not the pinned one; nothing was sent"
        assert error.detail == (f"pinned: {before}", f"shown:  {after}")
        assert untouched(wrong)

    def test_an_impostor_behind_a_jump_host_gets_nothing(
        self, site: Site, serve: Serve, impostor: Callable[[Sshd], Sshd], door: Door
    ) -> None:
        gate, server = serve("gate"), serve("node")
        site.trust(site.address(gate))
        address = site.trust(site.address(server, jump=f"{LOCALHOST}:{gate.port}"))
        wrong = impostor(server)
        assert refused(site, address, door).where == f"node gpu-01 (127.0.0.1:{server.port})"
        assert untouched(wrong)

    @pytest.mark.parametrize("configured", [False, True], ids=["inventory", "ssh_config"])
    def test_an_impostor_as_jump_host_gets_nothing(
        self, site: Site, serve: Serve, impostor: Callable[[Sshd], Sshd], door: Door, configured: bool
    ) -> None:
        gate, server = serve("gate"), serve("node")
        site.trust(site.address(gate))
        jump = f"{LOCALHOST}:{gate.port}"
        address = site.trust(site.address(server, jump=jump))
        if configured:
            site.config.write_text(f"Host node\n  HostName {LOCALHOST}\n  Port {server.port}\n  ProxyJump {jump}\n")
            address = Address(node="gpu-01", host="node")
            site.known_hosts.write_text(site.known_hosts.read_text() + f"node {server.host_key()}\n")
        wrong = impostor(gate)
        error = refused(site, address, door)
        assert error.where == f"node gpu-01, jump host 127.0.0.1:{gate.port}"
        assert untouched(wrong)

    def test_an_unknown_jump_host_is_not_even_called(self, site: Site, serve: Serve, door: Door) -> None:
        gate, server = serve("gate"), serve("node")
        site.trust(site.address(server))
        refused(site, site.address(server, jump=f"{LOCALHOST}:{gate.port}"), door)
        assert "Connection from" not in gate.log


class TestJumpHosts:
    def test_a_node_is_reached_through_pinned_machines(self, site: Site, serve: Serve) -> None:
        first, second, server = serve("first"), serve("second"), serve("node")
        jump = f"{LOCALHOST}:{first.port},{LOCALHOST}:{second.port}"
        for place in hops(site.address(server, jump=jump), ssh_config=site.config):
            site.trust(place)
        transport = site.reach(site.address(server, jump=jump))
        assert transport.run(Command(argv=("echo", "far"))).stdout == b"far\n"
        transport.close()
        assert [one.commands for one in (first, second, server)] == [0, 0, 1]

    def test_a_jump_of_the_configuration_is_pinned_like_any_other(self, site: Site, serve: Serve) -> None:
        gate, server = serve("gate"), serve("node")
        site.config.write_text(
            f"Host gate\n  HostName {LOCALHOST}\n  Port {gate.port}\n"
            f"Host node\n  HostName {LOCALHOST}\n  Port {server.port}\n  ProxyJump gate\n"
            f"Host *\n  IdentityFile {site.key}\n"
        )
        address = Address(node="gpu-01", host="node")
        for place in hops(address, ssh_config=site.config):
            site.trust(place)
        assert [key.name for key in pinned(site.known_hosts)] == ["gate", "node"]
        transport = site.reach(address)
        assert transport.run(Command(argv=("echo", "far"))).stdout == b"far\n"
        transport.close()


class TestScanning:
    def test_every_type_of_key_is_shown_and_nobody_is_authenticated(self, site: Site, serve: Serve) -> None:
        kinds = ("ed25519", "ecdsa", "rsa")
        server = serve("node", kinds=kinds)
        keys = scan_host_keys(site.address(server), known_hosts=site.known_hosts, ssh_config=site.config)
        assert [f"{key.type} {key.base64}" for key in keys] == [server.host_key(kind) for kind in kinds]
        assert untouched(server)

    def test_a_fingerprint_is_what_ssh_keygen_shows(self, site: Site, serve: Serve) -> None:
        server = serve("node")
        (key,) = scan_host_keys(site.address(server), known_hosts=site.known_hosts, ssh_config=site.config)
        line = ["ssh-keygen", "-l", "-f", str(server.folder / "host_ed25519.pub")]
        shown = subprocess.run(line, capture_output=True, check=True, text=True)
        assert key.fingerprint == shown.stdout.split()[1]

    @pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
    def test_a_pinned_type_is_asked_for_where_the_server_prefers_another(
        self, site: Site, serve: Serve, kind: str
    ) -> None:
        server = serve("node", kinds=("ed25519", "ecdsa", "rsa"))
        address = site.address(server)
        pin(site.known_hosts, [read(address.key_name, server.host_key(kind))])
        transport = site.reach(address)
        transport.open()
        transport.close()

    def test_a_machine_without_the_pinned_type_is_another(self, site: Site, serve: Serve) -> None:
        server = serve("node", kinds=("ecdsa",))
        other = make_key(site.folder / "other").with_suffix(".pub").read_text()
        address = site.address(server)
        pin(site.known_hosts, [read(address.key_name, " ".join(other.split()[:2]))])
        error = refused(site, address, DOORS["run"])
        assert error.what == "the machine shows no host key of the pinned type any more; nothing was sent"
        assert untouched(server)

    def test_openssh_reads_the_file_we_write(self, site: Site, shared_sshd: Sshd) -> None:
        address = site.trust(site.address(shared_sshd))
        options = (f"UserKnownHostsFile={site.known_hosts}", "GlobalKnownHostsFile=/dev/null")
        line = ["ssh", "-p", str(address.port), "-i", str(site.key), "-o", "StrictHostKeyChecking=yes"]
        line += [word for option in options for word in ("-o", option)]
        done = subprocess.run([*line, LOCALHOST, "echo hello"], capture_output=True, check=False, timeout=60)
        assert done.stdout == b"hello\n"


class TestPinning:
    def test_a_name_is_written_as_openssh_writes_it(self) -> None:
        assert [key_name("GPU-a"), key_name("h", 22), key_name("h", 2222), key_name("::1", 2222)] == [
            "gpu-a",
            "h",
            "[h]:2222",
            "[::1]:2222",
        ]

    def test_machines_are_new_the_same_or_changed(self) -> None:
        a, b, other = some_key("a"), some_key("b"), some_key("a", kind="ssh-rsa")
        assert compare((), (a,)) is Verdict.NEW
        assert compare((a,), (a, other)) is Verdict.SAME
        assert compare((a, other), (a,)) is Verdict.SAME
        assert compare((a,), (b,)) is Verdict.CHANGED
        assert compare((a, other), (b, other)) is Verdict.CHANGED
        assert compare((a,), (other,)) is Verdict.CHANGED

    def test_a_changed_key_is_replaced_only_when_asked(self, tmp_path: Path) -> None:
        file = tmp_path / "x" / "known_hosts"
        a, b, neighbour = some_key("a"), some_key("b"), some_key("c", name="other")
        pin(file, [a, neighbour])
        with pytest.raises(UntrustedError):
            pin(file, [b])
        assert pinned(file) == (a, neighbour)
        pin(file, [b], replace=True)
        assert pinned(file) == (b, neighbour)

    def test_a_further_type_is_added_beside_the_first(self, tmp_path: Path) -> None:
        file = tmp_path / "known_hosts"
        first, second = some_key("a"), some_key("a", kind="ssh-rsa")
        pin(file, [first])
        pin(file, [first, second])
        pin(file, [second])
        assert pinned(file) == (first, second)

    def test_the_file_is_its_owners_alone(self, tmp_path: Path) -> None:
        file = tmp_path / "x" / "known_hosts"
        pin(file, [some_key("a")])
        assert [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent)] == [0o600, 0o700]
        assert list(file.parent.iterdir()) == [file]

    def test_writers_do_not_lose_each_others_keys(self, tmp_path: Path) -> None:
        file = tmp_path / "known_hosts"
        keys = [some_key("a", name=f"node-{number:02}") for number in range(24)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: pin(file, [key]), keys))
        assert pinned(file) == tuple(keys)

    @pytest.mark.parametrize(
        "line",
        ["gpu-01", "gpu-01 ssh-ed25519 !!!!", "gpu-01 ssh-ed25519 AAAA", "a,b ssh-ed25519 AAAA", "* ssh-rsa AAAA"],
    )
    def test_a_damaged_line_is_named(self, tmp_path: Path, line: str) -> None:
        file = tmp_path / "known_hosts"
        file.write_text(f"# ours\n\n{line}\n")
        with pytest.raises(InputError) as caught:
            pinned(file)
        assert caught.value.where == f"{file}:3"

    @pytest.mark.parametrize("name", ["", "a b", "a,b", "*", "a\nb", "|1|x", "#a"])
    def test_a_name_that_the_file_cannot_carry_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError):
            pin(tmp_path / "known_hosts", [some_key("a", name=name)])


def some_key(seed: str, *, name: str = "gpu-01", kind: str = "ssh-ed25519") -> HostKey:
    blob = len(kind).to_bytes(4, "big") + kind.encode() + seed.encode().ljust(36, b"\0")
    return HostKey(name=name, type=kind, base64=base64.b64encode(blob).decode())


def read(name: str, line: str) -> HostKey:
    kind, encoded = line.split()
    return HostKey(name=name, type=kind, base64=encoded)


def test_no_code_trusts_by_itself() -> None:
    root = Path(__file__).parents[2]
    for path in (*root.glob("cluster/**/*.py"), *root.glob("launcher/**/*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {name.name for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names}
        assert not names & {"AutoAddPolicy", "WarningPolicy", "load_system_host_keys"}, path
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        loose = [text for text in texts if "stricthostkeychecking" in text.lower()]
        assert not [text for text in loose if "yes" not in text.lower()], path
