"""The seam to a container engine: images and containers, by label. Hands: `dockerd` and `processes`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO, Protocol

from cluster.command import Command, Result
from cluster.container import Container, ContainerSpec
from cluster.errors import EngineError
from cluster.layers import Held, Store


class Engine(Protocol):
    """One machine's containers. Errors are `EngineError` and `ImageError`; a missing thing is None or empty."""

    node: str

    def version(self) -> str:
        """What engine this is; `EngineError` with the cure when it is down or may not be used."""

    def image_id(self, name: str) -> str | None:
        """The content digest behind a name, or None."""

    def image_bytes(self, name: str) -> int:
        """About how long the archive of an image is; 0 when that cannot be said."""

    def build(
        self,
        context: BinaryIO,
        *,
        tag: str,
        arguments: Mapping[str, str],
        labels: Mapping[str, str],
        network: str | None,
        tell: Callable[[Mapping[str, object]], None],
    ) -> str:
        """Build an image from a context archive; `tell` hears the engine's messages; gives back its digest."""

    def save(self, name: str) -> Iterator[bytes]:
        """The image as an archive, in chunks."""

    def load(self, chunks: Iterable[bytes]) -> None:
        """Take an archive in. What it held is usable by its digest or tag only when all of it has arrived."""

    def tag(self, image: str, name: str) -> None:
        """Give an image (by digest) a name."""

    def image(self, name: str) -> Held | None:
        """The image behind a name or digest, with its layers; they are empty where they cannot be said."""

    def held(self) -> tuple[Held, ...]:
        """Every image that it has."""

    def store(self) -> Store:
        """How it keeps images, which decides what it takes and by which digest it calls it."""

    def push(self, image: str, *, reference: str, user: str, secret: str) -> None:
        """Send an image, layer by layer, to a registry that this engine reaches without TLS."""

    def remove_image(self, name: str) -> bool:
        """Take a name away, or the image when it has no other; False when a container uses it, or it is gone."""

    def create(self, spec: ContainerSpec) -> str:
        """Make a container; `LockedError` when the name is taken: creating one is atomic, so a name is a lock."""

    def start(self, container: str) -> None:
        """Start a created container."""

    def find(self, labels: Mapping[str, str]) -> tuple[Container, ...]:
        """Containers that carry all these labels, whatever their state."""

    def wait(self, container: str) -> Container:
        """Wait for a container's end; one that is not started yet has none."""

    def stop(self, container: str, *, grace: float) -> None:
        """Ask it to end, and after `grace` seconds end it. Harmless when it has ended or is gone."""

    def remove(self, container: str) -> None:
        """Remove it, live or not, with its anonymous volumes. Harmless when it is gone."""

    def logs(self, container: str, *, tail: int) -> str:
        """The last lines that its main process wrote: for diagnosis, when nothing better is left."""

    def execute(self, container: str, command: Command) -> Result:
        """Run a command inside, to its end; `command.stdin` is its standard input."""

    def interactive(self, container: str, argv: tuple[str, ...], *, tty: bool) -> Command:
        """The command that, run on the machine by a `Transport`, puts a user inside the container."""

    def close(self) -> None:
        """Let go of the engine."""


def engine_error(node: str, said: str) -> EngineError | None:
    """What Docker's client says when it cannot work, with the cure; None when it says nothing."""
    if not said:
        return None
    if "permission denied" in said.lower():
        return EngineError(
            node,
            "this user may not use Docker",
            detail=(said,),
            next_step="on the node: sudo usermod -aG docker $USER, then run again (or use rootless Docker)",
        )
    if "not found" in said or "not installed" in said:
        return EngineError(
            node, "Docker is not installed", detail=(said,), next_step="install docker.io or docker-ce on the node"
        )
    return EngineError(
        node,
        "the Docker engine does not answer",
        detail=(said,),
        next_step="on the node: sudo systemctl start docker",
    )
