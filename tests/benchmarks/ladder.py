"""The ladder beside real runs: predicted and measured bytes, and whether the lowest rung that fits is found.

    nice python -m tests.benchmarks.ladder [--configurations 50] [--seed 1] [--cuda] [--write FILE.md]

Each configuration is a model, a batch and a recipe, drawn by the seed. It is simulated once, as `launcher plan` does,
and trained for real on every rung that stays on the device (DDP, ZeRO-1, 2, 3), and every fourth also with offload to
the CPU: two processes over gloo on this machine's CPUs, see tests/testbed/training.py. Measured are the tensors at rest
and the most that a process took. With --cuda one process trains on this machine's GPU instead, larger models, and what
torch's allocator gave out is measured. What was measured is kept in --kept, so that a run can go on where it ended.

The lowest rung: for each configuration `BUDGETS` amounts of memory are drawn between the least and the most that its
rungs took; on each the rung that really fits first is compared with the one that is predicted to. With --cgroup a
sample of runs is done once more in a memory cgroup: at what was predicted they must live, at less than what was
measured they must be killed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from subprocess import Popen
from typing import Any

from launcher.memory import STAGE_3, Cluster, Host, Place, Recipe, Rung, Weight, weigh
from launcher.model import Model, read_simulation
from tests.testbed import training

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2
RUNGS = (Rung(stage=0), Rung(stage=1), Rung(stage=2), Rung(stage=3))
OFFLOADING = (
    Rung(stage=2, optimizer_on="cpu"),
    Rung(stage=3, optimizer_on="cpu"),
    Rung(stage=3, optimizer_on="cpu", params_on="cpu"),
)
BUDGETS = 8
# What a process grows by that is no tensor (modules, hooks, buffers of gloo), and what kernels take for themselves:
# set once, by other configurations (seed 0) than those that are reported.
PROCESS = 12 << 20
SLACK = 0.01
CUDA_SLACK = 0.01  # the allocator rounds up

PLAIN = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding({vocabulary}, {width})
        layer = nn.TransformerEncoderLayer({width}, {heads}, 4 * {width}, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, {depth}, enable_nested_tensor=False)
        self.head = nn.Linear({width}, {vocabulary})

    def forward(self, ids):
        return self.head(self.layers(self.embed(ids)))

def make():
    return Model()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A question of inside/simulate.py, and a recipe."""

    name: str
    question: dict[str, Any]
    recipe: dict[str, Any]
    processes: int = PROCESSES

    def settings(self, rung: Rung) -> dict[str, Any]:
        offload = [name for name, on in (("optimizer", rung.optimizer_on), ("param", rung.params_on)) if on == "cpu"]
        return {
            "model": self.question,
            "recipe": self.recipe,
            "stage": rung.stage,
            "offload": offload,
            "processes": self.processes,
            "steps": 3,  # DDP arranges its buckets anew in the second, ZeRO-3 prefetches from the second on
        }


def generate(seed: int, count: int, *, cuda: bool = False) -> Iterator[Configuration]:
    """Configurations, the same for the same seed; for a GPU four times as wide, with eight times the tokens."""
    dice = random.Random(seed)  # noqa: S311 - not for secrets
    for number in range(count):
        family = dice.choice(["gpt2", "llama", "plain"])
        width, depth = 64 * dice.randint(4, 9), dice.randint(2, 6)
        vocabulary = 4000 * dice.randint(2, 8)
        if cuda:
            width, depth = 512 * dice.randint(2, 4), depth * 2
        question: dict[str, Any] = {
            "micro_batch": dice.randint(1, 3),
            "sequence": 32 * dice.randint(2, 4),
            "checkpointing": dice.random() < 0.25 and family != "plain",
            "precision": dice.choice(["no", "no", "no", "bf16"]),
        }
        if cuda:
            question |= {"sequence": 4 * question["sequence"], "micro_batch": 2 * question["micro_batch"]}
            question["precision"] = dice.choice(["no", "bf16"])
        elif question["precision"] == "bf16":  # twenty times slower on a CPU that knows no bf16
            question |= {"micro_batch": 1, "sequence": 64}
        recipe: dict[str, Any] = {
            "reduce_bucket_size": int(10 ** dice.uniform(6, 7.5)),
            "accumulation": dice.choice([1, 1, 1, 2]),
            "persistence_threshold": dice.choice([0, 10_000, 100_000]),
            "prefetch_bucket_size": dice.choice([0, 1_000_000, 50_000_000]),
            "max_reuse_distance": dice.choice([0, 5_000_000, 1_000_000_000]),
            "sub_group_size": dice.choice([1_000_000, 1_000_000_000]),
        }
        name = f"{family} {depth} x {width}"
        heads = width // 128 if cuda else 4
        question |= shape(family, width=width, depth=depth, heads=heads, vocabulary=vocabulary)
        processes = 1 if cuda else PROCESSES
        yield Configuration(name=f"{number + 1}: {name}", question=question, recipe=recipe, processes=processes)


def shape(family: str, *, width: int, depth: int, heads: int, vocabulary: int) -> dict[str, Any]:
    """The model, as a question says it."""
    if family == "plain":
        return {"code": PLAIN.format(width=width, depth=depth, heads=heads, vocabulary=vocabulary), "function": "make"}
    if family == "gpt2":
        own = {"n_layer": depth, "n_embd": width, "n_head": heads, "vocab_size": vocabulary, "n_positions": 512}
        return {"config": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **own}}
    own = {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "intermediate_size": 64 * round(width * 8 / 3 / 64),
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
    }
    return {"config": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **own}}


# Predicting and measuring


def predict(model: Model, configuration: Configuration, rung: Rung) -> Weight:
    """What the rung takes of this machine."""
    host = Host(name="here", gpus=configuration.processes, gpu_memory=0, memory=0)
    cuda = configuration.processes == 1
    process, slack = (0, CUDA_SLACK) if cuda else (PROCESS, SLACK)
    machines = Cluster(hosts=(host,), cpu=not cuda, context=0, process=process, slack=slack)
    optimizer = "cpuadam" if rung.optimizer_on == "cpu" else "adamw"
    recipe = Recipe(precision=configuration.question["precision"], optimizer=optimizer, **configuration.recipe)
    return weigh(rung, model, recipe, machines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run: bytes of one process."""

    configuration: Configuration
    rung: Rung
    states: tuple[int, int]  # predicted, measured
    peak: tuple[int, int]

    @property
    def error(self) -> float:
        """Of the peak, as a share of what was measured; below zero it was underestimated."""
        return self.peak[0] / self.peak[1] - 1

    @property
    def states_error(self) -> float:
        """Of the tensors at rest."""
        return self.states[0] / self.states[1] - 1


def rows(configurations: Sequence[Configuration], kept: Path, *, jobs: int = 1, cuda: bool = False) -> Iterator[Row]:
    """Every run, `jobs` configurations at a time; what is kept is not done again."""
    known = {}
    if kept.exists():
        for line in kept.read_text().splitlines():
            settings, measured = json.loads(line)
            known[json.dumps(settings, sort_keys=True)] = measured
    idle: SimpleQueue[Popen[str]] = SimpleQueue()

    def run(number: int, configuration: Configuration) -> list[Row]:
        server = idle.get()
        try:
            return list(runs(server, configuration, OFFLOADING if number % 4 == 0 else (), known, kept))
        finally:
            idle.put(server)

    with ExitStack() as servers, ThreadPoolExecutor(jobs) as pool:
        for _ in range(jobs):
            idle.put(servers.enter_context(training.start(cuda=cuda)))
        for done in pool.map(run, range(len(configurations)), configurations):
            yield from done


def runs(
    server: Popen[str], configuration: Configuration, more: Sequence[Rung], known: dict[str, Any], kept: Path
) -> Iterator[Row]:
    """All rungs of one configuration."""
    model = read_simulation(training.ask(server, {"simulate": configuration.question}), where="simulation")
    for rung in (*RUNGS, *more):
        settings = configuration.settings(rung)
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            known[key] = training.ask(server, settings)
            with kept.open("a") as file:
                file.write(json.dumps([settings, known[key]]) + "\n")
        if isinstance(known[key], dict):
            sys.stdout.write(f"{configuration.name} {rung.name}: {known[key]['error']}\n")
            continue
        yield row(configuration, rung, predict(model, configuration, rung), known[key])


def row(configuration: Configuration, rung: Rung, weight: Weight, measured: list[dict[str, Any]]) -> Row:
    """What was predicted beside what was measured of the process that took the most."""
    places: tuple[Place, ...] = ("gpu",) if configuration.processes == 1 else ("gpu", "cpu")
    buckets = sum(part.bytes for part in weight.parts if part.name == "buckets" and part.lasting)
    # DDP's are no tensors of Python; ZeRO-3's has its whole size, of which a CPU pays for what is filled.
    whole = Recipe(precision=configuration.question["precision"]).item * configuration.recipe["reduce_bucket_size"]
    kept = {0: 0, STAGE_3: whole}.get(rung.stage, buckets)
    return Row(
        configuration=configuration,
        rung=rung,
        states=(
            sum(map(weight.states, places)) - buckets + kept,
            max(one["states"] for one in measured),
        ),
        peak=(sum(map(weight.on, places)), max(one["peak"] for one in measured)),
    )


# The lowest rung


def choices(found: Sequence[Row], seed: int) -> Iterator[tuple[Rung | None, Rung | None]]:
    """The rung that is predicted to fit first, and the one that does, for every budget."""
    dice = random.Random(seed)  # noqa: S311 - not for secrets
    by_name: dict[str, list[Row]] = {}
    for one in found:
        if one.rung in RUNGS:
            by_name.setdefault(one.configuration.name, []).append(one)
    for mine in by_name.values():
        measured = [one.peak[1] for one in mine]
        for _ in range(BUDGETS):
            budget = math.exp(dice.uniform(math.log(min(measured) * 0.95), math.log(max(measured) * 1.05)))
            yield (
                next((one.rung for one in mine if one.peak[0] <= budget), None),
                next((one.rung for one in mine if one.peak[1] <= budget), None),
            )


# A cgroup as the judge


def judged(found: Sequence[Row], group: Path, count: int) -> Iterator[tuple[Row, bool, bool]]:
    """Runs that are done once more under a limit: whether they lived at the prediction, and died below the measured.

    The limit is of both processes together, over what they hold that have trained something tiny.
    """
    group.mkdir()
    try:
        with training.start() as server:
            for one in found[:: max(1, len(found) // count)][:count]:
                settings = {**one.configuration.settings(one.rung), "cgroup": str(group)}
                enough = training.ask(server, {**settings, "limit": PROCESSES * one.peak[0]})
                little = training.ask(server, {**settings, "limit": int(PROCESSES * one.peak[1] * 0.9)})
                yield one, isinstance(enough, list), isinstance(little, dict)
    finally:
        group.rmdir()


# The report


def summary(found: Sequence[Row], seed: int) -> dict[str, float]:
    """The figures."""
    errors = [one.error for one in found]
    picks = list(choices(found, seed))
    return {
        "runs": len(found),
        "configurations": len({one.configuration.name for one in found}),
        "states, largest error": max(abs(one.states_error) for one in found),
        "peak, mean error": statistics.fmean(abs(error) for error in errors),
        "peak, largest error above": max(errors),
        "peak, largest error below": min(0.0, *errors),
        "underestimated": sum(error < 0 for error in errors),
        "lowest rung right": sum(ours == theirs for ours, theirs in picks) / len(picks),
        "budgets": len(picks),
    }


def figures(found: dict[str, float]) -> str:
    """The figures for the eyes."""
    return "\n".join(
        f"- {name}: {value if isinstance(value, int) else f'{value:.2%}'}" for name, value in found.items()
    )


def table(found: Sequence[Row]) -> str:
    """By rung."""
    lines = [
        "| rung | runs | states, largest error | peak, mean error | least | most | underestimated |",
        "|---|---|---|---|---|---|---|",
    ]
    for rung in (*RUNGS, *OFFLOADING):
        mine = [one for one in found if one.rung == rung]
        if mine:
            errors = [one.error for one in mine]
            lines.append(
                f"| {rung.name} | {len(mine)} | {max(abs(one.states_error) for one in mine):.2%} "
                f"| {statistics.fmean(map(abs, errors)):.1%} | {min(errors):+.1%} | {max(errors):+.1%} "
                f"| {sum(error < 0 for error in errors)} |"
            )
    return "\n".join(lines)


EVERY = """\
| model | batch x sequence | rung | states: predicted, MB | measured | peak: predicted, MB | measured | error |
|---|---|---|---|---|---|---|---|
"""


def line(one: Row) -> str:
    """One run."""
    question, recipe = one.configuration.question, one.configuration.recipe
    how = f"{question['micro_batch']} x {question['sequence']}, {question['precision']}"
    how += ", checkpointing" * question["checkpointing"] + f", x{recipe['accumulation']}" * (recipe["accumulation"] > 1)
    return (
        f"| {one.configuration.name} | {how} | {one.rung.name} | {one.states[0] / 1e6:.1f} | {one.states[1] / 1e6:.1f} "
        f"| {one.peak[0] / 1e6:.1f} | {one.peak[1] / 1e6:.1f} | {one.error:+.1%} |"
    )


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description="The ladder beside real runs.")
    parser.add_argument("--configurations", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cuda", action="store_true", help="train on this machine's GPU, one process each")
    parser.add_argument("--jobs", type=int, default=1, help="how many configurations are measured at a time")
    parser.add_argument("--kept", type=Path, help="default: build/ladder-{cpu,cuda}.jsonl")
    parser.add_argument("--cgroup", type=Path, help="a memory cgroup to be made, as /sys/fs/cgroup/memory/ladder")
    parser.add_argument("--judged", type=int, default=12, help="how many runs are done once more in it")
    parser.add_argument("--write", type=Path, help="append what is printed to this file, as Markdown")
    given = parser.parse_args()
    kept = given.kept or Path("build", f"ladder-{'cuda' if given.cuda else 'cpu'}.jsonl")
    kept.parent.mkdir(parents=True, exist_ok=True)
    found = []
    wanted = list(generate(given.seed, given.configurations, cuda=given.cuda))
    for one in rows(wanted, kept, jobs=given.jobs, cuda=given.cuda):
        found.append(one)
        sys.stdout.write(line(one) + "\n")
        sys.stdout.flush()
    report = table(found) + "\n\n" + figures(summary(found, given.seed)) + "\n"
    if given.cgroup:
        verdicts = list(judged(found, given.cgroup, given.judged))
        lived, died = sum(one[1] for one in verdicts), sum(one[2] for one in verdicts)
        report += f"In a cgroup: {lived} of {len(verdicts)} lived, {died} of {len(verdicts)} were killed.\n"
    sys.stdout.write(report)
    if given.write:
        with given.write.open("a") as page:
            page.write(report + "\n" + EVERY + "\n".join(map(line, found)) + "\n")


if __name__ == "__main__":
    main()
