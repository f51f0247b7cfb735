"""The exporter: against DeepSpeed's own reading of real checkpoints, and against everything that can be wrong."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher.inside import export

INSIDE = Path(export.__file__).parent
JOB = Path(__file__).parent / "jobs" / "checkpoints.py"
TAG = "global_step2"

LIBRARIES = ("torch", "accelerate", "deepspeed", "safetensors", "transformers", "huggingface_hub", "numpy")
MISSING = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def real(test: Any) -> Any:
    """A test that needs DeepSpeed, or what it has written."""
    return pytest.mark.oracle(pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")(test))


# Checkpoints


def make(out: Path, *, ranks: int) -> Path:
    """Run the job on some ranks over gloo."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    same = {
        "LAUNCHER_BACKEND": "gloo",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    argv = [sys.executable, str(INSIDE / "bootstrap.py"), str(JOB), str(out)]
    logs = [out.parent / f"{out.name}.{rank}.log" for rank in range(ranks)]
    running = []
    for rank, log in enumerate(logs):
        with log.open("wb") as stream:
            env = os.environ | same | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(subprocess.Popen(argv, env=env, stdout=stream, stderr=stream))
    codes = [process.wait() for process in running]
    assert codes == [0] * ranks, "\n".join(log.read_text()[-3000:] for log in logs)
    return out


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The folder of a case; the job of a world size runs when its first case is asked for."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def case(name: str, ranks: int = 2) -> Path:
        out = folder / f"world-{ranks}"
        if not out.exists():
            out.mkdir()
            make(out, ranks=ranks)
        return out / name

    return case


Made = Callable[..., Path]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The exporter as a process of its own, with nothing of ours to import."""
    argv = [sys.executable, "-I", str(INSIDE / "export.py"), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, **options)


def exported(*arguments: object, **options: Any) -> str:
    """A run that must succeed; what it said."""
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def refused(*arguments: object, code: int = 8, **options: Any) -> str:
    """A run that must be refused in one message, leaving nothing; that message."""
    done = run(*arguments, **options)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("export: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def same_bits(ours: Any, theirs: Any) -> bool:
    """Type, shape and every bit; NaN equals itself here."""
    import torch

    theirs = theirs.detach().contiguous()
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return bool(torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)))


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert sorted(ours) == sorted(theirs)
    assert [name for name in theirs if not same_bits(ours[name], theirs[name])] == []


def in_fp32(tensors: dict[str, Any]) -> dict[str, Any]:
    """As DeepSpeed's converter to files does it: numbers with a fraction are widened."""
    return {name: one.float() if one.is_floating_point() else one for name, one in tensors.items()}


def read_from(table: dict[str, int], name: bytes) -> int:
    return table[name.decode()]


def load(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(file))
    import torch

    return dict(torch.load(file, weights_only=True))


FROZEN = {"frozen.weight", "frozen.bias"}


class TestAgainstDeepSpeed:
    @real
    @pytest.mark.parametrize("precision", ["", "-bf16"])
    @pytest.mark.parametrize("stage", [1, 2, 3])
    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_every_stage_and_world_size(
        self, made: Made, tmp_path: Path, ranks: int, stage: int, precision: str
    ) -> None:
        import torch

        case = made(f"zero{stage}{precision}", ranks)
        exported(case / "checkpoint", tmp_path / "out")
        ours = load(tmp_path / "out" / "model.safetensors")
        theirs = in_fp32(torch.load(case / "theirs.pt"))
        masters = torch.load(case / "masters.pt")
        assert_same({name: ours[name] for name in masters}, masters)
        if stage == 1:
            # DeepSpeed leaves them out. They never change: those of stage 2 are the same.
            other = in_fp32(torch.load(made(f"zero2{precision}", ranks) / "theirs.pt"))
            assert set(ours) - set(theirs) == FROZEN
            theirs |= {name: other[name] for name in FROZEN}
        assert_same(ours, theirs)
        assert same_bits(ours["guess.weight"], ours["words.weight"])

    @real
    @pytest.mark.parametrize("name", ["accelerate", "zero2-cpu", "zero3-cpu", "zero3-small-groups", "gpt2"])
    def test_every_way_to_train(self, made: Made, tmp_path: Path, name: str) -> None:
        import torch

        exported(made(name) / "checkpoint", tmp_path / "out")
        assert_same(load(tmp_path / "out" / "model.safetensors"), in_fp32(torch.load(made(name) / "theirs.pt")))

    @real
    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_a_model_is_the_one_that_deepspeed_loads(self, made: Made, tmp_path: Path, stage: int) -> None:
        import torch

        case = made(f"zero{stage}")
        exported(case / "checkpoint", tmp_path / "out")
        theirs = torch.load(case / "loaded.pt")
        if stage == 1:  # the fresh model's own, there
            theirs = {name: one for name, one in theirs.items() if name not in FROZEN}
        ours = load(tmp_path / "out" / "model.safetensors")
        assert_same({name: ours[name] for name in theirs}, theirs)

    @real
    def test_the_masters_of_bf16_optimizer_where_deepspeed_has_none(self, made: Made, tmp_path: Path) -> None:
        import torch

        case = made("zero1-bf16-optimizer")
        assert "is not a zero checkpoint" in torch.load(case / "theirs.pt")["refused"]
        exported(case / "checkpoint", tmp_path / "out")
        ours = load(tmp_path / "out" / "model.safetensors")
        masters = torch.load(case / "masters.pt")
        assert masters
        assert_same({name: ours[name] for name in masters}, masters)

    @real
    def test_partitions_on_nvme_where_deepspeed_has_none(self, made: Made, tmp_path: Path) -> None:
        import torch

        case = made("zero3-nvme")
        assert "something is wrong" in torch.load(case / "theirs.pt")["refused"]
        exported(case / "checkpoint", tmp_path / "out")
        theirs = torch.load(made("zero3-small-groups") / "theirs.pt")
        assert_same(load(tmp_path / "out" / "model.safetensors"), in_fp32(theirs))

    @real
    @pytest.mark.parametrize("size", ["5GB", "0.5KB"])
    @pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_safetensors_are_its_files_byte_for_byte(
        self, made: Made, tmp_path: Path, stage: int, dtype: str, size: str
    ) -> None:
        case = made(f"zero{stage}-untied")
        frozen = ["--exclude-frozen"] if stage == 1 else []
        exported(case / "checkpoint", tmp_path / "out", "--dtype", dtype, "--max-shard-size", size, *frozen)
        theirs = case / f"files-safetensors-{dtype}-{size}"
        names = sorted(path.name for path in theirs.iterdir())
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
        assert (len(names) > 1) == (size == "0.5KB")
        for name in names:
            assert (tmp_path / "out" / name).read_bytes() == (theirs / name).read_bytes()

    @real
    @pytest.mark.parametrize("size", ["5GB", "0.5KB"])
    @pytest.mark.parametrize(
        ("name", "dtype"),
        [(f"zero{stage}{tied}", "fp32") for stage in (1, 2, 3) for tied in ("", "-untied")]
        + [("zero2-untied", "bf16"), ("zero3-untied", "bf16")],
    )
    def test_bin_files_hold_the_same(self, made: Made, tmp_path: Path, name: str, dtype: str, size: str) -> None:
        import torch

        frozen = ["--exclude-frozen"] if "zero1" in name else []
        out = tmp_path / "out"
        options = ["--format", "bin", "--dtype", dtype, "--max-shard-size", size, *frozen]
        exported(made(name) / "checkpoint", out, *options)
        theirs = made(name) / f"files-bin-{dtype}-{size}"
        names = sorted(path.name for path in theirs.iterdir())
        assert sorted(path.name for path in out.iterdir()) == names
        for one in names:
            if one.endswith(".json"):
                assert (out / one).read_bytes() == (theirs / one).read_bytes()
                continue
            assert_same(load(out / one), torch.load(theirs / one))
            assert list(load(out / one)) == list(torch.load(theirs / one))
            assert_same(torch.load(out / one, mmap=True), load(out / one))
            with zipfile.ZipFile(out / one) as archive:
                assert archive.testzip() is None
        if size == "5GB" and "untied" not in name:
            whole = load(out / "pytorch_model.bin")
            assert whole["guess.weight"].data_ptr() == whole["words.weight"].data_ptr()

    @real
    def test_numbers_lie_aligned_in_bin_files(self, made: Made, tmp_path: Path) -> None:
        exported(made("zero3") / "checkpoint", tmp_path / "out", "--format", "bin")
        with (tmp_path / "out" / "pytorch_model.bin").open("rb") as raw, zipfile.ZipFile(raw) as archive:
            places = [
                export.place(raw, entry, size=1 << 30)[0]
                for entry in archive.infolist()
                if entry.filename.startswith("archive/data/")
            ]
        assert len(places) > 5
        assert [place % 64 for place in places] == [0] * len(places)

    @real
    def test_transformers_loads_it(self, made: Made, tmp_path: Path) -> None:
        out = tmp_path / "model"
        out.mkdir()
        shutil.copy(made("gpt2") / "config.json", out)
        exported(made("gpt2") / "checkpoint", out, "--max-shard-size", "20KB")
        script = """
import sys, torch
from transformers import AutoModelForCausalLM
model, told = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
loaded = torch.load(sys.argv[2])
assert loaded.keys() == model.state_dict().keys()
assert all(torch.equal(loaded[name], one) for name, one in model.state_dict().items())
print("same")
"""
        argv = [sys.executable, "-c", script, str(out), str(made("gpt2") / "loaded.pt")]
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        assert done.stdout == "same\n", done.stderr
        assert (out / "model.safetensors.index.json").is_file()

    @real
    @pytest.mark.parametrize("stage", [2, 3])
    def test_without_the_frozen_parameters(self, made: Made, tmp_path: Path, stage: int) -> None:
        import torch

        case = made(f"zero{stage}")
        exported(case / "checkpoint", tmp_path / "out", "--exclude-frozen")
        theirs = in_fp32(torch.load(case / "theirs.pt"))
        assert_same(
            load(tmp_path / "out" / "model.safetensors"),
            {name: one for name, one in theirs.items() if name not in FROZEN},
        )

    @real
    @pytest.mark.parametrize(("name", "note"), [("zero0", ""), ("zero0-bf16", "as trained, in 16 bits")])
    def test_without_zero_the_weights_are_those_of_the_model(
        self, made: Made, tmp_path: Path, name: str, note: str
    ) -> None:
        import torch

        said = exported(made(name) / "checkpoint", tmp_path / "out")
        assert note in said
        states = torch.load(made(name) / "checkpoint" / TAG / "mp_rank_00_model_states.pt", weights_only=False)
        assert_same(load(tmp_path / "out" / "model.safetensors"), in_fp32(states["module"]))

    @real
    def test_splitting_is_that_of_huggingface_hub(self) -> None:
        from huggingface_hub.serialization._base import split_state_dict_into_shards_factory

        dice = random.Random(1)  # noqa: S311 - not for secrets
        for _ in range(300):
            sizes = {f"t{number}": dice.choice([0, 1, 5, 20, 99, 150]) for number in range(dice.randrange(1, 20))}
            same = {name: number - dice.choice([0, 0, 0, 1, 3]) for number, name in enumerate(sizes)}
            same = {name: one if sizes[name] else -9 for name, one in same.items()}
            first: dict[int, str] = {}
            sizes = {name: sizes[first.setdefault(same[name], name)] for name in sizes}
            theirs = split_state_dict_into_shards_factory(
                {name: name.encode() for name in sizes},
                get_storage_size=partial(read_from, sizes),
                get_storage_id=partial(read_from, same),
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=100,
            )
            files, total = export.split(sizes, same, limit=100)
            assert files == list(theirs.filename_to_tensors.values())
            assert total == theirs.metadata["total_size"]

    @real
    def test_rounding_is_that_of_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
        kinds = export.BY_NAME
        every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
        ties = (every.to(torch.int32) << 16) + torch.tensor([[0], [0x7FFF], [0x8000], [0x8001], [0xFFFF]])
        floats = ties.to(torch.int32).flatten().view(torch.float32)
        halves = torch.arange(-(2**20), 2**20, dtype=torch.float32) / 2**13  # around and at fp16's ties
        doubles = floats.double() * 1.0001
        for numbers in (floats, halves, doubles, every.view(torch.bfloat16), every.view(torch.float16)):
            source = numbers[~numbers.isnan()]
            name = next(kind for kind in kinds.values() if getattr(torch, kind.torch) == source.dtype)
            raw = memoryview(source.view(torch.uint8).numpy().tobytes())
            for target in ("F32", "F16", "BF16"):
                theirs = source.float().to(getattr(torch, kinds[target].torch))
                ours = torch.frombuffer(bytearray(export.rounded(raw, name, kinds[target])), dtype=theirs.dtype)
                assert same_bits(ours, theirs), (name, target)
        nothing = export.rounded(memoryview(struct.pack("f", float("nan"))), kinds["F32"], kinds["BF16"])
        assert torch.frombuffer(bytearray(nothing), dtype=torch.bfloat16).isnan().all()


class TestExtracts:
    @pytest.fixture(params=["zero1", "zero2", "zero3", "zero3-bf16"])
    def nodes(self, request: pytest.FixtureRequest, made: Made, tmp_path: Path) -> tuple[Path, list[Path]]:
        """A checkpoint of three ranks, and the same dealt over two nodes: ranks 0 and 1, and rank 2."""
        checkpoint = made(request.param, 3) / "checkpoint"
        nodes = [tmp_path / "a", tmp_path / "b"]
        for node in nodes:
            (node / TAG).mkdir(parents=True)
        for file in (checkpoint / TAG).iterdir():
            shutil.copy(file, nodes["pp_rank_2_" in file.name] / TAG)
        return checkpoint, nodes

    @real
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_they_give_what_the_whole_checkpoint_gives(
        self, nodes: tuple[Path, list[Path]], tmp_path: Path, dtype: str
    ) -> None:
        checkpoint, (first, second) = nodes
        exported("extract", first, "--tag", TAG, "--out", tmp_path / "first.part", "--dtype", dtype)
        with (tmp_path / "second.part").open("wb") as stream:
            argv = [sys.executable, str(INSIDE / "export.py"), "extract", str(second), "--tag", TAG, "--out", "-"]
            subprocess.run([*argv, "--dtype", dtype], stdout=stream, stderr=subprocess.DEVNULL, check=True)
        exported(checkpoint, tmp_path / "whole", "--dtype", dtype)
        parts = [tmp_path / "second.part", tmp_path / "first.part"]  # in any order
        exported("assemble", *parts, tmp_path / "assembled", "--dtype", dtype)
        whole, assembled = (tmp_path / name / "model.safetensors" for name in ("whole", "assembled"))
        assert assembled.read_bytes() == whole.read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "a", "assembled", "b", "first.part", "second.part", "whole",
        ]  # fmt: skip

    @real
    def test_what_was_rounded_is_not_sold_as_fp32(self, nodes: tuple[Path, list[Path]], tmp_path: Path) -> None:
        _checkpoint, folders = nodes
        parts = [tmp_path / "0.part", tmp_path / "1.part"]
        for folder, part in zip(folders, parts, strict=True):
            exported("extract", folder, "--tag", TAG, "--out", part, "--dtype", "fp16")
        told = refused("assemble", *parts, tmp_path / "out", code=2)
        assert "was rounded to fp16 when it was extracted" in told
        assert not (tmp_path / "out").exists()

    @real
    def test_what_is_missing_or_foreign_is_named(self, made: Made, tmp_path: Path) -> None:
        for name in ("zero2", "zero3"):
            exported("extract", made(name) / "checkpoint", "--out", tmp_path / f"{name}.part")
        other = tmp_path / "other"
        shutil.copytree(made("zero3-later") / "checkpoint", other)
        for file in (other / TAG).glob("*pp_rank_0*"):
            file.unlink()
        exported("extract", other, "--out", tmp_path / "later.part")
        one = tmp_path / "one"
        shutil.copytree(made("zero3") / "checkpoint", one)
        for file in (one / TAG).glob("*pp_rank_1*"):
            file.unlink()
        exported("extract", one, "--out", tmp_path / "one.part")
        out = tmp_path / "out"
        assert f"{tmp_path}/one.part: rank 1 of 2 is missing" in refused("assemble", tmp_path / "one.part", out)
        assert "zero3.part, rank 0: is also in" in refused(
            "assemble", tmp_path / "one.part", tmp_path / "zero3.part", out
        )
        assert "stage 3, where" in refused("assemble", tmp_path / "zero2.part", tmp_path / "zero3.part", out)
        assert "step 3 and step 2" in refused("assemble", tmp_path / "one.part", tmp_path / "later.part", out)
        assert "gone.part: is missing" in refused("assemble", tmp_path / "gone.part", out)
        raw = (tmp_path / "zero3.part").read_bytes()
        for torn in (raw[:-1], raw[:100], raw[:5], b"", raw + b"more", b"\xff" * 100):
            (tmp_path / "torn.part").write_bytes(torn)
            assert f"{tmp_path}/torn.part: is torn" in refused("assemble", tmp_path / "torn.part", out)
        assert not out.exists()

    @real
    def test_an_extract_to_a_full_device_says_so(self, made: Made) -> None:
        with Path("/dev/full").open("wb") as full:
            argv = [
                sys.executable,
                str(INSIDE / "export.py"),
                "extract",
                str(made("zero3") / "checkpoint"),
                "--out",
                "-",
            ]
            done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 4
        assert done.stderr == "export: standard output: No space left on device\n"


# What is wrong with a checkpoint.


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a case's checkpoint, to be spoiled: its tag's folder."""

    def copied(name: str, ranks: int = 2) -> Path:
        shutil.copytree(made(name, ranks) / "checkpoint", tmp_path / "checkpoint")
        return tmp_path / "checkpoint" / TAG

    return copied


Copy = Callable[..., Path]
OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODELS = "zero_pp_rank_{}_mp_rank_00_model_states.pt"


class TestSpoiledCheckpoints:
    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, tmp_path: Path) -> Iterator[None]:
        yield
        assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint", "other"}

    def told(self, folder: Path, **options: Any) -> str:
        """The refusal of a checkpoint, without where it lies."""
        said = refused(folder.parent, folder.parent.parent / "out", **options)
        assert str(folder) in said
        return said.replace(str(folder), "TAG").removeprefix("export: ").removesuffix("\n")

    def attempt(self, folder: Path) -> str | None:
        """Read it here; the refusal, if it is refused."""
        try:
            part = export.read_folder(folder, allowed=frozenset(), complete=True)
            export.tensors_of(part, exclude_frozen=False)
        except export.Refusal as refusal:
            return str(refusal)
        return None

    @real
    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_a_missing_shard(self, copy: Copy, name: str) -> None:
        folder = copy(name)
        (folder / OPTIM.format(1)).unlink()
        by = f"the world size is 2, by {OPTIM.format(0)}"
        assert self.told(folder) == f"TAG/{OPTIM.format(1)}: is missing; {by}"

    @real
    def test_a_partition_missing_on_nvme(self, copy: Copy) -> None:
        folder = copy("zero3-nvme")
        file = sorted((folder / "offloaded_tensors" / "rank01").iterdir())[0]
        name = f"TAG/offloaded_tensors/rank01/{file.name}"
        os.truncate(file, 4)
        assert self.told(folder) == f"{name}: is torn: a partition lies there, off the shard"
        file.unlink()
        assert self.told(folder) == f"{name}: is missing: a partition lies there, off the shard"

    @real
    @pytest.mark.parametrize(("name", "file"), [("zero2", "mp_rank_00_model_states.pt"), ("zero3", MODELS.format(1))])
    def test_a_missing_model_file(self, copy: Copy, name: str, file: str) -> None:
        folder = copy(name)
        (folder / file).unlink()
        assert self.told(folder) == f"TAG/{file}: is missing"

    @real
    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_all_shards_missing(self, copy: Copy, name: str) -> None:
        folder = copy(name)
        for file in folder.glob("*_optim_states.pt"):
            file.unlink()
        assert self.told(folder) == "TAG: its *_optim_states.pt are missing, all of them"

    @real
    def test_a_shard_of_a_larger_world(self, copy: Copy, made: Made) -> None:
        folder = copy("zero3")
        shutil.copy(made("zero3", 3) / "checkpoint" / TAG / OPTIM.format(2), folder)
        told = f"stage 3 and world size 3, where {OPTIM.format(0)} has stage 3 and world size 2"
        assert self.told(folder) == f"TAG/{OPTIM.format(2)}: is foreign: {told}"

    @real
    def test_a_rank_that_cannot_be(self, copy: Copy) -> None:
        folder = copy("zero2")
        shutil.copy(folder / OPTIM.format(1), folder / OPTIM.format(7))
        assert self.told(folder) == f"TAG/{OPTIM.format(7)}: is foreign: the world size is 2, by {OPTIM.format(0)}"

    @real
    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_a_shard_of_another_step(self, copy: Copy, made: Made, name: str) -> None:
        folder = copy(name)
        shutil.copy(made(f"{name}-later") / "checkpoint" / TAG / OPTIM.format(1), folder)
        assert self.told(folder) == f"TAG/{OPTIM.format(1)}: is of step 3.0, where TAG/{OPTIM.format(0)} is of step 2.0"

    @real
    def test_a_model_file_of_another_step(self, copy: Copy, made: Made) -> None:
        folder = copy("zero3")
        shutil.copy(made("zero3-later") / "checkpoint" / TAG / MODELS.format(1), folder)
        foreign = "is foreign: it does not fit the model file of the first rank: step 3 and step 2"
        assert self.told(folder) == f"TAG/{MODELS.format(1)}: {foreign}"

    @real
    def test_a_shard_of_another_stage(self, copy: Copy, made: Made) -> None:
        folder = copy("zero3")
        shutil.copy(made("zero2") / "checkpoint" / TAG / OPTIM.format(1), folder)
        told = f"stage 2 and world size 2, where {OPTIM.format(0)} has stage 3 and world size 2"
        assert self.told(folder) == f"TAG/{OPTIM.format(1)}: is foreign: {told}"

    @real
    def test_a_shard_of_another_precision(self, copy: Copy, made: Made) -> None:
        folder = copy("zero3")
        shutil.copy(made("zero3-bf16") / "checkpoint" / TAG / f"bf16_{OPTIM.format(1)}", folder)
        assert "two trainings, of different precision" in self.told(folder)

    @real
    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_shards_of_another_model(self, copy: Copy, made: Made, name: str) -> None:
        folder = copy(name)
        for rank in range(2):
            shutil.copy(made(f"{name}-untied") / "checkpoint" / TAG / OPTIM.format(rank), folder)
        said = {"zero2": "4 paddings for 3 parameters of group 0", "zero3": "its shares of the parameters are"}[name]
        assert said in self.told(folder)

    @real
    def test_one_shard_of_another_model(self, copy: Copy, made: Made) -> None:
        folder = copy("zero3")
        shutil.copy(made("zero3-untied") / "checkpoint" / TAG / OPTIM.format(1), folder)
        assert self.told(folder).startswith(f"TAG/{OPTIM.format(1)}: has ")

    @real
    @pytest.mark.parametrize(
        ("file", "words"),
        [
            ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor parallelism"),
            ("layer_0_expert_0_mp_rank_00_model_states.pt", "experts"),
            ("expp_rank_0_mp_rank_00_optim_states.pt", "experts"),
        ],
    )
    def test_parallelism_of_another_kind(self, copy: Copy, file: str, words: str) -> None:
        folder = copy("zero2")
        shutil.copy(folder / OPTIM.format(0), folder / file)
        told = self.told(folder, code=2)
        assert told.startswith(f"TAG/{file}: ")
        assert words in told
        assert "ds_to_universal" in told

    @real
    def test_a_name_that_nobody_gave(self, copy: Copy) -> None:
        folder = copy("zero2")
        shutil.copy(folder / OPTIM.format(0), folder / "copy_of_optim_states.pt")
        assert self.told(folder) == "TAG/copy_of_optim_states.pt: is foreign: DeepSpeed names no shard like this"

    @real
    @pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 0.99])
    @pytest.mark.parametrize("file", [OPTIM.format(1), MODELS.format(0)])
    def test_a_torn_file(self, copy: Copy, file: str, part: float) -> None:
        folder = copy("zero3")
        os.truncate(folder / file, int(part * (folder / file).stat().st_size))
        assert self.told(folder).startswith(f"TAG/{file}: is torn or no file of torch.save: ")

    @real
    def test_flipped_bits_never_end_in_anything_but_a_refusal(self, copy: Copy) -> None:
        folder = copy("zero3")
        dice = random.Random(1)  # noqa: S311 - not for secrets
        ended = set()
        for file in (folder / OPTIM.format(1), folder / MODELS.format(0)):
            raw = file.read_bytes()
            for _ in range(400):
                spoiled = bytearray(raw)
                spoiled[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
                file.write_bytes(spoiled)
                told = self.attempt(folder)
                assert told is None or str(folder) in told
                ended.add(told is None)
            file.write_bytes(raw)
        assert ended == {True, False}

    @real
    def test_latest(self, copy: Copy) -> None:
        folder = copy("zero3")
        latest = folder.parent / "latest"
        for content in (b"", b"\n", b"\xff\xfe"):
            latest.write_bytes(content)
            told = refused(folder.parent, folder.parent.parent / "out")
            assert told == f"export: {latest}: is torn; name the checkpoint by --tag: {TAG}\n"
        latest.unlink()
        told = refused(folder.parent, folder.parent.parent / "out")
        assert told == f"export: {latest}: is missing; name the checkpoint by --tag: {TAG}\n"
        latest.write_text("global_step9")
        told = refused(folder.parent, folder.parent.parent / "out")
        assert told == f"export: {folder.parent}: holds no checkpoint 'global_step9'; it holds: {TAG}\n"

    @real
    @pytest.mark.parametrize("tag", ["..", f"../checkpoint/{TAG}", "/", ""])
    def test_a_tag_leads_nowhere_else(self, copy: Copy, tag: str) -> None:
        folder = copy("zero3")
        refused(folder.parent, folder.parent.parent / "out", "--tag", tag)

    def test_no_checkpoint_at_all(self, tmp_path: Path) -> None:
        checkpoint = tmp_path / "checkpoint"
        assert "is no folder" in refused(checkpoint, tmp_path / "out", code=2)
        checkpoint.mkdir()
        (checkpoint / "latest").write_text("here")
        assert "holds no checkpoint 'here'; it holds: none" in refused(checkpoint, tmp_path / "out")
        (checkpoint / "here").mkdir()
        assert "holds no shards (*_optim_states.pt)" in refused(checkpoint, tmp_path / "out")


# Pickles that do something.


class Reduced:
    """Pickles as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def shard(file: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED) -> None:
    """A file that looks like one of torch.save."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


CANARY = "canary"
TOUCH = f"open({CANARY!r}, 'w').close()"
EVIL: dict[str, tuple[bytes, str]] = {
    "system": (pickle.dumps({"x": Reduced(os.system, (f"touch {CANARY}",))}, 2), "posix.system"),
    "eval": (pickle.dumps({"x": Reduced(eval, (TOUCH,))}, 2), "builtins.eval"),
    "exec of protocol 4": (pickle.dumps({"x": Reduced(exec, (TOUCH,))}, 4), "builtins.exec"),
    "getattr": (pickle.dumps(Reduced(getattr, (OrderedDict, "fromkeys")), 2), "builtins.getattr"),
    "a dotted name": (
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        "collections.OrderedDict.__init__",
    ),
    "a function of torch": (b"\x80\x02ctorch\nload\nU\x06canary\x85R.", "torch.load"),
    "a function of ours": (b"\x80\x02c__main__\nsync\nU\x01.\x85R.", "__main__.sync"),
    "by INST": (b"(S'" + TOUCH.encode().replace(b"'", b'"') + b"'\nibuiltins\neval\n.", "builtins.eval"),
    "numpy's loader": (b"\x80\x02cnumpy.lib.npyio\nload\nU\x06canary\x85R.", ""),
    "a class of DeepSpeed": (b"\x80\x02cdeepspeed.runtime.engine\nDeepSpeedEngine\n)R.", ""),
}


class TestPickles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "checkpoint" / "tag").mkdir(parents=True)
        (tmp_path / "checkpoint" / "latest").write_text("tag")
        return tmp_path / "checkpoint" / "tag"

    @pytest.mark.parametrize("name", EVIL)
    def test_nothing_in_them_is_run(self, folder: Path, tmp_path: Path, name: str) -> None:
        pickled, culprit = EVIL[name]
        file = folder / "mp_rank_00_model_states.pt"
        shard(file, pickled)
        told = refused(folder.parent, tmp_path / "out", cwd=tmp_path)
        if culprit:
            assert told.startswith(f"export: {file}: holds {culprit}, which is not known to be harmless")
        assert not (tmp_path / CANARY).exists()
        assert not (tmp_path / "out").exists()

    def test_the_canary_would_sing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("system", "eval", "exec of protocol 4", "by INST"):
            pickle.loads(EVIL[name][0])  # noqa: S301 - that is the point
            assert (tmp_path / CANARY).exists()
            (tmp_path / CANARY).unlink()

    def test_a_class_can_be_allowed_and_is_not_imported_even_then(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(TOUCH)
        shard(folder / "mp_rank_00_model_states.pt", b"\x80\x02}U\x01xcmine\nState\n)R}U\x01aK\x01sbs.")
        told = refused(folder.parent, tmp_path / "out", cwd=tmp_path)
        assert "next: if you know why it is there, --allow mine.State reads past it" in told
        told = refused(folder.parent, tmp_path / "out", "--allow", "mine.State", cwd=tmp_path)
        assert told.endswith("mp_rank_00_model_states.pt: is no model file of DeepSpeed\n")
        assert not (tmp_path / CANARY).exists()

    @pytest.mark.parametrize(
        "pickled", [b"", b".", b"garbage", b"\x80\x02]q\x00h\x00.", b"(" * 100_000 + b".", b"r\xff\xff\xff\xff."]
    )
    def test_nonsense_is_refused(self, folder: Path, tmp_path: Path, pickled: bytes) -> None:
        shard(folder / "mp_rank_00_model_states.pt", pickled)
        assert "mp_rank_00_model_states.pt: " in refused(folder.parent, tmp_path / "out")

    def test_an_enum_pickled_by_getattr(self) -> None:
        # As Python 3.11.0 to 3.11.3 do it.
        stage = (
            b"\x80\x02c__builtin__\ngetattr\ncdeepspeed.runtime.zero.config\nZeroStageEnum\nX\x07\0\0\0weights\x86R."
        )
        read = export.Unpickler(io.BytesIO(stage), storages=lambda _key: (Path(), 0, 0), allowed=frozenset()).load()
        assert read == 3
        other = stage.replace(b"cdeepspeed.runtime.zero.config\nZeroStageEnum", b"ccollections\nOrderedDict")
        with pytest.raises(export.Refusal, match=r"holds builtins\.getattr"):
            export.Unpickler(io.BytesIO(other), storages=lambda _key: (Path(), 0, 0), allowed=frozenset()).load()

    def test_a_compressed_pickle_is_refused(self, folder: Path, tmp_path: Path) -> None:
        shard(folder / "mp_rank_00_model_states.pt", pickle.dumps({}, 2), compression=zipfile.ZIP_DEFLATED)
        assert "archive/data.pkl is compressed or encrypted" in refused(folder.parent, tmp_path / "out")

    @pytest.mark.parametrize(
        ("view", "words"),
        [
            ((0, (4,), (1,)), "a tensor larger than its storage"),
            ((1, (3,), (1,)), "a tensor larger than its storage"),
            ((0, (2, 2), (2, 1)), "a tensor larger than its storage"),
            ((-1, (1,), (1,)), "a tensor that is no plain view"),
            ((0, (-1,), (1,)), "a tensor that is no plain view"),
            ((0, (1,), (1, 1)), "a tensor that is no plain view"),
        ],
    )
    def test_a_tensor_stays_within_its_storage(self, view: tuple[Any, ...], words: str) -> None:
        storage = export.Storage(Path("x"), 100, 12, export.BY_NAME["F32"])
        assert export.rebuild_v2(storage, 0, (3,), (1,), False, None).start == 100
        with pytest.raises(ValueError, match=words):
            export.rebuild_v2(storage, *view, False, None)


# Where the result goes.


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of stage 2 with one tensor of 64 MiB, as torch.save writes it."""
    pytest.importorskip("torch")
    import torch

    folder = tmp_path_factory.mktemp("big") / "checkpoint"
    (folder / "tag").mkdir(parents=True)
    (folder / "latest").write_text("tag")
    numel = 16 * 2**20
    model: dict[str, Any] = {
        "module": {}, "buffer_names": [], "param_shapes": [{"weight": torch.Size([numel])}], "shared_params": {},
    }  # fmt: skip
    torch.save(model, folder / "tag" / "mp_rank_00_model_states.pt")
    state = {
        "zero_stage": 2, "partition_count": [1], "single_partition_of_fp32_groups": [torch.arange(numel).float()],
    }  # fmt: skip
    torch.save({"optimizer_state_dict": state}, folder / "tag" / OPTIM.format(0))
    return folder


def limited(**limits: int) -> Callable[[], None]:
    """Before the exporter starts: soft limits of its process."""

    def limit() -> None:
        for name, most in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (most, most))

    return limit


class TestWriting:
    @real
    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_memory_does_not_grow_with_the_tensor(self, big: Path, tmp_path: Path, form: str, dtype: str) -> None:
        options = ["--format", form, "--dtype", dtype]
        most = {"fp32": 32, "bf16": 60}[dtype]  # MiB; numpy reserves 32 for itself
        exported(big, tmp_path / "out", *options, preexec_fn=limited(data=most * 2**20))
        [file] = (tmp_path / "out").iterdir()
        assert load(file)["weight"][-1] == (2**24 if dtype == "bf16" else 2**24 - 1)

    @real
    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    def test_a_full_disk_leaves_nothing(self, big: Path, tmp_path: Path, form: str) -> None:
        out = tmp_path / "new" / "out"
        told = refused(big, out, "--format", form, code=4, preexec_fn=limited(fsize=20 * 2**20))
        assert "out.partial/" in told
        assert "cannot be written: File too large" in told
        assert list(tmp_path.iterdir()) == []

    @real
    def test_too_little_room_is_said_before_anything_is_written(self, big: Path, tmp_path: Path) -> None:
        place = tmp_path / "small"
        place.mkdir()
        script = 'mount -t tmpfs -o size=16m none "$0" || exit; "$@"; code=$?; ls -A "$0"; exit $code'
        argv = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(place)]
        if subprocess.run([*argv, "true"], capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        done = subprocess.run(
            [*argv, sys.executable, str(INSIDE / "export.py"), str(big), str(place / "out")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 4
        assert done.stdout == ""
        assert f"{place}/out: no room: 67.1 MB (67108864 bytes) are needed and 16.8 MB are free" in done.stderr

    @real
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    @pytest.mark.parametrize("existing", [False, True])
    def test_an_interrupt_leaves_nothing(self, big: Path, tmp_path: Path, number: int, existing: bool) -> None:
        out = tmp_path / "out"
        if existing:
            out.mkdir()
            (out / "config.json").write_text("{}")
        work = out / ".export.partial" if existing else tmp_path / "out.partial"
        # The exporter stops at its first line: the pipe is full, and nobody reads.
        reader, writer = os.pipe()
        size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, b" " * size)
        argv = [sys.executable, str(INSIDE / "export.py"), str(big), str(out), "--json"]
        running = subprocess.Popen(argv, stdout=writer, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not work.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        running.send_signal(number)
        _out, told = running.communicate(timeout=60)
        os.close(reader)
        os.close(writer)
        assert running.returncode == 130
        assert told == b"export: interrupted\n"
        assert [path.name for path in tmp_path.rglob("*")] == (["out", "config.json"] if existing else [])

    @real
    def test_what_a_killed_export_left_is_cleared_and_a_living_one_is_not(self, big: Path, tmp_path: Path) -> None:
        work = tmp_path / "out.partial"
        work.mkdir()
        (work / "model.safetensors").write_text("half")
        living = os.open(work, os.O_RDONLY)
        fcntl.flock(living, fcntl.LOCK_EX)
        assert "another export writes there now" in refused(big, tmp_path / "out", code=7)
        assert (work / "model.safetensors").read_text() == "half"
        os.close(living)
        exported(big, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["model.safetensors", "out"]

    @real
    def test_files_of_others_stay_and_weights_are_not_mixed(self, big: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "config.json").write_text("{}")
        exported(big, out)
        assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
        for name in ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
            shutil.rmtree(out)
            out.mkdir()
            (out / name).write_text("old")
            assert f"{out}/{name}: is there already" in refused(big, out, code=2)
            assert [path.name for path in out.iterdir()] == [name]
        (tmp_path / "file").write_text("x")
        assert f"{tmp_path}/file: is no folder" in refused(big, tmp_path / "file", code=2)

    @real
    def test_progress_as_json_lines(self, big: Path, tmp_path: Path) -> None:
        said = [json.loads(line) for line in exported(big, tmp_path / "out", "--json").splitlines()]
        numel = 16 * 2**20
        told = {"tensors": 1, "parameters": numel, "stage": 2, "world_size": 1}
        assert said[0] == {"event": "begin", "bytes": 4 * numel} | told
        assert {line["event"] for line in said[1:-1]} == {"progress"}
        assert said[-2] == {"event": "progress", "bytes": 4 * numel, "total": 4 * numel}
        done = {"event": "done", "bytes": 4 * numel, "tensors": 1, "parameters": numel}
        done |= {"files": ["model.safetensors"], "note": None}
        assert said[-1] == done | {"seconds": said[-1]["seconds"]}
        failed = run(tmp_path / "gone", tmp_path / "out2", "--json")
        assert json.loads(failed.stdout)["event"] == "error"
        assert json.loads(failed.stdout)["code"] == failed.returncode == 2

    @real
    def test_the_summary_for_people(self, big: Path, tmp_path: Path) -> None:
        said = exported(big, tmp_path / "out", "--max-shard-size", "0.5 GB")
        assert said.startswith(f"{tmp_path}/out: 1 tensors, 16777216 parameters as fp32, 67.1 MB in ")

    @pytest.mark.parametrize("size", ["5", "5GiB", "", "GB", "-1GB", "0", "1e3GB", "5 PB"])
    def test_sizes(self, tmp_path: Path, size: str) -> None:
        if size == "5":
            assert export.size_of(size) == 5
            assert export.size_of("1.5gb") == 1_500_000_000
            return
        done = run(tmp_path, tmp_path / "out", "--max-shard-size", size)
        assert done.returncode == 2
        assert "no size like 5GB" in done.stderr or "expected one argument" in done.stderr


class TestPlaces:
    """The arithmetic of what lies where."""

    def test_strides(self) -> None:
        assert export.strides_of(()) == ()
        assert export.strides_of((3,)) == (1,)
        assert export.strides_of((2, 3, 4)) == (12, 4, 1)
        assert export.strides_of((0, 3)) == (3, 1)
        assert export.span((2, 3), (1, 2)) == 6
        assert export.span((2, 0), (9, 9)) == 0

    def test_cutting_a_row_of_flat_tensors_gives_every_byte_once(self) -> None:
        kind = export.BY_NAME["F16"]
        lengths = (3, 0, 5, 1)
        flats = export.Flats(
            [
                export.Lying(file=Path(str(at)), start=100 * at, dtype=kind, shape=(length,), strides=(1,))
                for at, length in enumerate(lengths)
            ],
            of="all",
        )
        every = [(str(at), 100 * at + 2 * one) for at, length in enumerate(lengths) for one in range(length)]
        for start, count in itertools.product(range(10), range(10)):
            if start + count > 9:
                continue
            found = [
                (str(stretch.file), stretch.start + byte)
                for stretch in flats.cut(start, count)
                for byte in range(0, stretch.length, 2)
            ]
            assert found == every[start : start + count]

    def test_more_shards_than_may_be_open(self, tmp_path: Path) -> None:
        taken: list[int] = []
        shards = export.Shards(taken.append)
        for number in range(2 * export.OPEN_AT_ONCE):
            (tmp_path / str(number)).write_bytes(bytes([number]))
        read = b""
        for number in range(2 * export.OPEN_AT_ONCE):
            [chunk] = shards.chunks(export.Stretch(tmp_path / str(number), 0, 1))
            read += bytes(chunk)
        assert read == bytes(range(256))
        mine = 0
        for one in os.listdir("/proc/self/fd"):  # noqa: PTH208 - the listing itself has one, gone by now
            with contextlib.suppress(FileNotFoundError):
                mine += os.readlink(f"/proc/self/fd/{one}").startswith(str(tmp_path))  # noqa: PTH115
        assert mine == export.OPEN_AT_ONCE
        with pytest.raises(export.Refusal, match="became shorter"):
            list(shards.chunks(export.Stretch(tmp_path / "255", 0, 2)))

    def test_a_plain_pickle_is_what_it_was(self) -> None:
        for value in ("x", 0, 2**40, (1, 2**33), ()):
            assert pickle.load(io.BytesIO(b"\x80\2" + export.plain(value) + b".")) == value  # noqa: S301
