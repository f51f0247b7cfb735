"""Meets once, and then every process is on its own: one that dies is missed by nobody but the guards."""

import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

accelerator = Accelerator()
accelerator.reduce(torch.ones(1), reduction="sum")
print("ready", flush=True)
if len(sys.argv) > 1 and accelerator.process_index == int(sys.argv[1]):
    while not Path("/checkpoints/eat").exists():
        time.sleep(0.1)
    eaten = []
    while True:
        eaten.append(bytearray(16 << 20))
time.sleep(600)
