"""S10: a run with a secret, and all the places where that must not be found."""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.lab.conftest import Note, User, eventually
from tests.testbed import canary
from tests.testbed import lab as testbed

Run = Callable[..., str]


def here(*argv: str) -> str:
    """Run a command on this machine; what it wrote."""
    return subprocess.run(argv, capture_output=True, check=True).stdout.decode(errors="replace")


def there(node: str) -> Run:
    """The same on a node of the lab."""
    return lambda *argv: testbed.run(node, *argv)


def check_that_a_secret_is_nowhere(
    user: User, *, cluster: str, processes: int, nodes: Sequence[str], checkpoints: str, note: Note
) -> None:
    """Run a job that says and tells its secret, and look for it while it runs and afterwards.

    `nodes`: of the lab, none where this machine is the only one; `checkpoints`: the folder of the job's there.
    """
    word, planted = f"canary+{secrets.token_hex(8)}/", f"planted-{secrets.token_hex(8)}"
    began = time.time()
    handle, values = tempfile.mkstemp()  # neither in the project nor at home; its owner's alone
    with os.fdopen(handle, "w") as file:
        file.write(f"CANARY={word}\n")
    runs = {node: there(node) for node in nodes} or {"this machine": here}
    said = []
    for run in runs.values():
        run("rm", "-f", f"{checkpoints}/end")
        run("sh", "-c", 'echo "$1" >"$2"', "sh", planted, f"{checkpoints}/planted")
        assert run(*canary.search(planted, checkpoints, since=began)) == f"{checkpoints}/planted\n"
        run("rm", f"{checkpoints}/planted")
    with canary.sampled((word, planted), *nodes) as answers:
        canary.plant(planted, *nodes)
        options = ("--port", "auto", "--secret", "CANARY", "--secrets-file", values)
        running = user.begin("--debug", "run", "--json", *options, "jobs/secretive.py")
        holding = f" holding {len(word)} False\n".encode()
        eventually(lambda: running.poll() is not None or user.heard(holding) == processes, "all processes", seconds=300)
        for command in (("status",), ("status", "--json"), ("ls", "--json"), ("env", "--json"), ("--debug", "logs")):
            told = user.launcher(*command)
            said += [told.out, told.err]
        for run in runs.values():
            ours = ("--filter", f"label=launcher.cluster={cluster}", "--quiet")
            containers = run("docker", "ps", "--all", "--no-trunc", *ours).split()
            assert len(containers) == 2
            said += [run("docker", "inspect", one) for one in containers]
            said += [run("docker", "logs", one) + run("docker", "top", one) for one in containers]
            image = run("docker", "inspect", "-f", "{{.Image}}", containers[0]).strip()
            said += [run("docker", "history", "--no-trunc", image)]
        # On this machine other people's things lie beside Docker's.
        root = "/" if nodes else here("docker", "info", "-f", "{{.DockerRootDir}}").strip()
        found = {place: run(*canary.search(word, root, since=began)) for place, run in runs.items()}
        for run in runs.values():
            run("touch", f"{checkpoints}/end")
        end = user.end(running)
        said += [end.out, end.err]
    for run in runs.values():
        said += [run("docker", "events", "--since", f"{began:.0f}", "--until", f"{time.time():.0f}")]
    for command in (("logs",), ("ls", "--json"), ("status", "--json"), ("--debug", "attach")):
        told = user.launcher(*command)
        said += [told.out, told.err]

    # The run was what it should have been, and told it.
    assert end.code == 1, end.err
    assert "the token *** was refused" in end.err
    assert "Traceback" in end.err
    assert "as it is: *** base64: *** url: ***" in end.out
    # Whoever looked does see what is to be seen, and only that.
    assert set(answers) == {"this machine", *nodes}
    for place, answer in answers.items():
        assert answer.found == {(planted, "cmdline"), (planted, "environ")}, (place, answer.text)
    assert [text for text in said if word in text] == []
    Path(values).unlink()
    after = {f"{place}, after": run(*canary.search(word, root, since=began)) for place, run in runs.items()}
    found |= after | {"here": here(*canary.search(word, user.environment.get("HOME", str(user.home)), since=began))}
    assert {place: text for place, text in found.items() if text} == {}
    slowest = min(answers.values(), key=lambda one: one.rate)
    note("a secret is looked for in all processes", f"nothing; looks per second, at least: {slowest.rate:.0f}", 0.0)
