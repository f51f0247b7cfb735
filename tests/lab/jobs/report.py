"""Says what it was given: arguments, ranks, secrets, the places it may use."""

import json
import os
import sys
from pathlib import Path

places = {name: os.environ.get(name) for name in ("LAUNCHER_CHECKPOINTS", "LAUNCHER_NODE", "LAUNCHER_RUN")}
secret = os.environ.get("CANARY")
print(
    json.dumps(
        {
            "args": sys.argv[1:],
            "rank": int(os.environ["RANK"]),
            "world": int(os.environ["WORLD_SIZE"]),
            "places": places,
            "secret_length": len(secret) if secret else None,
            "environ": secret is not None and secret.encode() in Path("/proc/self/environ").read_bytes(),
            "uid": os.getuid(),
            "cwd": os.getcwd(),
        }
    ),
    flush=True,
)
if secret:
    print("the secret is", secret, flush=True)
