"""The inventory: which machines there are and how to use them. Read and judged as text, never by asking a machine.

Inventory ── image: ImageRecipe
          ├─ container: Container ── mounts: Mount
          ├─ defaults: NodeDefaults ── paths: Paths
          └─ nodes: Node (NodeDefaults with a name and a host; the defaults are applied)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from cluster.allowed import (
    LAST_PORT,
    ULIMITS,
    Address,
    AptName,
    Architectures,
    Device,
    Env,
    HostName,
    IdentityPath,
    Image,
    JumpText,
    LocalPath,
    Login,
    Name,
    Nic,
    NodePath,
    NvmePaths,
    Problem,
    Requirement,
    Secrets,
    ShmSize,
    StatePath,
    TargetPath,
    Ulimits,
    Url,
    nested,
    refuse,
    repeated,
    shown,
)
from cluster.complaints import judge
from cluster.document import Document, Place, load

Engine = Literal["docker", "process"]
Accelerator = Literal["cuda", "cpu"]
_MOST_PACKAGES = 500
HERE = "here"  # in place of a node's name: the machine that the launcher runs on
NEXT_STEP = "configs/cluster.yaml explains every key"

# --- the models: their descriptions are the schema that editors show -------------------------------------------------


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Mount(_Model):
    """A folder of the node that the containers see besides our own. It must exist."""

    source: NodePath = Field(description="Absolute path on the node; it must exist.", examples=["/mnt/models"])
    target: TargetPath = Field(description="Absolute path in the container.", examples=["/models"])
    read_only: bool = Field(default=True, description="Whether the job may only read it.", examples=[True])


def _check_mounts(mounts: tuple[Mount, ...]) -> tuple[Mount, ...]:
    refuse(((i, "target"), why) for (i, *_), why in nested([mount.target for mount in mounts]))
    return mounts


class ImageRecipe(_Model):
    """How the image is built, or which ready one is used."""

    flavour: Accelerator | None = Field(
        default=None, description="What to build for: cuda or cpu. Default: the accelerator.", examples=["cuda"]
    )
    use: Image | None = Field(
        default=None,
        description="A ready image by name, instead of building one. Excludes all build settings.",
        examples=["registry.example:5000/ml/deepspeed:1.2"],
    )
    base: Image | None = Field(default=None, description="The image to build on.", examples=["debian:bookworm-slim"])
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
    cuda_architectures: Architectures = Field(
        default="8.0;8.6;8.9;9.0;10.0;12.0+PTX",
        description="The GPU generations that the CUDA operators are compiled for.",
        examples=["8.0;9.0"],
    )
    toolkit: bool = Field(
        default=False,
        description="Keep the compilers in the image, for jobs that compile operators of their own.",
        examples=[True],
    )
    build_network: Literal["default", "host"] = Field(
        default="default", description="The network of the build: docker's default, or the host's.", examples=["host"]
    )
    build_on: Name | None = Field(
        default=None,
        description="The node whose engine builds the image, or 'here'. Default: this machine, or the first node where "
        "this one has no Docker engine or another architecture.",
        examples=["gpu-01"],
    )
    packages: Annotated[tuple[Requirement, ...], Field(max_length=_MOST_PACKAGES)] = Field(
        default=(),
        description="Python packages that jobs need besides, as pip reads them; a thin layer on top of the image.",
        examples=[["einops==0.8.1"]],
    )
    requirements: LocalPath | None = Field(
        default=None,
        description="The same from a requirements file on this machine; relative to this file's folder.",
        examples=["requirements.txt"],
    )
    apt: Annotated[tuple[AptName, ...], Field(max_length=_MOST_PACKAGES)] = Field(
        default=(), description="Debian packages that jobs need besides.", examples=[["ffmpeg"]]
    )
    dockerfile: LocalPath | None = Field(
        default=None,
        description="A Dockerfile of your own on top of the image, instead of packages, requirements and apt. It "
        "begins with 'ARG BASE' and 'FROM ${BASE}'; its folder is what it can COPY.",
        examples=["image/Dockerfile"],
    )

    @model_validator(mode="after")
    def _check_use(self) -> ImageRecipe:
        fields = type(self).model_fields.items()
        build = [name for name, field in fields if getattr(self, name) != field.default]
        refuse(
            ((name,), "says how to build, but 'use' names a ready image; keep one of them")
            for name in build
            if self.use and name not in ("use", "flavour")
        )
        refuse(
            ((name,), "stands beside 'dockerfile', which does all of it; keep one of them")
            for name in ("packages", "requirements", "apt")
            if self.dockerfile and getattr(self, name)
        )
        return self


class Container(_Model):
    """What every container gets. It never gets privileges or capabilities."""

    shm_size: ShmSize | None = Field(
        default=None,
        description="Shared memory (/dev/shm), in m or g. Default: half of the node's memory.",
        examples=["16g"],
    )
    ulimits: Ulimits = Field(
        default={"memlock": -1, "stack": 67108864},
        description="Limits by name; -1 is unlimited. Giving any replaces the default.",
        examples=[{"memlock": -1, "stack": 67108864}],
        json_schema_extra={"propertyNames": {"enum": list(ULIMITS)}},
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
    secrets: Secrets = Field(
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

    user: Login | None = Field(
        default=None,
        description="SSH user. Default: ~/.ssh/config, else your own name.",
        examples=["ml"],
    )
    port: int | None = Field(
        default=None, ge=1, le=LAST_PORT, description="SSH port. Default: ~/.ssh/config, else 22.", examples=[22]
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
    nic: Nic | None = Field(
        default=None,
        description="Network interface for training traffic. Default: the one that has the node's address.",
        examples=["eth1"],
    )
    nvme: NvmePaths = Field(
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

    name: Name = Field(description="What the node is called, here and in messages.", examples=["gpu-01"])
    host: HostName = Field(description="SSH host: a name, an IPv4 or an IPv6 address.", examples=["10.0.0.11"])
    address: Address | None = Field(
        default=None,
        description="Address in the training network. Default: found by asking the node.",
        examples=["192.168.1.11"],
    )


class Inventory(_Model):
    """A cluster: its machines and how jobs are run on them. `nodes` have the defaults applied."""

    name: Name = Field(description="The cluster's name, on every container.", examples=["lab"])
    accelerator: Accelerator = Field(default="cuda", description="What computes: cuda or cpu.", examples=["cuda"])
    engine: Engine = Field(
        default="docker",
        description="What runs the job: docker, or process (this machine only, without containers).",
        examples=["docker"],
    )
    master_port: int = Field(
        default=29500,
        ge=1024,
        le=LAST_PORT,
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
        examples=[[{"name": "gpu-01", "host": "10.0.0.11"}, {"name": "gpu-02", "host": "10.0.0.12"}]],
        json_schema_extra={"minItems": 1},
    )
    spares: Annotated[tuple[Name, ...], Field(max_length=1024)] = Field(
        default=(),
        description="Names of nodes that runs leave out, until one takes the place of a node that is lost.",
        examples=[["gpu-02"]],
    )

    @property
    def workers(self) -> tuple[str, ...]:
        """The names of the nodes that are no spares."""
        return tuple(node.name for node in self.nodes if node.name not in self.spares)

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
        refuse(_conflicts(self))
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
    yield from _at("name", repeated([node.name for node in nodes], "the node name"))
    hosts = [
        f"{node.host.lower()}:{node.port or 22}" if far else None for node, far in zip(nodes, distant, strict=True)
    ]
    yield from _at("host", repeated(hosts, "the machine"))
    addresses = [node.address if far else None for node, far in zip(nodes, distant, strict=True)]
    yield from _at("address", repeated(addresses, "the address"))
    if inventory.image.build_on not in (None, HERE, *(node.name for node in nodes)):
        yield ("image", "build_on"), f"{shown(inventory.image.build_on or '')} is none of the nodes, nor '{HERE}'"
    yield from _spare_conflicts(inventory)
    for index, node in enumerate(nodes):
        for place, what in _node_conflicts(inventory, node):
            yield ("nodes", index, *place), what


def _spare_conflicts(inventory: Inventory) -> Iterator[Problem]:
    names = [node.name for node in inventory.nodes]
    for index, name in enumerate(inventory.spares):
        if name not in names:
            yield ("spares", index), f"{shown(name)} is none of the nodes"
    for place, what in repeated(inventory.spares, "the spare"):
        yield ("spares", *place), what
    if names and not inventory.workers:
        yield ("spares",), "leaves no node to run on"


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
            yield ("paths", key), f"{shown(path)} is already used for {used[path]}"
        elif path:
            used[path] = key


# --- reading ---------------------------------------------------------------------------------------------------------


def load_inventory(path: Path, *, engine: Engine | None = None) -> Inventory:
    """Read an inventory file; `engine` stands in for the file's own."""
    return read_inventory(load(path), engine=engine)


def read_inventory(document: Document, *, engine: Engine | None = None, home: Path | None = None) -> Inventory:
    """Judge a document; one `InputError` names everything that is wrong in it."""
    instead = {"engine": engine} if engine else {}
    return judge(document, Inventory, _KEYS, next_step=NEXT_STEP, home=home, instead=instead)


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Inventory.model_json_schema()}


_MODELS: dict[str, type[_Model]] = {
    "": Inventory,
    "image": ImageRecipe,
    "container": Container,
    "mounts": Mount,
    "defaults": NodeDefaults,
    "nodes": Node,
    "paths": Paths,
}
_KEYS = {above: tuple(model.model_fields) for above, model in _MODELS.items()}
