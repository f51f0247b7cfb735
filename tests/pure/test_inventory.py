"""The inventory: what the annotated example says, how defaults apply, and how everything wrong is told at once."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cluster.document import read
from cluster.errors import InputError
from cluster.inventory import (
    Container,
    ImageRecipe,
    Inventory,
    Mount,
    Node,
    NodeDefaults,
    Paths,
    load_inventory,
    read_inventory,
    schema,
)

ROOT = Path(__file__).parents[2]
EXAMPLE = (ROOT / "configs" / "cluster.yaml").read_text()
MODELS: tuple[type[BaseModel], ...] = (Inventory, ImageRecipe, Container, Mount, NodeDefaults, Node, Paths)
HOME = Path("/home/ada")


def reading(text: str) -> Inventory:
    return read_inventory(read(text, "/site/cluster.yaml"), home=HOME)


def refusal(text: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        reading(text)
    return str(caught.value).splitlines()


def test_the_annotated_example_says_what_it_seems_to_say() -> None:
    key = HOME / ".ssh" / "id_ed25519"
    nvme = ("/mnt/nvme0", "/mnt/nvme1")
    defaults = NodeDefaults(user="ml", identity_file=key, nvme=nvme, env={"NCCL_IB_HCA": "mlx5_0"})
    assert reading(EXAMPLE) == Inventory(
        name="lab",
        image=ImageRecipe(
            base="debian:bookworm-slim",
            ca_bundle=Path("/site/certs/site.pem"),
            pip_index="https://pypi.example/simple",
            apt_mirror="http://mirror.example/debian",
            wheels=Path("/site/wheels"),
            cuda_architectures="8.0;9.0",
            build_on="gpu-01",
            packages=("einops==0.8.1",),
            requirements=Path("/site/requirements.txt"),
            apt=("ffmpeg",),
        ),
        container=Container(
            shm_size="16g",
            mounts=(Mount(source="/mnt/models", target="/models"),),
            devices=("/dev/infiniband",),
            env={"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "8"},
            secrets=("HF_TOKEN",),
        ),
        defaults=defaults,
        nodes=(
            Node(
                name="gpu-01",
                host="10.0.0.11",
                port=22,
                user="ml",
                identity_file=key,
                jump="ml@bastion.example:22",
                address="192.168.1.11",
                nic="eth1",
                slots=8,
                env={"NCCL_IB_HCA": "mlx5_1"},
                nvme=nvme,
                paths=Paths(checkpoints="/mnt/checkpoints", data="/mnt/data", cache="/mnt/cache"),
            ),
            Node(
                name="gpu-02",
                host="gpu-02.example",
                user="ml",
                identity_file=key,
                address="192.168.1.12",
                env={"NCCL_IB_HCA": "mlx5_0"},
                nvme=nvme,
            ),
        ),
        spares=("gpu-02",),
    )


def test_the_annotated_example_explains_every_key() -> None:
    explained = set(re.findall(r"^ *(?:- )?# ([a-z_]+): ", EXAMPLE, re.MULTILINE))
    mounts = set(Mount.model_fields)
    keys = {name for model in MODELS for name in model.model_fields} - mounts
    assert keys - explained == set()
    assert explained - keys == set()
    assert all(re.search(rf"^ *(?:- )?{key}: .*#", EXAMPLE, re.MULTILINE) for key in mounts)


def test_the_embedded_default_is_this_machine_alone() -> None:
    assert load_inventory(ROOT / "examples" / "local.yaml") == Inventory(
        name="local",
        accelerator="cpu",
        engine="process",
        nodes=(Node(name="local", host="localhost", transport="local", slots=2),),
    )


def test_another_engine_can_stand_in() -> None:
    path = ROOT / "examples" / "local.yaml"
    assert load_inventory(path, engine="docker").engine == "docker"
    with pytest.raises(InputError, match=r"nodes\[0\]\.transport must be local, since engine is process"):
        read_inventory(read(EXAMPLE, "cluster.yaml"), engine="process")


MERGED = """\
name: lab
accelerator: cpu
defaults:
  user: ml
  port: 2222
  slots: 4
  nic: eth0
  jump: bastion
  env: {A: "1", B: "2"}
  nvme: [/mnt/a]
  paths: {data: /mnt/data, cache: /mnt/cache}
nodes:
  - {name: n1, host: h1}
  - name: n2
    host: h2
    port: 22
    slots: null
    jump: ml@[2001:db8::1]:23
    env: {B: "3", C: "4"}
    nvme: []
    paths: {cache: null, state: /srv/launcher}
    identity_file: keys/id
"""


def test_a_node_wins_over_the_defaults_key_by_key() -> None:
    inventory = reading(MERGED)
    assert inventory.flavour == "cpu"
    assert inventory.nodes == (
        Node(
            name="n1",
            host="h1",
            user="ml",
            port=2222,
            slots=4,
            nic="eth0",
            jump="bastion",
            env={"A": "1", "B": "2"},
            nvme=("/mnt/a",),
            paths=Paths(data="/mnt/data", cache="/mnt/cache"),
        ),
        Node(
            name="n2",
            host="h2",
            user="ml",
            port=22,
            slots=1,
            nic="eth0",
            jump="ml@[2001:db8::1]:23",
            env={"A": "1", "B": "3", "C": "4"},
            paths=Paths(data="/mnt/data", state="/srv/launcher"),
            identity_file=Path("/site/keys/id"),
        ),
    )


@pytest.mark.parametrize(
    ("size", "number"), [(None, None), ("512m", 512 << 20), ("16g", 16 << 30)], ids=["none", "m", "g"]
)
def test_shared_memory_is_a_number_of_bytes(size: str | None, number: int | None) -> None:
    assert Container(shm_size=size).shm_bytes == number


@pytest.mark.parametrize(
    ("host", "kept"),
    [
        ("gpu-01", "gpu-01"),
        ("gpu_01", "gpu_01"),
        ("GPU-01.Example.com", "GPU-01.Example.com"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("10.0.0.11", "10.0.0.11"),
        ("::1", "::1"),
        ("2001:DB8:0:0::11", "2001:db8::11"),
        ("1a.2b", "1a.2b"),
        ("a" * 63, "a" * 63),
    ],
)
def test_a_good_host_is_taken(host: str, kept: str) -> None:
    assert Node(name="gpu-01", host=host).host == kept


@pytest.mark.parametrize(
    "path",
    ["/mnt", "/mnt/nvme0", "/data", "/srv/x", "/opt/data", "/home/ml/data", "/root/data", "/var/lib/x", "/etcetera"],
)
def test_a_good_folder_is_taken(path: str) -> None:
    assert Mount(source=path, target="/models").source == path


@pytest.mark.parametrize("state", ["~/.launcher", "~/a/b", "/srv/launcher"])
def test_a_good_state_folder_is_taken(state: str) -> None:
    assert Paths(state=state).state == state


def test_a_long_path_is_refused() -> None:
    assert "longer than 1024 characters" in refusal(EXAMPLE.replace("/mnt/data", "/mnt/" + "a" * 1024))[0]


def test_a_long_or_broken_variable_is_refused() -> None:
    long = EXAMPLE.replace("mlx5_1", "x" * 100_001)
    assert "nodes[0].env.NCCL_IB_HCA must be text of at most 100000 characters" in refusal(long)[0]
    with pytest.raises(ValueError, match="without NUL"):
        Container(env={"A": "x\0"})


@pytest.mark.parametrize(
    "image", ["debian", "debian:bookworm-slim", "r.example:5000/a/b_c:1.2", "a@sha256:" + "0" * 64, "localhost/x"]
)
def test_a_good_image_is_taken(image: str) -> None:
    assert ImageRecipe(use=image).use == image


@pytest.mark.parametrize(
    "package",
    [
        *("einops", "einops==0.8.1", "flash-attn>=2,<3", "trl[peft, quantization] ~= 0.9", "zope.interface!=5.*"),
        "pywin32; sys_platform == 'win32'",
        "lab @ git+ssh://git@git.example/lab.git@v1#subdirectory=x",
        "torch==2.13.0+cu130",
    ],
)
def test_a_good_requirement_is_taken(package: str) -> None:
    assert ImageRecipe(packages=(package,)).packages == (package,)


@pytest.mark.parametrize("package", ["g++", "libgl1", "libstdc++6", "libc6:i386", "ffmpeg=7:5.1.6-0+deb12u1"])
def test_a_good_package_of_debian_is_taken(package: str) -> None:
    assert ImageRecipe(apt=(package,)).apt == (package,)


def test_all_that_is_wrong_is_told_at_once_in_the_order_of_the_file() -> None:
    text = """\
name: LAB
colour: red
master_port: 80
container: {ulimits: {memlok: 1}, env: {HF_TOKEN: hunter2, RANK: "0"}}
nodes:
  - name: gpu-01
    hots: 10.0.0.11
    nvme: [/mnt/a, mnt, /etc]
"""
    keys = ", ".join(Inventory.model_fields)
    assert refusal(text) == [
        "/site/cluster.yaml:1:1: name must be 2 to 41 lower-case letters, digits and '-', beginning with a letter or "
        "digit; this is 'LAB'",
        f"  /site/cluster.yaml:2:1: colour is no key; the keys here are {keys}",
        "  /site/cluster.yaml:3:1: master_port must be at least 1024, not 80",
        "  /site/cluster.yaml:4:23: container.ulimits.memlok is no limit; did you mean 'memlock'?",
        "  /site/cluster.yaml:4:41: container.env.HF_TOKEN looks like a secret, and is not kept here; put the name "
        "under container.secrets",
        "  /site/cluster.yaml:4:60: container.env.RANK is set by the launcher; leave it out",
        "  /site/cluster.yaml:7:5: nodes[0].hots is no key; did you mean 'host'?",
        "  /site/cluster.yaml:8:20: nodes[0].nvme[1] must be an absolute path, not 'mnt'",
        "  /site/cluster.yaml:8:25: nodes[0].nvme[2] must not be '/etc': it belongs to the system, and whoever writes "
        "there owns the machine",
        "  next: configs/cluster.yaml explains every key",
    ]


def test_a_long_list_of_mistakes_is_cut() -> None:
    text = "name: lab\n" + "".join(f"key{n}: 1\n" for n in range(30)) + "nodes: [{name: n1, host: h}]\n"
    told = refusal(text)
    assert len(told) == 23
    assert told[-2] == "  and 9 more"


HUGE: dict[str, tuple[dict[str, object], str]] = {
    "host of colons": ({"nodes": [{"name": "n1", "host": ":" * 900_000}]}, "at most 253 characters"),
    "many folders": ({"defaults": {"nvme": [f"/mnt/n{n}" for n in range(40_000)]}}, "must hold at most 64 items"),
    "many wrong keys": ({f"key{n}": 1 for n in range(40_000)}, "and 39979 more"),
    "many wrong nodes": ({"nodes": [1] * 90_000}, "nodes[0] must be a mapping"),
    "long key": ({"x" * 1000: 1}, "is no key"),
    "long path": ({"defaults": {"nvme": ["/" * 900_000]}}, "must be written plainly"),
    "long size": ({"container": {"shm_size": "9" * 900_000}}, "must be a size in m or g"),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_inventory_is_refused_soon(name: str) -> None:
    data, says = HUGE[name]
    begin = time.process_time()
    told = refusal(json.dumps({"name": "lab", "nodes": [{"name": "n1", "host": "h"}], **data}))
    assert any(says in line for line in told)
    assert time.process_time() - begin < 5  # on a slow machine; less than one is usual
    assert max(map(len, told)) < 500


def test_a_long_key_is_cut() -> None:
    assert len(refusal("x" * 900 + ": 1\nname: lab\nnodes: [{name: n1, host: h}]\n")[0]) < 300


def test_a_home_that_nobody_knows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(InputError, match="identity_file begins with '~', but no home folder is known; set HOME"):
        read_inventory(read(EXAMPLE, "cluster.yaml"))


@pytest.mark.parametrize("text", [EXAMPLE, MERGED, MERGED + "image: {use: debian, base: null}\n"])
def test_an_inventory_survives_being_written_and_read(text: str) -> None:
    inventory = reading(text)
    assert Inventory.model_validate_json(inventory.model_dump_json()) == inventory


def test_an_inventory_does_not_change() -> None:
    inventory = reading(EXAMPLE)
    with pytest.raises(ValueError, match="frozen"):
        inventory.name = "other"


def definitions() -> dict[str, dict[str, object]]:
    whole = schema()
    found: dict[str, dict[str, object]] = {"Inventory": whole, **whole["$defs"]}
    return found


def test_the_schema_describes_every_field_with_an_example() -> None:
    found = definitions()
    assert set(found) == {model.__name__ for model in MODELS}
    for model in MODELS:
        properties = found[model.__name__]["properties"]
        assert isinstance(properties, dict)
        assert list(properties) == list(model.model_fields)
        assert [
            name for name, field in properties.items() if not (field.get("description") and field.get("examples"))
        ] == []


def test_the_schema_is_strict_and_names_its_draft() -> None:
    found = definitions()
    assert found["Inventory"]["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert [name for name, one in found.items() if one["additionalProperties"] is not False] == []
    assert {name: one["required"] for name, one in found.items() if "required" in one} == {
        "Inventory": ["name", "nodes"],
        "Mount": ["source", "target"],
        "Node": ["name", "host"],
    }
    assert json.loads(json.dumps(schema())) == schema()


def test_the_examples_of_the_schema_are_good_inventories() -> None:
    fields = {name: field["examples"][0] for name, field in schema()["properties"].items()}
    assert reading(json.dumps(fields)).name == "lab"
    places = {"ImageRecipe": "image", "Container": "container", "NodeDefaults": "defaults"}
    for model, place in places.items():
        properties = definitions()[model]["properties"]
        assert isinstance(properties, dict)
        for name, field in properties.items():
            reading(json.dumps({**fields, place: {name: field["examples"][0]}}))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(max_size=60))
def test_whatever_a_host_is_it_is_taken_or_refused(host: str) -> None:
    try:
        inventory = reading(json.dumps({"name": "lab", "nodes": [{"name": "n1", "host": host}]}))
    except InputError:
        return
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*|[0-9a-f:.]+", inventory.nodes[0].host)


def test_s13_no_key_of_an_inventory_holds_a_password() -> None:
    def keys(part: object) -> Iterator[str]:
        if isinstance(part, dict):
            yield from part.get("properties", {})
            for below in part.values():
                yield from keys(below)
        elif isinstance(part, list):
            for below in part:
                yield from keys(below)

    names = set(keys(schema()))
    assert {"host", "identity_file", "secrets"} <= names
    assert [name for name in names if re.search(r"pass|token|secret|credential", name)] == ["secrets"]
