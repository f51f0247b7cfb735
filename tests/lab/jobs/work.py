"""Goes on until it is stopped: every process meets every other one ten times a second."""

import sys
import time

import torch
from accelerate import Accelerator

accelerator = Accelerator()
ones = torch.ones(1)
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
for step in range(steps):
    total = accelerator.reduce(ones, reduction="sum")
    if accelerator.is_main_process:
        print(f"step {step} of {int(total)} processes", flush=True)
    time.sleep(0.1)
accelerator.end_training()
