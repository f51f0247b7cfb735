"""The Docker hand of the engine seam: the Docker SDK over a `Transport`. The only file that imports docker.

The Engine API is spoken over whatever channel the transport dials (on a node `docker system dial-stdio` over the
pinned SSH connection, here the engine's own socket), so keys, jump hosts and host-key policy live in one place, and
rootless contexts and podman's Docker API come along. Commands inside a container go through the node's own client:
it carries standard input and terminals over any transport.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import docker
import requests
import urllib3
from docker.transport.sshconn import SSHConnection, SSHConnectionPool, SSHHTTPAdapter
from docker.types import DeviceRequest, LogConfig, Mount, Ulimit
from docker.utils import exclude_paths, parse_repository_tag

from cluster.command import Command, Result
from cluster.container import FOREIGN_STATES, Container, ContainerSpec, ContainerState
from cluster.engine import engine_error
from cluster.errors import CommandError, EngineError, ImageError, LockedError, NodeError, UnreachableError
from cluster.layers import Held, Store
from cluster.transport import Channel, Transport

_URL = "http://docker.invalid"
_CHUNK = 1024**2
# The oldest API that has everything we use (Docker 19.03, podman 3); the real version is agreed on at first use.
_API = "1.40"
# Architectures as podman and macOS call them, by what `uname -m` says on Linux.
UNAME = {"amd64": "x86_64", "arm64": "aarch64"}
# Seconds in which an engine takes in not even one chunk of an archive: it hangs.
_STALLED = 300.0
# How many of a step's last lines are told when it fails.
_LINES = 12
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# What the SDK lets through: its own errors, those of the libraries below it, and those of the channel.
_FOREIGN = (
    docker.errors.DockerException,
    docker.errors.StreamParseError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    OSError,
    EOFError,
)


class _Connection(SSHConnection):  # type: ignore[misc]
    """An HTTP connection on a channel that a transport dials."""

    def __init__(self, dial: Callable[[], Channel], timeout: float) -> None:
        super().__init__(timeout=timeout)
        self._dial = dial

    def connect(self) -> None:
        self.sock = self._dial()
        self.sock.settimeout(self.timeout)


class _Pool(SSHConnectionPool):  # type: ignore[misc]
    def __init__(self, dial: Callable[[], Channel], timeout: float) -> None:
        super().__init__(timeout=timeout, host="docker.invalid")
        self._dial = dial

    def _new_conn(self) -> _Connection:
        return _Connection(self._dial, self.timeout)


class _Adapter(SSHHTTPAdapter):  # type: ignore[misc]
    """The SDK's SSH adapter, with our channels in place of the SDK's own connection."""

    def __init__(self, dial: Callable[[], Channel], timeout: float) -> None:
        super().__init__("ssh://docker.invalid", timeout=timeout, shell_out=True)
        self._pool = _Pool(dial, timeout)

    def get_connection(self, url: str, proxies: object = None) -> _Pool:  # noqa: ARG002 - requests' signature
        return self._pool

    def close(self) -> None:
        self._pool.close()
        super().close()


class _Client(docker.APIClient):  # type: ignore[misc]
    def __init__(self, transport: Transport, timeout: float) -> None:
        super().__init__(base_url=_URL.replace("http", "tcp") + ":2375", version=_API, timeout=timeout)
        self.trust_env = False  # a proxy of the environment must not come between us and the channel
        self.mount(_URL, _Adapter(transport.dial_docker, timeout))
        self._version = self._retrieve_server_version()


class DockerEngine:
    """Docker (or podman's Docker API) on one machine."""

    def __init__(self, transport: Transport, *, timeout: float = 30.0) -> None:
        self.node = transport.node
        self._transport = transport
        self._timeout = timeout
        self._made: _Client | None = None
        self._making = threading.Lock()  # a second client, made beside the first, would leave its channel open

    @property
    def _client(self) -> Any:
        with self._making:
            if self._made is None:
                with self._translated("connect"):
                    self._made = _Client(self._transport, self._timeout)
            return self._made

    def version(self) -> str:
        with self._translated("version"):
            return str(self._client.version()["Version"])

    def architecture(self) -> str:
        """What the engine's machine is, as `uname -m` calls it."""
        with self._translated("info"):
            said = str(self._client.info().get("Architecture") or "")
        return UNAME.get(said, said)

    # Images

    def image_id(self, name: str) -> str | None:
        with self._translated("inspect image"):
            try:
                return str(self._client.inspect_image(name)["Id"])
            except docker.errors.ImageNotFound:
                return None

    def image_bytes(self, name: str) -> int:
        with self._translated("inspect image"):
            try:
                return int(self._client.inspect_image(name).get("Size") or 0)
            except docker.errors.ImageNotFound:
                return 0

    def build(
        self,
        context: BinaryIO,
        *,
        dockerfile: str = "Dockerfile",
        tag: str,
        arguments: Mapping[str, str],
        labels: Mapping[str, str],
        network: str | None,
        tell: Callable[[Mapping[str, object]], None],
    ) -> str:
        with self._translated("build", ImageError):
            messages = self._client.build(
                fileobj=context,
                custom_context=True,
                dockerfile=dockerfile,
                tag=tag,
                buildargs=dict(arguments),
                labels=dict(labels),
                network_mode=network,
                rm=True,
                forcerm=True,
                decode=True,
                timeout=None,
            )
            digest = ""
            said: deque[str] = deque(maxlen=_LINES)
            for message in messages:
                if "error" in message:
                    what = f"the image does not build: {str(message['error']).strip()}"
                    raise ImageError(self.node, what, detail=tuple(said))
                for line in _COLOUR.sub("", str(message.get("stream") or "")).splitlines():
                    if line.startswith("Step "):
                        said.clear()
                    elif line.strip() and not line.startswith((" ---> ", "Removing intermediate")):
                        said.append(line.strip())
                digest = (message.get("aux") or {}).get("ID", digest)
                tell(message)
        return digest or self._must_have(tag)

    def import_base(self, rootfs: BinaryIO, *, tag: str) -> str:
        """Make a base image of a root file system archive."""
        with self._translated("import", ImageError):
            self._client.import_image(src=rootfs, repository=tag.rpartition(":")[0], tag=tag.rpartition(":")[2])
        return self._must_have(tag)

    def pull(self, name: str) -> bool:
        """Fetch an image from its registry; whether it could be had."""
        with self._translated("pull"):
            try:
                self._client.pull(name)
            except (docker.errors.NotFound, docker.errors.APIError):
                return False
        return True

    def save(self, name: str) -> Iterator[bytes]:
        with self._translated("save", ImageError):
            # Not get_image: the engine first lays the whole archive down on its disk, longer than the client waits.
            url = self._client._url("/images/{0}/get", name)  # noqa: SLF001
            with self._client._get(url, stream=True, timeout=None) as response:  # noqa: SLF001
                self._client._raise_for_status(response)  # noqa: SLF001
                yield from response.iter_content(_CHUNK)

    def load(self, chunks: Iterable[bytes]) -> None:
        with self._translated("load", ImageError):
            response = self._client._post(  # noqa: SLF001 - load_image waits no longer than the client's timeout
                self._client._url("/images/load"),  # noqa: SLF001
                data=iter(chunks),
                params={"quiet": True},
                timeout=(_STALLED, None),
            )
            self._client._raise_for_status(response)  # noqa: SLF001
            for line in response.text.splitlines():
                said = json.loads(line) if line.strip() else {}
                if "error" in said:
                    raise ImageError(self.node, f"the image does not load: {said['error']}")

    def tag(self, image: str, name: str) -> None:
        repository, version = parse_repository_tag(name)
        with self._translated("tag", ImageError):
            self._client.tag(image, repository, version, force=True)

    def image(self, name: str) -> Held | None:
        with self._translated("inspect image"):
            try:
                return _held(self._client.inspect_image(name))
            except docker.errors.ImageNotFound:
                return None

    def held(self) -> tuple[Held, ...]:
        with self._translated("list images"):
            names = [str(one["Id"]) for one in self._client.images()]
        seen = (self.image(name) for name in names)
        return tuple(one for one in seen if one)  # one may have gone meanwhile

    def store(self) -> Store:
        with self._translated("info"):
            info = self._client.info()
        if "io.containerd.snapshotter.v1" in [value for _, value in info.get("DriverStatus") or ()]:
            return "containerd"
        return "other" if "BuildahVersion" in info else "classic"

    def push(self, image: str, *, reference: str, user: str, secret: str) -> None:
        repository, tag = reference, image.rpartition(":")[2][:12]
        with self._translated("push", ImageError):
            # Names that killed pushes have left: the same, by another port.
            path = reference.partition("/")[2]
            names = self._client.inspect_image(image).get("RepoTags") or ()
            stale = [name for name in names if name.startswith("127.0.0.1:") and f"/{path}:" in name]
            if len(stale) == len(names):
                # Our name for it would be its only one, and to take that away would remove the image.
                raise ImageError(self.node, f"the image {image} has no name")
            self._client.tag(image, repository, tag, force=True)
            try:
                self._push(repository, tag, login={"username": user, "password": secret, "serveraddress": reference})
            finally:
                for name in (*stale, f"{repository}:{tag}"):
                    with suppress(docker.errors.ImageNotFound):
                        self._client.remove_image(name, noprune=True)

    def _push(self, repository: str, tag: str, *, login: Mapping[str, str]) -> None:
        # Not the SDK's own: it waits for a word no longer than the client's timeout, and reads files of logins.
        response = self._client._post(  # noqa: SLF001
            self._client._url("/images/{0}/push", repository),  # noqa: SLF001
            params={"tag": tag},
            headers={"X-Registry-Auth": docker.auth.encode_header(dict(login))},
            stream=True,
            timeout=(self._timeout, _STALLED),
        )
        self._client._raise_for_status(response)  # noqa: SLF001
        for message in self._client._stream_helper(response, decode=True):  # noqa: SLF001
            if "error" in message:
                raise ImageError(self.node, f"the image cannot be pushed: {message['error']}")

    def remove_image(self, name: str) -> bool:
        with self._translated("remove image"):
            try:
                self._client.remove_image(name)
            except docker.errors.ImageNotFound:
                return False
            except docker.errors.APIError as error:
                if error.status_code != requests.codes.conflict:
                    raise
                return False
        return True

    def _must_have(self, name: str) -> str:
        found = self.image_id(name)
        if found is None:
            raise ImageError(self.node, f"the image {name} was built but is not there")
        return found

    # Containers

    def create(self, spec: ContainerSpec) -> str:
        with self._translated("create"):
            try:
                return str(self._client.create_container_from_config(self._config(spec), spec.name)["Id"])
            except docker.errors.ImageNotFound as error:
                raise ImageError(self.node, f"the image {spec.image} is not there") from error
            except docker.errors.APIError as error:
                if error.status_code != requests.codes.conflict:
                    raise
                raise LockedError(
                    f"a container named {spec.name} is already there", where=f"node {self.node}"
                ) from error

    def start(self, container: str) -> None:
        with self._translated("start"):
            self._client.start(container)

    def find(self, labels: Mapping[str, str]) -> tuple[Container, ...]:
        wanted = [f"{key}={value}" if value else key for key, value in labels.items()]
        with self._translated("list"):
            found = self._client.containers(all=True, filters={"label": wanted})
            return tuple(self._seen(one) for one in found)

    def wait(self, container: str) -> Container:
        with self._translated("wait"):
            while True:
                self._client.wait(container, timeout=None)
                said = self._client.inspect_container(container)
                if FOREIGN_STATES.get(said["State"]["Status"]) is not ContainerState.CREATED:
                    break
                time.sleep(0.2)  # about to be started: Docker calls this an end, too
        if said["State"]["Status"] in ("removing", "dead"):  # it did not end by itself
            raise EngineError(self.node, f"the container {container} was removed")
        return _inspected(said)

    def stop(self, container: str, *, grace: float) -> None:
        with self._translated("stop"):
            try:
                self._client.stop(container, timeout=round(grace))
            except docker.errors.NotFound:
                return

    def remove(self, container: str) -> None:
        with self._translated("remove"):
            try:
                self._client.remove_container(container, force=True, v=True)
            except docker.errors.NotFound:
                return
            except docker.errors.APIError as error:
                # Two removals at once: the other one is doing it.
                if error.status_code != requests.codes.conflict:
                    raise

    def logs(self, container: str, *, tail: int) -> str:
        with self._translated("logs"):
            try:
                said = self._client.logs(container, stdout=True, stderr=True, tail=tail)
            except docker.errors.NotFound:
                return ""
        return bytes(said).decode(errors="replace")

    def execute(self, container: str, command: Command) -> Result:
        inside = Command(argv=("docker", "exec", "-i", container, *command.argv))
        return self._transport.send(inside, (command.stdin,))

    def interactive(self, container: str, argv: tuple[str, ...], *, tty: bool) -> Command:
        return Command(argv=("docker", "exec", "-it" if tty else "-i", container, *argv))

    def close(self) -> None:
        if self._made is not None:
            self._made.close()

    def _seen(self, one: Mapping[str, Any]) -> Container:
        state = FOREIGN_STATES.get(str(one["State"]), ContainerState.RUNNING)
        if state is ContainerState.ENDED:  # the list does not say how it ended
            try:
                return _inspected(self._client.inspect_container(one["Id"]))
            except docker.errors.NotFound:
                pass
        return Container(
            id=str(one["Id"]),
            name=str((one.get("Names") or ["/"])[0]).lstrip("/"),
            image=str(one.get("ImageID") or one.get("Image")),
            state=state,
            labels=dict(one.get("Labels") or {}),
        )

    def _config(self, spec: ContainerSpec) -> Any:
        client = self._client
        uid, _, gid = (spec.user or "0:0").partition(":")
        host = client.create_host_config(
            network_mode="host",
            init=True,
            cap_drop=["ALL"],
            group_add=[str(group) for group in spec.groups],
            security_opt=["no-new-privileges"],
            mounts=[
                # type bind refuses a missing source; `-v` would create it, as root, on the root disk
                Mount(target=mount.target, source=mount.source, type="bind", read_only=mount.read_only)
                for mount in spec.mounts
            ],
            devices=[f"{device}:{device}:rwm" for device in spec.devices],
            device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])] if spec.gpus else None,
            shm_size=spec.shm_bytes,
            ulimits=[Ulimit(name=name, soft=limit, hard=limit) for name, limit in spec.ulimits],
            tmpfs={spec.secrets_dir: f"size=4m,mode=0700,uid={uid},gid={gid}"} if spec.secrets_dir else None,
            log_config=LogConfig(type="json-file", config={"max-size": "16m", "max-file": "2"}),
        )
        return client.create_container_config(
            image=spec.image,
            entrypoint=list(spec.argv[:1]),
            command=list(spec.argv[1:]),
            environment=dict(spec.env),
            labels=dict(spec.labels),
            working_dir=spec.workdir,
            user=spec.user,
            host_config=host,
            # A healthcheck or a stop signal of a user's own base image is none of ours.
            stop_signal="SIGTERM",
        )

    @contextmanager
    def _translated(self, doing: str, kind: type[EngineError] = EngineError) -> Iterator[None]:
        try:
            yield
        except docker.errors.APIError as error:
            raise kind(self.node, f"Docker refuses to {doing}: {error.explanation or error}") from error
        except _FOREIGN as error:
            raise self._silent(doing, error) from error

    def _silent(self, doing: str, error: Exception) -> NodeError:
        """Why the engine does not answer, asked of its own client: it sees permissions, we an end of file."""
        cause = error.__cause__ or error  # the SDK wraps what happens while it asks for the engine's version
        if isinstance(cause, NodeError) and not isinstance(cause, EngineError):
            return cause
        hangs = isinstance(cause, requests.Timeout)
        # Whether it is the engine that hangs, or the machine: that the client cannot say.
        ask = Command(argv=("true",) if hangs else ("docker", "version", "--format", "{{.Server.Version}}"))
        try:
            said = self._transport.run(ask, timeout=10)
        except UnreachableError as gone:
            return gone
        except CommandError:
            return EngineError(self.node, f"Docker does not answer ({doing}): {error}")
        if hangs:
            return EngineError(
                self.node,
                f"the Docker engine hangs: no answer within {self._timeout:g} s ({doing})",
                next_step="on the node: sudo systemctl restart docker; journalctl -u docker says more",
            )
        return engine_error(self.node, "" if said.ok else " ".join(said.tail(1))) or EngineError(
            self.node, f"Docker broke off ({doing}): {error}", next_step="look at the engine's own log on the node"
        )


def context_files(folder: Path, dockerfile: str) -> tuple[str, ...]:
    """What a folder gives to a build of this Dockerfile: all but what its .dockerignore names, as Docker reads that."""
    try:
        lines = (folder / ".dockerignore").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return tuple(sorted(exclude_paths(str(folder), patterns, dockerfile=dockerfile)))


def _held(one: Mapping[str, Any]) -> Held:
    return Held(
        id=str(one["Id"]),
        tags=tuple(one.get("RepoTags") or ()),
        layers=tuple((one.get("RootFS") or {}).get("Layers") or ()),
        size=int(one.get("Size") or 0),
        labels=dict((one.get("Config") or {}).get("Labels") or {}),
        created=str(one.get("Created") or ""),
    )


def _inspected(one: Mapping[str, Any]) -> Container:
    state = one["State"]
    mine = FOREIGN_STATES.get(str(state["Status"]), ContainerState.RUNNING)
    return Container(
        id=str(one["Id"]),
        name=str(one["Name"]).lstrip("/"),
        image=str(one["Image"]),
        state=mine,
        labels=dict(one["Config"].get("Labels") or {}),
        code=int(state["ExitCode"]) if mine is ContainerState.ENDED else None,
        oom=bool(state.get("OOMKilled")),
        started=state.get("StartedAt"),
    )
