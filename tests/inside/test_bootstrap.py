"""The bootstrap, between torchrun and the script: nothing the script could notice, except what it must be told."""

from __future__ import annotations

import json
import sys

import pytest

from .conftest import FAKE_LAUNCH, Bench

ODD = ["", "two words", "it's", '"quoted"', "$(touch X)", "`id`", "*", "a\nb", "ünï-☃", "--flag=1", "--", "\\", "-c"]


def test_arguments_reach_the_script_byte_for_byte(bench: Bench) -> None:
    ended = bench.run("import json, sys; print(json.dumps(sys.argv))", *ODD)
    assert json.loads(ended.said("0")[0]) == ["job.py", *ODD]


def test_the_script_is_main_in_its_own_folder(bench: Bench) -> None:
    script = """
import sys, json
sys.modules["__main__"].mine = 1
print(json.dumps([__name__, __file__, sys.path[0], mine]))
"""
    ended = bench.run(script)
    assert json.loads(ended.said("0")[0]) == ["__main__", "job.py", str(bench.folder / "work"), 1]


def test_a_wrong_world_size_names_both(bench: Bench) -> None:
    ended = bench.run("print('trained')", ranks=2, world_size=4)
    assert ended.status == 1
    assert ended.said("0") == [
        "launcher: the plan has 4 ranks (LAUNCHER_WORLD_SIZE), torchrun started 2 (WORLD_SIZE):",
        "  the nodes did not find each other, or the Accelerate config is not the plan's",
    ]


def test_a_traceback_shows_the_script_and_not_us(bench: Bench) -> None:
    ended = bench.run("def f():\n    raise KeyError('x')\nf()\n")
    shown = [line for line in ended.said("0") if set(line.strip()) - {"^", "~"}]
    assert shown == [
        "Traceback (most recent call last):",
        '  File "job.py", line 3, in <module>',
        "    f()",
        '  File "job.py", line 2, in f',
        "    raise KeyError('x')",
        "KeyError: 'x'",
    ]


@pytest.mark.parametrize(
    ("script", "code", "kind"),
    [
        ("import sys; sys.exit()", 0, None),
        ("import sys; sys.exit(0)", 0, None),
        ("import sys; sys.exit(7)", 7, "SystemExit"),
        ("import sys; sys.exit('bad')", 1, "SystemExit"),
        ("1/0", 1, "ZeroDivisionError"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
        ("def", 1, "SyntaxError"),
    ],
)
def test_every_way_to_end_keeps_its_code(bench: Bench, script: str, code: int, kind: str | None) -> None:
    ended = bench.run(script)
    assert ended.status == code
    assert [failure["type"] for failure in ended.exit["failures"]] == ([kind] if kind else [])


def test_a_missing_script_is_named(bench: Bench) -> None:
    ended = bench.run("", launch=FAKE_LAUNCH.replace("*sys.argv[1:]", "sys.argv[1], 'gone.py'"))
    assert ended.status == 1
    assert "gone.py" in ended.exit["failures"][0]["message"]


def test_nvme_paths_are_dealt_over_the_local_ranks(bench: Bench) -> None:
    script = """
import os
print(*(os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_NVME_PATH") for what in ("OPTIMIZER", "PARAM")))
"""
    env = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
    ended = bench.run(script, ranks=3, nvme=["/nvme/0", "/nvme/1"], env=env)
    assert [ended.said(str(rank)) for rank in range(3)] == [["/nvme/0 None"], ["/nvme/1 None"], ["/nvme/0 None"]]


def test_a_deepspeed_file_says_another_nvme_path_to_every_rank(bench: Bench) -> None:
    offloads = {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme/0"}, "offload_param": {"device": "cpu"}}
    file = bench.folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, **offloads}}))
    script = """
import json, os
said = os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
config = json.loads(said if said.startswith("{") else open(said).read())
print(config["zero_optimization"]["offload_optimizer"]["nvme_path"], config["zero_optimization"]["offload_param"])
"""
    env = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    ended = bench.run(script, ranks=3, nvme=["/nvme/0", "/nvme/1"], env=env)
    said = [ended.said(str(rank))[0].partition(" ") for rank in range(3)]
    assert [(path, rest) for path, _, rest in said] == [
        (path, "{'device': 'cpu'}") for path in ("/nvme/0", "/nvme/1", "/nvme/0")
    ]


def test_torch_is_not_imported_for_a_script_that_does_not_need_it(bench: Bench) -> None:
    ended = bench.run("import sys; print('torch' in sys.modules, 'accelerate' in sys.modules)")
    assert ended.said("0") == ["False False"]


def test_worker_processes_of_a_script_find_it_again(bench: Bench) -> None:
    script = """
import multiprocessing
def square(number):
    return number * number
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(pool.map(square, [2, 3]))
"""
    assert bench.run(script).said("0") == ["[4, 9]"]


def test_python_is_the_agents_own(bench: Bench) -> None:
    assert bench.run("import sys; print(sys.executable)").said("0") == [sys.executable]
