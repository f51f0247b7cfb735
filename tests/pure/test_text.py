"""Plans, states and tables as people and programs read them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cluster.container import LABEL_ROLE, LABEL_RUN, Container, ContainerState
from cluster.errors import InputError
from launcher.job import Job, Settings
from launcher.lints import Lint
from launcher.plan import Plan, make_plan
from launcher.state import RunState
from launcher.views import text
from tests.pure import given

JOB = Job(script="train.py", args=("--name", "it's"), settings=Settings(stage=2))
CONFIG = Job(script="train.py", config='{"zero_optimization": {"stage": 3}}')


def plan_of(job: Job, *, run: str = "run-1", **fields: Any) -> Plan:
    inventory = given.inventory(nodes=2, **fields)
    return make_plan(inventory, job, given.all_facts(inventory), image="sha256:feed", run_id=run, code="c0de")


PLAN_TEXT = """\
cluster lab: 2 nodes, 16 processes, cuda, engine docker
image   sha256:feed
meeting 10.0.0.11:29500

to do:
  build it
  send it

node gpu-01 (rank 0)
  address  10.0.0.11 (eth0)
  slots    8
  mount    /home/ml/.launcher/lab/gpu-01/runs/run-1/files -> /launcher/files
  mount    /home/ml/.launcher/lab/gpu-01/store/trees/c0de -> /launcher/code
  mount    /home/ml/.launcher/lab/gpu-01/runs/run-1/out -> /launcher/out
  mount    /home/ml/.launcher/lab/gpu-01/checkpoints -> /checkpoints
  accelerate.yaml
    compute_environment: LOCAL_MACHINE
    distributed_type: DEEPSPEED
    mixed_precision: 'no'
    use_cpu: false
    num_machines: 2
    num_processes: 16
    machine_rank: 0
    main_process_ip: 10.0.0.11
    main_process_port: 29500
    main_training_function: main
    debug: false
    deepspeed_config:
      deepspeed_multinode_launcher: standard
      zero_stage: 2
      gradient_accumulation_steps: 1
      gradient_clipping: 1000000000.0
      offload_optimizer_device: none
      offload_param_device: none
      zero3_init_flag: false
      zero3_save_16bit_model: false
  deepspeed, as Accelerate's plugin makes it of that
    {
      "train_batch_size": "auto",
      "train_micro_batch_size_per_gpu": "auto",
      "gradient_accumulation_steps": 1,
      "gradient_clipping": 1000000000.0,
      "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {
          "device": "none"
        },
        "offload_param": {
          "device": "none"
        },
        "stage3_gather_16bit_weights_on_model_save": false
      }
    }
  launch
    accelerate launch --config_file /launcher/files/accelerate.yaml --same_network --rdzv_backend static \
--rdzv_conf timeout=120 /launcher/files/bootstrap.py train.py --name 'it'"'"'s'
  environment
    GLOO_SOCKET_IFNAME=eth0
    LAUNCHER_CHECKPOINTS=/checkpoints
    LAUNCHER_CLUSTER=lab
    LAUNCHER_NODE=gpu-01
    LAUNCHER_RUN=run-1
    NCCL_SOCKET_IFNAME=eth0
    OMP_NUM_THREADS=8

"""


def test_a_plan_shows_what_would_be_done_and_what_accelerate_would_get() -> None:
    shown = text.plan_text(plan_of(JOB), ("build it", "send it"))
    assert shown.startswith(PLAN_TEXT)
    assert shown.count("\nnode ") == 2


def test_a_plan_with_nothing_to_do_says_so() -> None:
    assert "to do:\n  nothing\n" in text.plan_text(plan_of(JOB))


def test_a_deepspeed_file_is_shown_as_each_node_gets_it() -> None:
    plan = plan_of(CONFIG)
    assert '  deepspeed.json\n    {\n      "zero_optimization": {' in text.node_text(plan, plan.nodes[0])


def test_without_a_run_the_idle_container_is_shown_and_no_launch() -> None:
    plan = plan_of(Job(script=""), run="")
    shown = text.node_text(plan, plan.nodes[1])
    assert "  mount    /home/ml/.launcher/lab/gpu-02/node -> /launcher/files\n" in shown
    assert "  launch" not in shown


def test_an_unknown_interface_is_called_so() -> None:
    plan = plan_of(JOB)
    assert "10.0.0.11 (interface unknown)" in text.node_text(plan, replace(plan.nodes[0], nic=""))


def test_s27_a_plan_holds_as_long_as_nothing_of_it_has_changed() -> None:
    plan = plan_of(Job(script=""), run="")
    saved = json.dumps({**text.promise(plan), "todo": ["build the image"], "done": "nothing to do"}, indent=2)
    text.check_promise(saved, plan, name="plan.json")
    first, second = plan.nodes
    for changed, told in (
        (replace(plan, image="sha256:dead"), 'image: was "sha256:feed", is "sha256:dead"'),
        (replace(plan, port=29501), 'master: was "10.0.0.11:29500", is "10.0.0.11:29501"'),
        (replace(plan, nodes=(first, replace(second, slots=4))), "nodes.gpu-02.slots: was 8, is 4"),
        (replace(plan, nodes=(first,)), "nodes.gpu-02.rank: was 1, is not there"),
    ):
        with pytest.raises(InputError) as refused:
            text.check_promise(saved, changed, name="plan.json")
        head, *lines = str(refused.value).splitlines()
        assert head == "plan.json: this is not what would be done now; nothing was changed"
        assert f"  {told}" in lines


def test_s27_what_only_the_container_knows_of_counts_too() -> None:
    before, after = (plan_of(Job(script=""), run="", container={"shm_size": size}) for size in ("1g", "2g"))
    with pytest.raises(InputError) as refused:
        text.check_promise(json.dumps(text.promise(before)), after, name="plan.json")
    assert [line.partition(":")[0].strip() for line in str(refused.value).splitlines()[1:-1]] == [
        "containers.gpu-01",
        "containers.gpu-02",
    ]


@pytest.mark.parametrize("saved", ["", "{", "[]", "1", "{}", '{"nodes": {}}', "[" * 100_000])
def test_s27_what_is_no_saved_plan_is_refused(saved: str) -> None:
    with pytest.raises(InputError, match=r"plan.json: this is no saved plan"):
        text.check_promise(saved, plan_of(Job(script=""), run=""), name="plan.json")


def test_the_effective_configuration_is_data_by_node() -> None:
    said = json.loads(json.dumps(text.effective(plan_of(JOB))))
    nodes = said.pop("nodes")
    assert said == {
        "cluster": "lab",
        "image": "sha256:feed",
        "world_size": 16,
        "master": "10.0.0.11:29500",
        "way": "plugin",
        "notes": [],
    }
    assert [(name, one["rank"], one["accelerate"]["machine_rank"]) for name, one in nodes.items()] == [
        ("gpu-01", 0, 0),
        ("gpu-02", 1, 1),
    ]
    assert nodes["gpu-01"]["launch"][-3:] == ["train.py", "--name", "it's"]


def test_a_table_is_as_wide_as_its_widest_cells() -> None:
    assert text.table([("A", "LONG", "C"), ("one", "x", ""), ("1", "", "3")]) == "A    LONG  C\none  x\n1          3"


def container(role: str, state: ContainerState, *, code: int | None = None, run: str = "") -> Container:
    labels = {LABEL_ROLE: role, **({LABEL_RUN: run} if run else {})}
    return Container(id="0123", name=role, image="sha256:feed", state=state, labels=labels, code=code)


def test_status_is_one_row_a_node() -> None:
    idle = container("node", ContainerState.RUNNING)
    found = {
        "gpu-01": (idle, container("run", ContainerState.RUNNING, run="run-1")),
        "gpu-02": (container("node", ContainerState.ENDED, code=137),),
        "gpu-03": (idle, container("run", ContainerState.ENDED, code=1, run="run-1")),
        "gpu-04": (),
    }
    hosts = {name: f"{name}.example" for name in (*found, "gpu-05")}
    rows = text.status_rows(found, hosts, lost={"gpu-05": "connection refused"}, spares=("gpu-04",))
    assert rows[0] == {
        "node": "gpu-01",
        "host": "gpu-01.example",
        "up": True,
        "run": "run-1",
        "state": "running",
        "code": None,
        "lost": None,
        "spare": False,
    }
    assert text.status_text("lab", rows, None).splitlines() == [
        "cluster lab",
        "NODE    HOST            UP   RUN    STATE",
        "gpu-01  gpu-01.example  yes  run-1  running",
        "gpu-02  gpu-02.example  no   -      -",
        "gpu-03  gpu-03.example  yes  run-1  ended (1)",
        "gpu-04  gpu-04.example  no   spare  -",
        "gpu-05  gpu-05.example  ?    -      connection refused",
    ]


OVER = RunState(
    run="run-1",
    cluster="lab",
    world_size=16,
    command=("train.py", "a b"),
    phase="failed",
    began=100.0,
    ended=161.4,
    code=1,
    cause="node gpu-02, rank 5: killed by SIGKILL",
)


def test_a_run_that_is_over_is_one_line() -> None:
    assert text.state_line(OVER) == "failed after 61 s: node gpu-02, rank 5: killed by SIGKILL"
    assert text.state_line(replace(OVER, phase="done", code=0, cause="")) == "done after 61 s"
    assert text.status_text("lab", [], OVER).splitlines()[-1] == f"last run run-1: {text.state_line(OVER)}"
    other = replace(OVER, run="run-0", phase="watch", code=None, ended=None)
    assert text.status_text("lab", [], OVER, [other]).splitlines()[-2] == f"run run-0: {text.state_line(other)}"


def test_a_run_under_way_says_since_when() -> None:
    going = replace(OVER, phase="watch", code=None, ended=None)
    assert text.state_line(going, now=7300.0) == "watch, began 2 h ago, 16 processes"


@pytest.mark.parametrize(
    ("ago", "said"), [(-60, "0 s"), (30, "30 s"), (600, "10 min"), (7200, "2 h"), (259_200, "3 d")]
)
def test_an_age_is_rough(ago: int, said: str) -> None:
    assert text.age(1e9 - ago, now=1e9) == said


def test_a_run_is_data() -> None:
    assert text.state_data(OVER) == {
        "run": "run-1",
        "cluster": "lab",
        "phase": "failed",
        "code": 1,
        "cause": "node gpu-02, rank 5: killed by SIGKILL",
        "world_size": 16,
        "command": ["train.py", "a b"],
        "began": 100.0,
        "ended": 161.4,
    }
    assert text.state_data(None) is None
    assert text.state_data(RunState()) is None


def test_runs_are_listed_and_what_is_unreadable_is_left_out() -> None:
    unreadable = text.run_row("lab", RunState())
    assert unreadable == {"cluster": "lab", "run": None, "phase": "unknown"}
    assert text.run_table([text.run_row("lab", OVER), unreadable]).splitlines() == [
        "RUN    CLUSTER  STATE   COMMAND",
        "run-1  lab      failed  train.py 'a b'",
    ]


def test_a_long_command_with_line_ends_stays_one_cell() -> None:
    row = text.run_row("lab", replace(OVER, command=("train.py", "x\ny", "z" * 100)))
    _, line = text.run_table([row]).splitlines()
    assert line.endswith("…")


LINTS = (
    Lint(id="a", level="error", where="ds.json:1:2", what="one", consequence="it breaks", cure="do this"),
    Lint(id="b", level="warning", where="ds.json:3:4", what="two", consequence="it is slow", cure="do that"),
    Lint(id="b", level="warning", where="--set", what="three", consequence="it is slow", cure="do that"),
)


def test_lints_say_where_what_and_what_next() -> None:
    assert text.lints_text(LINTS) == (
        "ds.json:1:2: error: one [a]\n  if left: it breaks\n  next: do this\n"
        "ds.json:3:4: warning: two [b]\n  if left: it is slow\n  next: do that\n"
        "--set: warning: three [b]\n  if left: it is slow\n  next: do that\n"
        "1 error, 2 warnings"
    )
    assert text.lints_text(()) == "no findings"


def test_lints_are_data_too() -> None:
    assert text.lints_data(LINTS)[0] == {
        "id": "a",
        "level": "error",
        "where": "ds.json:1:2",
        "what": "one",
        "consequence": "it breaks",
        "cure": "do this",
    }
