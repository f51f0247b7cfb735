"""Holds its secret, says it in every spelling, and ends with an error that tells it."""

import base64
import os
import time
from pathlib import Path
from urllib.parse import quote

secret = os.environ["CANARY"]
print("as it is:", secret, "base64:", base64.b64encode(secret.encode()).decode(), "url:", quote(secret, safe=""))
print("holding", len(secret), secret.encode() in Path("/proc/self/environ").read_bytes(), flush=True)
end = Path(os.environ["LAUNCHER_CHECKPOINTS"], "end")
while not end.exists():
    time.sleep(0.1)
raise ValueError(f"the token {secret} was refused")
