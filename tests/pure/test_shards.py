"""Shards: what a checkpoint needs, and that nothing that is wrong with one goes unseen."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from cluster.errors import IntegrityError
from launcher import shards
from launcher.inside import manifest as inside
from launcher.shards import Candidate, Choice, Flaw, Listing, Part, Piece, Wanted
from tests.pure import kept

UNIT = f"{kept.RUN}/step-00000004"
OLDER = f"{kept.RUN}/step-00000002"
Z3 = "pytorch_model/zero_pp_rank_{}_mp_rank_00_{}_states.pt"


@pytest.fixture(params=[3, 2, None], ids=lambda stage: f"zero-{stage}" if stage else "plain")
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> kept.Cluster:
    return kept.trained(tmp_path, stage=request.param)


@pytest.fixture
def zero3(tmp_path: Path) -> kept.Cluster:
    return kept.trained(tmp_path, stage=3)


def path_of(cluster: kept.Cluster, node: str, path: str, unit: str = UNIT) -> Path:
    return cluster.of(node) / unit / path


# What it must contain


def test_every_stage_has_its_files() -> None:
    def needs(*paths: str, world: int | None = None) -> tuple[str, ...]:
        return shards.required(shards.read_layout(paths, world_size=world), paths)

    optim, model = "zero_pp_rank_{}_mp_rank_00_optim_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
    assert needs("a/" + model.format(1), world=2) == tuple(
        f"a/{name.format(rank)}" for rank in (0, 1) for name in (model, optim)
    )
    assert needs(optim.format(1)) == ("mp_rank_00_model_states.pt", optim.format(0), optim.format(1))
    assert needs("bf16_" + optim.format(0)) == ("bf16_" + optim.format(0), "mp_rank_00_model_states.pt")
    assert needs("mp_rank_00_model_states.pt", world=8) == ("mp_rank_00_model_states.pt",)
    assert needs("random_states_1.pkl", "model.safetensors") == ("random_states_0.pkl", "random_states_1.pkl")
    assert needs("loss.jsonl") == ()
    assert needs("t/zero/weight/fp32.pt", "t/mp_rank_00_model_states.pt") == ()


def test_model_parallel_degrees_share_the_world() -> None:
    names = [f"zero_pp_rank_{rank}_mp_rank_{model:02d}_optim_states.pt" for rank in (0, 1) for model in (0, 1)]
    layout = shards.read_layout(names, world_size=4)
    assert (layout.stage, layout.model_parallel) == (1, 2)
    assert set(names) | {"mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"} == set(
        shards.required(layout, names)
    )


def test_what_the_files_tell_of_the_data_parallel_degree_wins() -> None:
    """Two stages of a pipeline: four processes, of which two hold shards of the same names' kind each."""
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    layout = shards.read_layout(names, world_size=4, data_parallel=2)
    assert shards.required(layout, names) == ("mp_rank_00_model_states.pt", *names)
    assert shards.read_layout(names, data_parallel=3).world_size == 3


def test_a_file_has_a_rank_by_its_name() -> None:
    assert shards.rank_of("x/offloaded_tensors/rank07/a.swp") == 7
    assert shards.rank_of("bf16_zero_pp_rank_12_mp_rank_00_optim_states.pt") == 12
    assert shards.rank_of("zero_to_fp32.py") is None
    assert shards.is_shard("mp_rank_00_model_states.pt")
    assert not shards.is_shard("optimizer.bin")


def test_the_node_and_the_judge_read_names_alike() -> None:
    names = [
        "zero_pp_rank_1_mp_rank_00_model_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "mp_rank_00_model_states.pt",
        "model.safetensors",
        "latest",
    ]
    assert [bool(inside.SHARD.fullmatch(name)) for name in names] == [shards.is_shard(name) for name in names]
    assert inside.PIECE == shards.PIECE


# What is whole is found whole


def test_a_sealed_checkpoint_has_no_flaw(cluster: kept.Cluster) -> None:
    for unit in (UNIT, OLDER):
        assert cluster.judge(unit) == ()
        assert cluster.judge(unit, read=False) == ()


def test_a_whole_copy_has_no_flaw(cluster: kept.Cluster, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for node in cluster.names:
        shutil.copytree(cluster.of(node) / UNIT, copy / "gathered" / UNIT, dirs_exist_ok=True)
    (one,) = kept.look(copy, "gpu-09", f"gathered/{UNIT}")
    assert shards.judge_copy(one) == ()
    assert one.modified > 0


def test_a_universal_checkpoint_is_what_it_was_when_it_was_made(tmp_path: Path) -> None:
    unit = f"gathered/{UNIT}-universal"
    for name in ("zero/weight/fp32.pt", "zero/bias/fp32.pt", "mp_rank_00_model_states.pt"):
        file = tmp_path / unit / "pytorch_model" / name
        kept.torch_file(file, {"global_steps": 4, "dp_world_size": 4}, size=99, dice=random.Random(name))  # noqa: S311
    (one,) = kept.look(tmp_path, "gpu-01", unit, whole=True)
    assert shards.is_universal(one)
    made = shards.late_manifest(one, world_size=4, made=1.0, run=kept.RUN, ranks=range(4))
    (tmp_path / unit / shards.manifest_name("gpu-01")).write_text(shards.write_manifest(made))
    (again,) = kept.look(tmp_path, "gpu-01", unit)
    assert shards.judge_copy(again) == ()
    (tmp_path / unit / "pytorch_model/zero/bias/fp32.pt").unlink()
    (again,) = kept.look(tmp_path, "gpu-01", unit)
    assert [(flaw.kind, flaw.path) for flaw in shards.judge_copy(again)] == [
        ("missing", "pytorch_model/zero/bias/fp32.pt")
    ]


def test_nodes_that_share_a_folder_are_not_foreign_to_each_other(tmp_path: Path) -> None:
    cluster = kept.trained(tmp_path)
    first, second = cluster.names
    shutil.copytree(cluster.of(second), cluster.of(first), dirs_exist_ok=True)
    shutil.rmtree(cluster.of(second))
    cluster.of(second).symlink_to(cluster.of(first))
    assert cluster.judge(UNIT) == ()
    assert cluster.judge(UNIT, read=False) == ()


def test_deepspeeds_own_folders_are_units_by_tag(tmp_path: Path) -> None:
    cluster = kept.Cluster(tmp_path, ("gpu-01", "gpu-02"), 1, 3)
    for step in (10, 20):
        cluster.save(f"{kept.RUN}/global_step{step}", step=step, style="deepspeed")
    cluster.seal()
    (first, second) = cluster.listings(f"{kept.RUN}/global_step10")
    assert (first.style, first.tag, first.latest) == ("deepspeed", "global_step10", "global_step20")
    assert (second.latest, shards.step_of(second)) == (None, 10)
    assert cluster.judge(f"{kept.RUN}/global_step10") == ()


# F50


@pytest.fixture
def scene(tmp_path: Path) -> kept.Scene:
    cluster = kept.trained(tmp_path / "nodes", stage=3)
    kept.trained(tmp_path / "nodes", stage=3, run=kept.OTHER_RUN)
    return kept.Scene(cluster, UNIT, stranger=f"{kept.OTHER_RUN}/step-00000004")


@pytest.mark.parametrize("block", range(10))
def test_f50_a_thousand_mutations_are_all_caught_and_named(scene: kept.Scene, block: int, tmp_path: Path) -> None:
    shutil.copytree(scene.cluster.root, tmp_path / "pristine")
    assert kept.unseen(scene, tmp_path / "pristine", range(block * 100, block * 100 + 100)) == []


def test_what_another_step_left_is_known_even_when_its_hash_is_not(zero3: kept.Cluster) -> None:
    node = zero3.names[1]
    shutil.copy(path_of(zero3, node, Z3.format(2, "model"), OLDER), path_of(zero3, node, Z3.format(2, "model")))
    flaws = zero3.judge(UNIT, read=False)
    assert [str(flaw) for flaw in flaws] == [
        f"mixed: node {node}: {Z3.format(2, 'model')}: it is of step 2; the others are of step 4"
    ]


def test_a_shard_of_a_larger_run_is_foreign(zero3: kept.Cluster) -> None:
    node = zero3.names[0]
    kept.write_unit(zero3.root / "other", ranks=[0], world=8, stage=3, step=4, seed="x")
    shutil.copy(zero3.root / "other" / Z3.format(0, "model"), path_of(zero3, node, Z3.format(0, "model")))
    flaws = zero3.judge(UNIT)
    assert (
        Flaw(
            kind="foreign",
            place=node,
            path=Z3.format(0, "model"),
            what="it is of a run with 8 data-parallel processes; this one had 4",
        )
        in flaws
    )


def test_a_change_is_told_with_its_place(zero3: kept.Cluster) -> None:
    file = path_of(zero3, "gpu-02", Z3.format(3, "optim"))
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    (flaw,) = zero3.judge(UNIT)
    assert str(flaw) == (
        f"changed: node gpu-02: {Z3.format(3, 'optim')}: its content changed, first in the bytes 0 to {len(content):,}"
    )


def test_a_checkpoint_that_nobody_sealed_is_judged_by_its_form(tmp_path: Path) -> None:
    cluster = kept.Cluster(tmp_path, ("gpu-01", "gpu-02"), 2, 3)
    cluster.save(UNIT, step=4)
    assert {(flaw.kind, flaw.place) for flaw in cluster.judge(UNIT)} == {
        ("unsealed", "gpu-01"),
        ("unsealed", "gpu-02"),
    }
    os.truncate(path_of(cluster, "gpu-02", Z3.format(2, "optim")), 100)
    path_of(cluster, "gpu-01", Z3.format(0, "model")).unlink()
    told = {(flaw.kind, flaw.place, flaw.path) for flaw in cluster.judge(UNIT)} - {
        ("unsealed", "gpu-01", UNIT),
        ("unsealed", "gpu-02", UNIT),
    }
    assert told == {
        ("torn", "gpu-02", Z3.format(2, "optim")),
        ("missing", "", Z3.format(0, "model")),
    }


def test_a_node_that_wrote_nothing_is_missed_by_its_ranks(zero3: kept.Cluster) -> None:
    shutil.rmtree(zero3.of("gpu-02") / UNIT)
    flaws = zero3.judge(UNIT)
    assert flaws[0] == Flaw(
        kind="missing", place="", path=".launcher-manifest.*.json", what="nobody speaks for the ranks 2, 3"
    )
    assert {flaw.path for flaw in flaws[1:]} == {
        *(Z3.format(rank, what) for rank in (2, 3) for what in ("model", "optim")),
        "random_states_2.pkl",
        "random_states_3.pkl",
    }


def test_without_deepspeed_the_random_states_tell_who_is_missing(tmp_path: Path) -> None:
    cluster = kept.trained(tmp_path, stage=None)
    for one in (cluster.of("gpu-01") / UNIT).iterdir():
        one.unlink()
    told = [str(flaw) for flaw in cluster.judge(UNIT)]
    assert "missing: random_states_0.pkl: a checkpoint without DeepSpeed with 4 processes has it" in told


def test_stage_1_names_itself(tmp_path: Path) -> None:
    cluster = kept.Cluster(tmp_path, ("gpu-01",), 2, 2)
    cluster.save(UNIT, step=4)
    path_of(cluster, "gpu-01", "pytorch_model/mp_rank_00_model_states.pt").unlink()
    missing = [flaw.what for flaw in cluster.judge(UNIT) if flaw.kind == "missing"]
    assert missing == ["a checkpoint of ZeRO stage 1 or 2 with 2 processes has it"]


# What nodes say is not believed unseen


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a//b",
        "a/.",
        "a\nb",
        "a\\b",
        "a\x1b[0m",
        "x" * 300,
        "y/" * 600,
        7,
        "\udcff",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(path: object) -> None:
    with pytest.raises(IntegrityError):
        shards.check_path(path)


def unit_said(**changes: object) -> str:
    said: dict[str, object] = {
        "unit": UNIT,
        "style": "accelerate",
        "tag": "pytorch_model",
        "latest": None,
        "parts": [],
        "odd": [],
        "manifests": {},
    }
    return json.dumps({"units": [{**said, **changes}]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"units": 3}',
        '{"units": [{}]}',
        "[" * 100_000,
        unit_said(parts=[{"path": "a"}]),
        unit_said(parts=[{"path": "a", "bytes": -1}]),
        unit_said(parts=[{"path": "a", "bytes": "1"}]),
        unit_said(parts=[{"path": "a", "bytes": 1, "pieces": ["x"]}]),
        unit_said(parts=[{"path": "a", "bytes": 1, "sha256": 5}]),
        unit_said(manifests=[]),
    ],
)
def test_nonsense_from_a_node_is_an_error_with_its_name(text: str) -> None:
    with pytest.raises(IntegrityError, match="cannot be read") as caught:
        shards.read_listings("gpu-01", text)
    assert caught.value.where == "node gpu-01"


def test_a_unit_that_leads_elsewhere_is_refused() -> None:
    with pytest.raises(IntegrityError):
        shards.read_listings("gpu-01", unit_said(unit="../x"))
    (root,) = shards.read_listings("gpu-01", unit_said(unit="."))
    assert root.unit == "."


def test_f52_odd_entries_and_hostile_names_are_flaws() -> None:
    parts = [{"path": "../../etc/x", "bytes": 1}, {"path": "fine", "bytes": 1}]
    (one,) = shards.read_listings("gpu-01", unit_said(parts=parts, odd=[["y", "a link"]], latest="pytorch_model"))
    told = [str(flaw) for flaw in shards.judge((), (one,)) if flaw.kind == "refused"]
    assert told == [
        "refused: node gpu-01: y: a link; only plain files are taken",
        "refused: node gpu-01: ../../etc/x: the path '../../etc/x' leads out of its folder; only plain files are taken",
    ]


def test_a_manifest_is_only_what_was_sealed(zero3: kept.Cluster) -> None:
    file = path_of(zero3, "gpu-01", shards.manifest_name("gpu-01"))
    text = file.read_text()
    said = shards.read_manifest(text)
    assert said is not None
    assert (said.node, said.ranks, said.world_size, said.unit) == ("gpu-01", (0, 1), 4, UNIT)
    again = shards.read_manifest(shards.write_manifest(said))
    assert again == said
    assert shards.read_manifest(text[:-5]) is None
    assert shards.read_manifest("[]") is None

    def sealed(**changes: object) -> str:
        content = {**json.loads(text), **changes}
        content.pop("seal")
        return json.dumps({**content, "seal": shards.seal_of(content)})

    assert shards.read_manifest(sealed(piece=0)) is None
    assert shards.read_manifest(sealed(piece=100)) is None
    assert shards.read_manifest(sealed(parts=[{"path": "/x", "bytes": 0, "pieces": []}])) is None


def test_a_manifest_under_another_nodes_name_is_spoilt(zero3: kept.Cluster) -> None:
    folder = zero3.of("gpu-01") / UNIT
    (folder / shards.manifest_name("gpu-01")).rename(folder / shards.manifest_name("gpu-07"))
    told = {(flaw.kind, flaw.place, flaw.path) for flaw in zero3.judge(UNIT)}
    assert ("torn", "gpu-01", shards.manifest_name("gpu-07")) in told


def test_what_a_place_states_late_is_what_it_holds(tmp_path: Path) -> None:
    cluster = kept.Cluster(tmp_path, ("gpu-01", "gpu-02"), 2, 3)
    cluster.save(UNIT, step=4)
    for node in cluster.names:
        (one,) = kept.look(cluster.of(node), node, UNIT, whole=True)
        made = shards.late_manifest(one, world_size=4, made=5.0)
        (cluster.of(node) / UNIT / shards.manifest_name(node)).write_text(shards.write_manifest(made))
        assert (made.ranks, made.run) == (tuple(cluster.ranks(node)), kept.RUN)
    assert cluster.judge(UNIT) == ()
    empty = dataclasses.replace(one, parts=(), style="deepspeed")
    assert shards.late_manifest(empty, world_size=1, made=5.0, run="r", ranks=()).ranks == (0,)


# F54


@pytest.mark.parametrize(
    ("latest", "what"),
    [
        (None, "it is missing"),
        ("", "it is empty"),
        ("\n", "it is empty"),
        ("pytorch_mo", "it is torn: 'pytorch_mo'"),
        ("\x00\x00", "it is torn: '\\x00\\x00'"),
        ("global_step7", "it points to 'global_step7', which is not there"),
        ("pytorch_model", ""),
        ("pytorch_model\n", ""),
    ],
)
def test_f54_what_is_wrong_with_latest_is_told(zero3: kept.Cluster, latest: str | None, what: str) -> None:
    file = path_of(zero3, "gpu-01", "latest")
    file.unlink()
    if latest is not None:
        file.write_text(latest)
    flaws = zero3.judge(UNIT)
    assert [flaw.what for flaw in flaws] == ([what] if what else [])
    assert not any(map(shards.is_fatal, flaws))


BAD = (Flaw(kind="torn", place="gpu-01", path="x", what="it is empty"),)


def candidate(step: int, *, flaws: tuple[Flaw, ...] = (), style: str = "deepspeed") -> Candidate:
    name = f"global_step{step}"
    return Candidate(unit=f"r/{name}", tag=name, style=style, step=step, modified=float(step), flaws=flaws)


def test_f54_latest_names_the_tag_that_is_meant() -> None:
    both = (candidate(10), candidate(20))
    assert shards.choose_unit(both, latest={"r": "global_step10"}) == Choice(unit="r/global_step10")


@pytest.mark.parametrize("latest", [None, "", "global_st", "global_step30", "\x00"])
def test_f54_without_latest_the_newest_verified_tag_is_taken_and_said(latest: str | None) -> None:
    found = (candidate(10), candidate(20), candidate(25, flaws=BAD))
    choice = shards.choose_unit(found, latest={"r": latest})
    assert choice is not None
    assert (choice.unit, len(choice.why)) == ("r/global_step20", 1)
    assert choice.why[0].startswith("r/latest: it ")


def test_f54_a_latest_that_does_not_verify_is_passed_over() -> None:
    found = (candidate(10), candidate(20, flaws=(*BAD, *BAD)))
    choice = shards.choose_unit(found, latest={"r": "global_step20"})
    assert choice == Choice(
        unit="r/global_step10",
        why=(
            "r/latest: global_step20 does not verify",
            "r/global_step20 does not verify: torn: node gpu-01: x: it is empty (and 1 more)",
        ),
    )


def test_f54_of_folders_the_newest_that_verifies_is_taken() -> None:
    found = (candidate(10, style="accelerate"), candidate(20, style="accelerate", flaws=BAD))
    assert shards.choose_unit(found, latest={}) == Choice(
        unit="r/global_step10", why=("r/global_step20 does not verify: torn: node gpu-01: x: it is empty",)
    )
    assert shards.choose_unit(found[1:], latest={}) is None


def test_a_user_may_name_a_unit_in_several_ways() -> None:
    assert shards.is_meant(f"gathered/{UNIT}", "pytorch_model", UNIT)
    for asked in (UNIT, "step-00000004", "4", "0004", "pytorch_model"):
        assert shards.is_meant(UNIT, "pytorch_model", asked)
    for asked in ("40", "step-4", "", "x"):
        assert not shards.is_meant(UNIT, "pytorch_model", asked)


def test_a_step_is_told_by_the_files_or_by_the_name(zero3: kept.Cluster) -> None:
    (first, _) = zero3.listings(UNIT)
    assert shards.step_of(first) == 4
    assert shards.step_of(dataclasses.replace(first, parts=(), unit="r/step-9x")) == 9
    assert shards.step_of(dataclasses.replace(first, parts=(), unit="r/last")) == -1


# What has to travel


def test_every_file_is_wanted_once_from_all_that_hold_it(zero3: kept.Cluster) -> None:
    found = zero3.listings(UNIT)
    wanted = shards.wanted_files(shards.manifests_of(found), found)
    by_path = {one.path: one.holders for one in wanted}
    assert by_path["complete"] == ("gpu-01", "gpu-02")
    assert by_path[Z3.format(3, "optim")] == ("gpu-02",)
    assert len(by_path) == 4 * 3 + 2
    assert sum(one.bytes for one in wanted) == sum(one.bytes for one in found)


def test_of_two_different_files_of_one_name_the_first_nodes_is_taken(zero3: kept.Cluster) -> None:
    for node in zero3.names:
        path_of(zero3, node, "complete").write_text(node)
    zero3.seal()
    found = zero3.listings(UNIT)
    (one,) = (file for file in shards.wanted_files(shards.manifests_of(found), found) if file.path == "complete")
    assert (one.holders, one.bytes) == (("gpu-01",), 6)


def test_only_what_is_lacking_travels_and_holders_share_it() -> None:
    hashes = tuple(f"{n:064d}" for n in range(3))
    big = Wanted(path="big", bytes=25, pieces=hashes, holders=("a", "b"))
    small = Wanted(path="small", bytes=4, pieces=hashes[:1], holders=("a", "b"))
    empty = Wanted(path="empty", bytes=0, pieces=(), holders=("a",))
    missing = shards.lacking((big, small, empty), {"big": ("x", hashes[1])}, piece=10)
    first = Piece(path="big", offset=0, length=10, sha256=hashes[0])
    last = Piece(path="big", offset=20, length=5, sha256=hashes[2])
    assert missing == (
        (big, (first, last)),
        (small, (Piece(path="small", offset=0, length=4, sha256=hashes[0]),)),
    )
    shares = shards.assign(missing)
    assert {holder: sum(piece.length for piece in pieces) for holder, pieces in shares.items()} == {"a": 15, "b": 4}
    assert list(shards.assign(missing, near="b")) == ["b"]
    assert shards.lacking((big,), {"big": hashes}, piece=10) == ()


def test_a_part_of_no_known_step_does_not_count() -> None:
    listing = Listing(
        place="gpu-01",
        unit="r/t",
        style="deepspeed",
        tag="t",
        latest=None,
        parts=(Part(path="mp_rank_00_model_states.pt", bytes=1, world=2),),
    )
    assert [flaw.kind for flaw in shards.judge((), (listing,))] == ["unsealed"]
