"""The commands about images, called as a user calls them: on two nodes and a machine with engines of their own."""

from __future__ import annotations

import json
import tarfile

from cluster.inventory import load_inventory
from launcher.image import FINGERPRINT, PARTS
from launcher.stages.build import read_recipe
from tests.loopback.desk import Desk


def ours(parts: dict[str, str] | None = None, *, flavour: str = "cpu") -> dict[str, str]:
    """Labels of an image that we have built."""
    told = {} if parts is None else {PARTS: json.dumps(parts)}
    return {FINGERPRINT: "0" * 64, "launcher.flavour": flavour, **told}


class TestShip:
    def test_any_image_goes_to_every_node_and_a_second_time_nothing_does(self, desk: Desk) -> None:
        digest = desk.image(desk.here, tag="site/eval:3")
        said = desk.json("image", "ship", "site/eval:3")
        assert (said["image"], said["digest"], sorted(said["sent"])) == ("site/eval:3", digest, ["gpu-1", "gpu-2"])
        for node in desk.nodes:
            assert node.machine.engine.image_id("site/eval:3") == digest
        assert desk("image", "ship", "site/eval:3") == "site/eval:3: every node has it\n"

    def test_what_one_node_has_goes_to_the_other(self, desk: Desk) -> None:
        digest = desk.image(desk.nodes[1].dockerd, tag="site/eval:4")
        assert list(desk.json("image", "ship", "site/eval:4")["sent"]) == ["gpu-1"]
        assert desk.nodes[0].machine.engine.image_id("site/eval:4") == digest
        assert desk.here.images() == []

    def test_what_nobody_has_is_told_with_the_cure(self, desk: Desk) -> None:
        assert desk("image", "ship", "site/none:1", code=5).splitlines() == [
            "error: node this machine: the image site/none:1 is on neither this machine nor a node",
            "  next: docker pull site/none:1, or docker load it, on this machine",
        ]


class TestFiles:
    def test_an_image_travels_in_a_file(self, desk: Desk) -> None:
        digest = desk.image(desk.here, tag="site/eval:5", code="the code")
        said = desk.json("image", "save", "image.tar", "site/eval:5")
        assert (said["digest"], said["bytes"]) == (digest, (desk.folder / "image.tar").stat().st_size)
        desk.here.clear()
        assert desk("image", "load", "image.tar") == "site/eval:5 is here\n"
        assert desk.here.images() == [digest]

    def test_an_engine_takes_the_file_without_us(self, desk: Desk) -> None:
        digest = desk.image(desk.here, tag="site/eval:6")
        desk("image", "save", "image.tar", "site/eval:6")
        desk.here.clear()
        desk.here.say("load", "-q", "-i", str(desk.folder / "image.tar"))
        assert desk.here.images() == [digest]
        assert desk.here.say("image", "inspect", "site/eval:6").returncode == 0

    def test_a_damaged_file_is_not_loaded(self, desk: Desk) -> None:
        desk.image(desk.here, tag="site/eval:7")
        desk("image", "save", "image.tar", "site/eval:7")
        desk.here.clear()
        path = desk.folder / "image.tar"
        with tarfile.open(path) as archive:
            at = next(one.offset_data for one in archive if one.name.endswith("layer.tar"))
        content = bytearray(path.read_bytes())
        content[at + 30] ^= 1
        path.write_bytes(content)
        said = desk("image", "load", "image.tar", code=8)
        assert said.startswith("error: image.tar: ")
        assert desk.here.images() == []
        path.write_bytes(content[: len(content) // 2])
        desk("image", "load", "image.tar", code=8)
        assert desk.here.images() == []

    def test_what_cannot_be_written_or_read_is_one_message_and_leaves_nothing(self, desk: Desk) -> None:
        desk.image(desk.here, tag="site/eval:8")
        said = desk("image", "save", "nowhere/image.tar", "site/eval:8", code=1)
        assert said.startswith("error: nowhere/image.tar: the file cannot be written")
        assert "cannot be read" in desk("image", "load", "missing.tar", code=2)
        desk("image", "save", "other.tar", "site/none:1", code=5)
        assert sorted(path.name for path in desk.folder.iterdir()) == ["cluster.yaml", "maker", "state"]


class TestListing:
    def test_every_machine_is_told_of_and_what_it_lacks(self, desk: Desk) -> None:
        digest = desk.image(desk.here, desk.nodes[0].dockerd, tag=desk.tag, **ours())
        old = desk.image(desk.nodes[1].dockerd, tag="launcher/cpu:old", code="older", **ours())
        desk.image(desk.nodes[1].dockerd, tag="site/eval:9", code="theirs")
        said = desk.json("image", "ls")
        assert said["image"] == desk.tag
        assert {(one["machine"], one["digest"], one["state"]) for one in said["images"]} == {
            ("this machine", digest, "current"),
            ("gpu-1", digest, "current"),
            ("gpu-2", old, "may go"),
        }
        assert said["lacks"] == {"gpu-2": "lacks 1 of 2 layers"}
        lines = desk("image", "ls").splitlines()
        assert lines[0].split() == ["machine", "image", "digest", "size", "state"]
        assert len(lines) == 5

    def test_a_node_that_is_silent_is_told_beside_the_others(self, desk: Desk) -> None:
        desk.nodes[1].sshd.stop()
        said = desk.json("image", "ls")
        assert list(said["silent"]) == ["gpu-2"]
        assert said["lacks"] == {"this machine": "lacks it; nobody has it", "gpu-1": "lacks it; nobody has it"}


class TestPruning:
    def test_only_what_is_ours_and_needed_by_nobody_goes(self, desk: Desk) -> None:
        node, other = (one.dockerd for one in desk.nodes)
        current = desk.image(node, other, desk.here, tag=desk.tag, **ours())
        gone = [
            desk.image(node, tag="launcher/cpu:old", code="old", **ours()),
            desk.image(node, tag=None, code="without a name", **ours()),
        ]
        used = desk.image(node, tag="launcher/cpu:used", code="used", **ours())
        node.say("create", "--name", "keeps", used, "sh")
        theirs = desk.image(node, tag="site/mine:1", code="named by somebody", **ours())
        foreign = desk.image(node, tag="launcher/fake:1", code="not built by us")
        try:
            told = desk("image", "prune", "--dry-run").splitlines()
            assert len(told) == 2
            assert all(line.startswith("gpu-1: would remove launcher/") for line in told)
            assert {*gone} < {*node.images()}
            said = desk.json("image", "prune")
            assert sorted(one["digest"] for one in said["gone"]) == sorted(gone)
            assert {*node.images()} == {current, used, theirs, foreign}
            assert desk("image", "prune") == "nothing to remove\n"
        finally:
            node.say("rm", "-f", "keeps")
        assert desk.json("image", "prune")["gone"][0]["digest"] == used
        assert other.images() == desk.here.images() == [current]

    def test_what_a_broken_transfer_left_goes(self, desk: Desk) -> None:
        desk.image(desk.here, tag="site/eval:1")
        desk("image", "ship", "site/eval:1")  # so that the nodes are known here
        folder = desk.folder.parent / "launcher" / "lab" / "gpu-1" / "ship"
        folder.mkdir(parents=True)
        (folder / "abc.part").write_bytes(bytes(1000))
        desk("image", "prune")
        assert list(folder.iterdir()) == []


class TestWhy:
    def test_a_changed_recipe_is_explained_part_by_part(self, desk: Desk) -> None:
        inventory = load_inventory(desk.folder / "cluster.yaml")
        recipe = read_recipe(inventory.image, inventory.flavour)
        parts = json.loads(recipe.labels[PARTS])
        before = {**parts, "file Dockerfile": "another", "argument BASE": "debian:trixie-slim", "file gone.sh": "1"}
        desk.image(desk.nodes[0].dockerd, tag="launcher/cpu:before", **ours(before))
        desk.image(desk.nodes[0].dockerd, tag="launcher/cuda:x", code="x", **ours({}, flavour="cuda"))
        said = desk.json("image", "why")
        assert said == {
            "image": desk.tag,
            "present": False,
            "before": "launcher/cpu:before",
            "machine": "gpu-1",
            "changes": [
                "argument BASE: changed (debian:trixie-slim -> debian:bookworm-slim)",
                "file Dockerfile: changed",
                "file gone.sh: removed",
            ],
        }
        assert desk("image", "why").splitlines()[0] == f"{desk.tag} has to be built"

    def test_an_image_of_before_the_parts_were_kept_says_so(self, desk: Desk) -> None:
        desk.image(desk.here, tag="launcher/cpu:before", **ours())
        assert desk("image", "why", "launcher/cpu:before").splitlines()[2:] == [
            "  it was built before this was written down"
        ]

    def test_what_is_nowhere_cannot_be_compared_with(self, desk: Desk) -> None:
        assert desk("image", "why").splitlines()[1:] == ["  there is no other one"]
        assert "no image 'launcher/cpu:none' of ours is on any machine" in desk(
            "image", "why", "launcher/cpu:none", code=2
        )

    def test_a_ready_image_has_no_recipe(self, desk: Desk) -> None:
        path = desk.folder / "cluster.yaml"
        path.write_text(path.read_text() + "image: {use: 'site/eval:3'}\n")
        assert "it has no recipe of ours" in desk("image", "why", code=2)
