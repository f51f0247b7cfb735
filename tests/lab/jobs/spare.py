"""Goes on until its run is started again; then it says who is there, and ends."""

import os
import time

import torch
from accelerate import Accelerator

accelerator = Accelerator()
while True:
    total = accelerator.reduce(torch.ones(1), reduction="sum")
    print(f"{int(total)} processes", flush=True)
    if "LAUNCHER_RESTART" in os.environ:
        break
    time.sleep(0.1)
print(f"rank {accelerator.process_index} is on {os.environ['LAUNCHER_NODE']}", flush=True)
accelerator.end_training()
