"""`env`, `test` and the examples that come after training, on three real nodes that share no file system."""

from __future__ import annotations

import json
import re

from tests.lab.conftest import User, eventually
from tests.lab.test_main_job import killed
from tests.testbed import lab as testbed


def test_env_tells_of_every_node_what_differs_and_what_does_not(lab: testbed.Lab, user: User) -> None:
    said = user.launcher("env", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["nodes"] == [machine.name for machine in lab.machines]
    same = found["same"]
    assert same["versions"]["accelerate"] == "1.15.0"
    assert same["ops"]["cpu_adam"] == "installed"
    assert same["image"]["id"].startswith("sha256:")
    assert (same["gpus"]["count"], same["limits"]["uid"]) == (0, 1000)
    assert same["variables"]["LAUNCHER_CLUSTER"] == lab.prefix
    assert found["differs"] == {}
    text = user.launcher("env")
    assert "the nodes differ in nothing" in text.out


def test_env_names_the_node_that_is_not_as_the_others(lab: testbed.Lab, user: User) -> None:
    odd = lab.machines[1].name
    container = f"launcher-{lab.prefix}-{odd}-node"
    config = "compute_environment: LOCAL_MACHINE\\ndistributed_type: 'NO'\\n"
    place = "~/.cache/huggingface/accelerate"
    made = f'mkdir -p {place} && printf "{config}" > {place}/default_config.yaml'
    testbed.run(odd, "docker", "exec", container, "sh", "-c", made)
    said = user.launcher("env")
    assert said.code == 0, said.err
    differing = said.out.partition("differs\n")[2]
    assert "accelerate env: Accelerate configs" in differing
    assert re.search(rf"^ +{odd} +.*LOCAL_MACHINE", differing, re.M)


def test_test_gives_a_verdict_per_node_under_zero_3(lab: testbed.Lab, user: User) -> None:
    said = user.launcher("test", "--stage", "3")
    assert said.code == 0, said.err + said.out[-3000:]
    verdicts = [line for line in said.out.splitlines() if line.startswith("node ")]
    assert verdicts == [
        f"node {machine.name}: ok, ranks {2 * number}-{2 * number + 1}, 10 checks passed"
        for number, machine in enumerate(lab.machines)
    ]
    assert "| ok training (" in said.out
    assert "| left out dl_preparation_check: it splits a batch of 8, which 6 processes do not divide" in said.out


def test_test_runs_in_plain_training_and_answers_in_json(lab: testbed.Lab, user: User) -> None:
    said = user.launcher("test", "--json")
    assert said.code == 0, said.err
    answer = json.loads(said.out)
    assert [(node["node"], node["ok"], node["wrong"]) for node in answer["nodes"]] == [
        (machine.name, True, None) for machine in lab.machines
    ]


def test_the_node_that_fails_the_test_is_told_from_those_that_had_to_stop(lab: testbed.Lab, user: User) -> None:
    victim = lab.machines[1].name
    running = user.begin("test", "--stage", "1")
    eventually(lambda: user.heard(b" ok init_state_check", node=victim) > 0, "the first check")
    testbed.run(victim, "sh", "-c", killed(3))
    said = user.end(running)
    assert said.code == 1, said.err
    verdicts = [line for line in said.out.splitlines() if line.startswith("node ")]
    assert len(verdicts) == 3
    assert verdicts[1].startswith(f"node {victim}: failed, ranks 2-3, ")
    assert verdicts[1].endswith("; rank 3: killed by SIGKILL")
    assert all(": failed, ranks " in line and "another node had failed" in line for line in verdicts[::2])
    assert said.first == f"error: node {victim}, rank 3: killed by SIGKILL"


SMALL = ("--global-batch", "12", "--log-every", "1", "--save-every", "2", "--out", "/checkpoints/examined")


def test_a_run_is_resumed_from_what_each_node_kept_and_its_model_writes(lab: testbed.Lab, user: User) -> None:
    first = user.launcher("run", "--stage", "3", "examples/train.py", "--steps", "4", *SMALL)
    assert first.code == 0, first.err + first.out[-3000:]
    torn = "/mnt/checkpoints/examined/step-00000004"
    testbed.run(
        lab.machines[2].name, "sh", "-c", f"truncate -s 1 {torn}/pytorch_model/zero_pp_rank_5_*_optim_states.pt"
    )
    again = user.launcher("run", "--stage", "3", "examples/train.py", "--steps", "4", *SMALL, "--resume")
    assert again.code == 0, again.err + again.out[-3000:]
    assert "process 4 says: pytorch_model/zero_pp_rank_5_mp_rank_00_optim_states.pt is torn" in again.out
    assert "resumed from /checkpoints/examined/step-00000002" in again.out
    step_4 = re.compile(r"\| (step 4 loss [\d.]+)$", re.M)
    assert step_4.findall(again.out) == step_4.findall(first.out) != []

    model = ("--model", "/checkpoints/examined/final", "--prompt", "the red boat", "--check")
    wrote = user.launcher("run", "--stage", "3", "examples/inference.py", *model)
    assert wrote.code == 0, wrote.err + wrote.out[-3000:]
    assert len(re.findall(r"process \d holds .* \(16\.\d%\), 0 tensors whole", wrote.out)) == 6
    assert "| the red boat" in wrote.out
