"""The command line from outside: exit codes, suggestions, odd surroundings; never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INVENTORY = """\
name: lab
accelerator: cpu
nodes:
  - {name: cpu-01, host: 192.0.2.1}
"""


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Shell:
    """A folder and an environment of its own, in which the launcher is called."""

    folder: Path
    environment: dict[str, str]

    def __call__(self, *words: str | bytes, without: tuple[str, ...] = (), **environment: str) -> Said:
        known = {**self.environment, **environment}
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *words],
            cwd=self.folder,
            env={name: value for name, value in known.items() if name not in without},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            check=False,
        )
        said = Said(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in said.out + said.err
        assert "this should not happen" not in said.err
        return said


@pytest.fixture
def call(tmp_path: Path) -> Shell:
    (tmp_path / "work").mkdir()
    return Shell(
        tmp_path / "work",
        {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HOME": str(tmp_path),
            "LAUNCHER_STATE": str(tmp_path / "state"),
        },
    )


def test_help_and_version_answer(call: Shell) -> None:
    told = call("--help")
    assert (told.code, told.err) == (0, "")
    assert told.out.startswith("Usage: launcher [OPTIONS] COMMAND [ARGS]...")
    assert call("--version") == Said(0, "launcher, version 0.1.0\n", "")


def test_a_mistyped_command_gets_a_suggestion(call: Shell) -> None:
    told = call("stats")
    assert (told.code, told.out) == (2, "")
    assert told.err.splitlines()[-1] in (
        "Error: No such command 'stats'. Did you mean 'status'?",
        "Error: No such command 'stats'. (Did you mean one of: 'status', 'stop'?)",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "--stge", "3", "train.py"), "No such option"),
        (("run", "--stage"), "requires an argument"),
        (("run", "--stage", "4", "train.py"), "'4' is not one of 'auto', '0', '1', '2', '3'"),
        (("run", "--accumulation", "x", "train.py"), "'x' is not a valid integer"),
        (("run",), "no script is named"),
        (("config",), ""),
        (("frobnicate",), "No such command 'frobnicate'."),
    ],
)
def test_what_cannot_be_parsed_is_exit_code_2(call: Shell, words: tuple[str, ...], said: str) -> None:
    told = call(*words)
    assert (told.code, told.out) == (2, "")
    assert said in told.err


def test_without_any_cluster_the_way_to_one_is_shown(call: Shell) -> None:
    assert call("status") == Said(
        2,
        "",
        "error: no cluster is named, there is no cluster.yaml here, and none was brought up\n"
        "  next: launcher up cluster.yaml, or launcher init HOST... to write a first one\n",
    )


def test_a_cluster_that_is_not_known_is_told_with_those_that_are(call: Shell) -> None:
    assert call("status", "-c", "nowhere") == Said(
        2, "", "error: no cluster 'nowhere' is known here\n  next: known are: none; or name its file\n"
    )


def test_a_wrong_inventory_is_refused_with_its_place(call: Shell) -> None:
    (call.folder / "cluster.yaml").write_text("name: lab\nnods: []\n")
    told = call("up", "--dry-run")
    assert (told.code, told.out) == (2, "")
    assert "cluster.yaml:2:1: nods is no key; did you mean 'nodes'?" in told.err


RIGHT = '{"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}'


@pytest.mark.parametrize(
    ("content", "options", "code", "last"),
    [
        (RIGHT, (), 0, "no findings"),
        (RIGHT.replace('"stage": 2', '"stage": 3'), (), 0, "1 warning"),
        (RIGHT.replace('"stage": 2', '"stag": 2'), (), 2, "1 error"),
        (RIGHT[:-1] + ', "train_batch_size": 6}', (), 0, "no findings"),
        (RIGHT[:-1] + ', "train_batch_size": 6}', ("--world-size", "4"), 2, "1 error"),
        ("distributed_type: DEEPSPEED\nnum_machines: 2\nnum_processes: 3\n", (), 2, "3 errors, 2 warnings"),
    ],
)
def test_a_configuration_is_checked_whatever_its_name(
    call: Shell, content: str, options: tuple[str, ...], code: int, last: str
) -> None:
    (call.folder / "file").write_text(content)
    told = call("config", "check", *options, "file")
    assert (told.code, told.out.splitlines()[-1], told.err) == (code, last, "")


def test_a_checked_configuration_is_told_as_data_too(call: Shell) -> None:
    (call.folder / "ds.json").write_text(RIGHT.replace('"stage": 2', '"stag": 2'))
    told = call("config", "check", "--json", "ds.json")
    assert told.code == 2
    assert [(one["id"], one["where"]) for one in json.loads(told.out)] == [("unknown-key", "ds.json:1:87")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{,}", "error: ds.json:1:2: not a DeepSpeed JSON: a key must be text in double quotes; here stands ','\n"),
        (None, "error: ds.json: there is no such file\n"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_one_message(call: Shell, content: str | None, said: str) -> None:
    if content is not None:
        (call.folder / "ds.json").write_text(content)
    told = call("config", "check", "ds.json")
    assert (told.code, told.out) == (2, "")
    assert told.err.startswith(said)


def test_nothing_is_connected_to_before_the_settings_make_sense(call: Shell) -> None:
    (call.folder / "cluster.yaml").write_text(INVENTORY)
    (call.folder / "train.py").touch()
    assert call("run", "--stage", "2", "--offload-param", "cpu", "train.py") == Said(
        2,
        "",
        "error: --offload-param: offload_param.device is 'cpu' at stage 2 [offload-param-below-stage-3]\n"
        "  if left: DeepSpeed ignores it: the parameters stay in the GPU's memory\n"
        "  next: set the stage to 3, or the device to none\n",
    )


def test_a_node_of_an_unpinned_key_is_exit_code_3_without_a_packet(call: Shell) -> None:
    (call.folder / "cluster.yaml").write_text(INVENTORY)
    told = call("up")
    assert (told.code, told.out) == (3, "")
    assert told.err.startswith("error: node cpu-01")
    assert "launcher trust" in told.err


def test_json_is_json_and_alone_on_standard_output(call: Shell) -> None:
    known = call("ls", "--json")
    assert (known.code, json.loads(known.out)) == (0, {"current": None, "clusters": [], "runs": []})
    schema = json.loads(call("schema").out)
    assert schema["required"] == ["name", "nodes"]


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o nosort"), ("zsh", "#compdef launcher"), ("fish", "complete --no-files")]
)
def test_a_shell_gets_its_completion(call: Shell, shell: str, word: str) -> None:
    told = call("completion", shell)
    assert (told.code, told.err) == (0, "")
    assert word in told.out
    assert "_LAUNCHER_COMPLETE" in told.out


def test_completion_completes(call: Shell) -> None:
    told = call(COMP_WORDS="launcher st", COMP_CWORD="1", _LAUNCHER_COMPLETE="bash_complete")
    assert told.out.splitlines() == ["plain,status", "plain,stop"]


def test_a_reader_that_goes_away_hears_no_complaint(call: Shell) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "schema"],
        cwd=call.folder,
        env=call.environment,
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert done.stderr == b""


def test_a_home_is_not_needed(call: Shell) -> None:
    assert call("ls", without=("HOME",)).code == 0
    assert call("schema", without=("HOME", "LAUNCHER_STATE")).code == 0


def test_a_narrow_and_dumb_terminal_is_enough(call: Shell) -> None:
    told = call("run", "--help", TERM="dumb", COLUMNS="20")
    assert (told.code, told.err) == (0, "")
    assert "\x1b" not in told.out


def test_words_that_no_program_can_pass_on_are_refused(call: Shell) -> None:
    (call.folder / "cluster.yaml").write_text(INVENTORY)
    (call.folder / "train.py").touch()
    for words in (("status", "-c", b"\xff"), ("run", "train.py", b"\xff"), ("run", b"\xff.py")):
        told = call(*words)
        assert (told.code, told.out) == (2, "")


def test_an_empty_word_names_nothing(call: Shell) -> None:
    assert call("status", "-c", "").code == 2
    assert call("logs", "--since", "", "-c", "nowhere").code == 2


def test_debug_shows_where_an_error_comes_from(call: Shell) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "--debug", "status"],
        cwd=call.folder,
        env=call.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-2].startswith("error: no cluster is named")


def test_a_state_that_cannot_be_written_is_one_message(call: Shell) -> None:
    (call.folder / "cluster.yaml").write_text(INVENTORY)
    told = call("up", LAUNCHER_STATE=str(call.folder / "cluster.yaml"))
    assert (told.code, told.out) == (1, "")
    assert "this cannot be written: Not a directory\n  next: make room there, or set LAUNCHER_STATE" in told.err


def test_s25_a_state_folder_of_which_others_decide_is_refused_by_every_command(call: Shell) -> None:
    (call.folder / "cluster.yaml").write_text(INVENTORY)
    state = call.folder.parent / "state"
    state.symlink_to(call.folder)
    for words in (("ls",), ("trust", "cluster.yaml", "--yes"), ("up", "cluster.yaml"), ("logs",), ("image", "prune")):
        told = call(*words)
        assert (told.code, told.out) == (2, ""), words
        assert told.err.startswith(f"error: {state}: the state folder is a link"), told.err
    assert [path.name for path in call.folder.iterdir()] == ["cluster.yaml"]


def test_f47_a_state_of_nothing_but_damage_is_told_in_words(call: Shell) -> None:
    (call.folder / "cluster.yaml").write_text(INVENTORY)
    lab = call.folder.parent / "state" / "clusters" / "lab"
    run = lab / "runs" / "20261123-070000-c0de"
    (run / "logs").mkdir(parents=True)
    for path in (lab / "inventory", lab / "engine", lab / "facts.json", run / "events.jsonl", run / "plan.json"):
        path.write_bytes(b"\xff\0{[")
    (lab / "known_hosts").write_bytes(b"\xff\0")
    (run / "logs" / "gpu-01.log").write_bytes(b"\xff\0")
    codes = [call(*words).code for words in (("ls",), ("ls", "--json"), ("status",), ("logs",), ("up",), ("down",))]
    assert codes == [0, 0, 2, 2, 2, 2]


def test_what_was_mistaken_leaves_no_state(call: Shell) -> None:
    call("status")
    call("up", "nowhere.yaml")
    assert not (call.folder.parent / "state").exists()


def test_a_configuration_is_written_and_turned_into_the_other_kind(call: Shell) -> None:
    told = call("config", "new", "z.json", "--stage", "2", "--offload-optimizer", "cpu", "--optimizer", "CPUAdam")
    assert (told.code, told.out) == (0, "")
    made = json.loads((call.folder / "z.json").read_text())
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    told = call("config", "convert", "z.json", "-o", "z.yaml")
    assert (told.code, told.err) == (0, "warning: the plugin way has no word for optimizer.type=AdamW\n")
    told = call("config", "convert", "z.yaml")
    del made["optimizer"]
    assert (told.code, json.loads(told.out)) == (0, made)


def test_a_file_is_not_written_over(call: Shell) -> None:
    (call.folder / "z.yaml").write_text("mine")
    for words in (("new", "z.yaml", "--stage", "1"), ("convert", "z.yaml", "-o", "z.yaml")):
        told = call("config", *words)
        assert (told.code, told.err.splitlines()[0]) == (2, "error: z.yaml: this file exists")
    assert (call.folder / "z.yaml").read_text() == "mine"
    assert call("config", "new", "z.yaml", "--stage", "1", "--force").code == 0


def test_a_kind_of_file_that_cannot_say_it_is_not_written(call: Shell) -> None:
    told = call("config", "new", "z.yaml", "--stage", "2", "--set", "aio.queue_depth=4")
    assert (told.code, told.err.splitlines()) == (
        2,
        [
            "error: z.yaml: such a file has no word for aio.queue_depth=4",
            "  next: write a DeepSpeed JSON (.json) instead",
        ],
    )
    assert not (call.folder / "z.yaml").exists()


@pytest.mark.parametrize("pair", ["zero_optimization", "=1", "a..b=1"])
def test_a_pair_that_is_none_is_refused(call: Shell, pair: str) -> None:
    told = call("run", "--set", pair, "train.py")
    assert (told.code, told.err.splitlines()[0]) == (2, f"error: --set: {pair!r} is no KEY=VALUE")


def test_a_job_file_says_what_the_command_line_does_not(call: Shell) -> None:
    (call.folder / "cluster.yaml").write_text(LOCAL)
    (call.folder / "train.py").write_text("")
    (call.folder / "job.yaml").write_text("script: train.py\nargs: [--epochs, '3']\nstage: 3\nenv: {A: b}\ngrace: 7\n")
    told = call("run", *AUTO, "--job", "job.yaml", "--stage", "2", "--dry-run", "--json")
    assert told.code == 0, told.err
    plan = json.loads(told.out)
    node = plan["nodes"]["here"]
    assert plan["notes"] == ["stage: 2 of the command line wins over 3 (job.yaml:3:1)"]
    assert node["accelerate"]["deepspeed_config"]["zero_stage"] == 2
    assert node["deepspeed"]["zero_optimization"]["stage"] == 2
    assert (node["launch"][-3:], node["environment"]["A"]) == (["train.py", "--epochs", "3"], "b")


def test_nodes_are_named_here_or_in_the_job_file(call: Shell) -> None:
    local = "{name: %s, host: localhost, transport: local}"
    nodes = ", ".join(local % name for name in ("one", "two", "three"))
    head = "name: lab\nengine: process\naccelerator: cpu\n"
    (call.folder / "cluster.yaml").write_text(f"{head}nodes: [{nodes}]\nspares: [three]\n")
    (call.folder / "train.py").write_text("")
    (call.folder / "job.yaml").write_text("script: train.py\nnodes: [two, one]\n")

    def ranks(*words: str) -> list[str]:
        told = call("run", *AUTO, *words, "--dry-run", "--json", "train.py")
        assert told.code == 0, told.err
        return list(json.loads(told.out)["nodes"])

    assert ranks() == ["one", "two"]
    assert ranks("--job", "job.yaml") == ["two", "one"]
    assert ranks("--job", "job.yaml", "--nodes", "three,one", "--nodes", "two") == ["three", "one", "two"]
    told = call("run", *AUTO, "--nodes", "one,four", "--dry-run", "train.py")
    assert (told.code, told.err) == (
        2,
        "error: --nodes: there is no node 'four'\n  next: the nodes are: one, two, three\n",
    )
    assert call("run", "--nodes", "one,one", "train.py").err.startswith("error: --nodes: the node one is named twice")
    (call.folder / "job.yaml").write_text("nodes: [two, four]\n")
    told = call("run", "--job", "job.yaml", "train.py")
    assert (told.code, told.err.splitlines()[0]) == (2, "error: job.yaml:1:14: there is no node 'four'")


def test_an_accelerate_yaml_of_the_users_own_gives_the_settings(call: Shell) -> None:
    (call.folder / "cluster.yaml").write_text(LOCAL)
    (call.folder / "train.py").write_text("")
    assert call("config", "new", "mine.yaml", "--stage", "3", "--precision", "bf16").code == 0
    told = call(
        "run", *AUTO, "--accelerate-config", "mine.yaml", "--accumulation", "4", "--dry-run", "--json", "train.py"
    )
    assert told.code == 0, told.err
    said = json.loads(told.out)["nodes"]["here"]["accelerate"]
    assert (said["mixed_precision"], said["deepspeed_config"]["zero_stage"]) == ("bf16", 3)
    assert said["deepspeed_config"]["gradient_accumulation_steps"] == 4


def test_stage_auto_takes_the_lowest_rung_that_fits_and_says_so(call: Shell) -> None:
    (call.folder / "cluster.yaml").write_text(LOCAL)
    (call.folder / "train.py").write_text("")
    told = call("run", *AUTO, "--stage", "auto", "--parameters", "1M", "--dry-run", "--json", "train.py")
    assert told.code == 0, told.err
    plan = json.loads(told.out)
    assert plan["notes"] == ["stage auto: DDP, the lowest rung that fits"]
    assert plan["nodes"]["here"]["accelerate"]["distributed_type"] == "MULTI_GPU"
    told = call("run", *AUTO, "--stage", "auto", "--parameters", "70B", "--dry-run", "train.py")
    assert (told.code, told.err.splitlines()[0][:51]) == (4, "error: --stage auto: no rung of the ladder fits: Ze")


def test_stage_auto_needs_a_model_and_the_job_file_may_name_it(call: Shell) -> None:
    (call.folder / "cluster.yaml").write_text(LOCAL)
    (call.folder / "train.py").write_text("")
    (call.folder / "job.yaml").write_text("stage: auto\nscript: train.py\n")
    told = call("run", *AUTO, "--job", "job.yaml", "--dry-run")
    assert (told.code, told.err.splitlines()[0][:34]) == (2, "error: --stage auto: which model? ")
    (call.folder / "job.yaml").write_text("stage: auto\nscript: train.py\nparameters: 1M\n")
    assert call("run", *AUTO, "--job", "job.yaml", "--dry-run").code == 0


AUTO = ("--port", "auto")  # somebody else may train on this machine
LOCAL = """\
name: lab
accelerator: cpu
engine: process
nodes:
  - {name: here, host: localhost, transport: local}
"""
