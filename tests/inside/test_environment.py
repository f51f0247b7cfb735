"""environment.py as the node container runs it: from standard input, alone, and where hardly anything is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.inside.conftest import INSIDE

VARIABLES = {
    "NCCL_DEBUG": "INFO",
    "HF_TOKEN": "hf_canary",
    "LAUNCHER_SECRETS": "/run/secrets/canary",
    "HF_ENDPOINT": "https://ada:canary@mirror.example/hf",
    "LAUNCHER_NODE": "gpu-01",
    "EDITOR": "canary",
}


def told(*flags: str) -> dict[str, Any]:
    answer = subprocess.run(
        [sys.executable, *flags, "-"],
        input=(INSIDE / "environment.py").read_bytes(),
        env={"PATH": os.environ["PATH"], **VARIABLES},
        capture_output=True,
        check=True,
    )
    assert b"canary" not in answer.stdout
    return dict(json.loads(answer.stdout))


def test_without_any_library_the_machine_is_told_and_the_rest_is_unknown() -> None:
    report = told("-I", "-S")  # no site-packages
    sections = ["versions", "gpus", "ops", "machine", "limits", "variables", "accelerate env"]
    assert list(report) == sections
    missing = {name for name in sections if str(report[name].get("error", "")).startswith("unknown: ModuleNotFoundErr")}
    assert missing == {"versions", "gpus", "ops", "accelerate env"}
    assert report["machine"]["cpus"] == os.cpu_count()
    assert report["machine"]["memory"].endswith(" GiB")
    assert report["limits"]["uid"] == os.getuid()
    assert report["limits"]["shared memory"].endswith(" GiB")


def test_variables_are_told_without_their_secrets_and_without_what_is_nobodys_business() -> None:
    assert told("-I", "-S")["variables"] == {
        "HF_ENDPOINT": "https://***@mirror.example/hf",
        "HF_TOKEN": "***",
        "LAUNCHER_SECRETS": "***",
        "NCCL_DEBUG": "INFO",
        "PATH": os.environ["PATH"],
    }
