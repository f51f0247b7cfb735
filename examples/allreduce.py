"""How fast the processes of a cluster add up their gradients: an all-reduce of growing size, as nccl-tests prints it.

    launcher run examples/allreduce.py                      all GPUs of all nodes
    launcher run --nodes gpu-01,gpu-02 examples/allreduce.py --largest 1G
    accelerate launch --cpu examples/allreduce.py --largest 16M

One line for each size: the bytes of the tensor, the median time, the algorithm's bandwidth (bytes / time), and the bus
bandwidth, which is that times 2 (n - 1) / n: what every link has to carry, to be compared with what the network or
NVLink can do, whatever the number of processes n (nccl-tests, doc/PERFORMANCE.md). Every result is checked. The
figure of the slowest process counts, as a training step waits for it, too.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from accelerate import PartialState

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size(text: str) -> int:
    """Bytes, of `64K`, `16M` or a plain number."""
    return int(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else int(text)


def seconds(tensor: torch.Tensor, state: PartialState, *, rounds: int) -> float:
    """The median time of one all-reduce of this tensor on the slowest process."""
    taken = []
    for _ in range(rounds):
        dist.barrier()
        wait(state)
        began = time.perf_counter()
        dist.all_reduce(tensor)
        wait(state)
        taken.append(time.perf_counter() - began)
    slowest = torch.tensor([statistics.median(taken)], device=state.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def wait(state: PartialState) -> None:
    """A GPU works on after the call has returned."""
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure all-reduce over all processes.")
    parser.add_argument("--smallest", type=size, default="64K", help="bytes, with K, M or G (default 64K)")
    parser.add_argument("--largest", type=size, default="256M", help="bytes (default 256M)")
    parser.add_argument("--rounds", type=int, default=10, help="how often each size (default 10)")
    asked = parser.parse_args()

    state = PartialState()
    count = state.num_processes
    if count < 2:
        raise SystemExit("allreduce: one process has nobody to add up with; two or more are needed")
    state.print(f"all-reduce over {count} processes, {dist.get_backend()}, float32")
    state.print(f"{'bytes':>12} {'time us':>12} {'alg GB/s':>10} {'bus GB/s':>10}")
    number = asked.smallest
    while number <= asked.largest:
        tensor = torch.zeros(max(1, number // 4), device=state.device)
        seconds(tensor, state, rounds=2)  # the first of a size opens connections
        tensor.fill_(state.process_index + 1)
        dist.all_reduce(tensor)
        if not bool((tensor == count * (count + 1) / 2).all()):
            raise SystemExit(f"allreduce: process {state.process_index} got a wrong sum of {number} bytes")
        tensor.zero_()
        took = seconds(tensor, state, rounds=asked.rounds)
        speed = number / took / 1e9
        state.print(f"{number:12} {took * 1e6:12.1f} {speed:10.3f} {speed * 2 * (count - 1) / count:10.3f}")
        number *= 4
    state.destroy_process_group()


if __name__ == "__main__":
    main()
