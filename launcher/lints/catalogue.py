"""Every lint there is: its id, its level, and what is always the same about it. docs/deepspeed-lints.md shows it.

An error cannot work, or silently does something else than it says. A warning works, and the user should know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["error", "warning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lint:
    """One finding. `where` is `path:line:col`, or the option that said it; `what` names the values."""

    id: str
    level: Level
    where: str
    what: str
    consequence: str
    cure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What all lints of one id share. `{…}` in the consequence and the cure are filled in for the one at hand."""

    id: str
    level: Level
    about: str
    consequence: str
    cure: str


def told(id_: str, *, where: str, what: str, **words: object) -> Lint:
    """A lint of the catalogue; `words` fill its consequence and its cure."""
    kind = KINDS[id_]
    return Lint(
        id=id_,
        level=kind.level,
        where=where,
        what=what,
        consequence=kind.consequence.format(**words),
        cure=kind.cure.format(**words),
    )


_ERRORS = """
== unknown-key
a key that DeepSpeed does not know
DeepSpeed {outcome}
{cure}
== misplaced-key
a key of another section
DeepSpeed {outcome}
move it {right}
== removed-key
a key of something that DeepSpeed no longer has
DeepSpeed refuses the file
remove it; what is gone: {gone}
== bfloat16-block
the old name bfloat16 for bf16
Accelerate does not see it and adds `bf16: {{enabled: false}}`, which wins: training is not in bf16
call the block bf16
== both-names
an old name of a key beside the new one
DeepSpeed refuses the file: "Cannot provide deprecated parameter … and replacing parameter … together"
remove {old}
== wrong-value
a value of the wrong kind, or out of range
DeepSpeed refuses it, or takes it for something else
write {right}
== aio-thread-count
aio.thread_count, which the documentation names
DeepSpeed never reads it: one thread does the reading and writing
write intra_op_parallelism: {count}
== zero-missing
no zero_optimization
Accelerate refuses the file: "Please specify the ZeRO optimization config in the DeepSpeed config."
add "zero_optimization": {{"stage": …}}; stage 0 is plain training
== batch-identity
batch sizes that do not multiply
DeepSpeed refuses them, after the model was built
{cure}
== batch-missing
neither train_batch_size nor train_micro_batch_size_per_gpu
DeepSpeed refuses the file: one of the two "needs to be provided"
add "train_micro_batch_size_per_gpu": the samples of one process in one step, or "auto"
== uneven-slots
nodes with different numbers of processes
Accelerate divides all processes evenly over the machines: some would be missing, and others have no GPU
give every node {fewest} slots
== auto-unfilled
"auto" that nobody fills
accelerator.prepare ends with "not found in kwargs. Please specify … without `auto`"
{cure}
== auto-silent
"auto" for which Accelerate takes a fixed value
it becomes {value}, silently
write the value that is meant
== nvme-below-stage-3
offloading to NVMe below ZeRO stage 3
DeepSpeed keeps the optimizer's states in the host's memory, as if the device were cpu
set the stage to 3, or the device to cpu
== offload-param-below-stage-3
offloading parameters below ZeRO stage 3
DeepSpeed ignores it: the parameters stay in the GPU's memory
set the stage to 3, or the device to none
== offload-without-zero
offloading the optimizer without ZeRO
DeepSpeed builds a CPU optimizer for parameters that are on the GPU, and it ends with an error at the first step
set the stage to 1, 2 or 3, or the device to none
== nvme-without-path
offloading to NVMe without a path
it swaps into the working directory, which in a container is the root disk
write "nvme_path": where the drive is mounted
== nvme-no-mount
an NVMe path that is no mount
it swaps into the container's own file system, on the root disk, which fills up
use a mounted path: {mounts}
== offload-ratio
offloading a part of the optimizer below ZeRO stage 3
DeepSpeed refuses it: "Partial offloading only supported for ZeRO Stage 3."
set the stage to 3, or leave the ratio out
== fp16-and-bf16
fp16 and bf16 at once
DeepSpeed refuses it
set "enabled": false in one of them
== fp16-on-cpu
fp16 without a GPU
DeepSpeed refuses it on most processors: "Type fp16 is not supported on your device."
on CPUs use bf16, or neither
== gds-on-cpu
GPUDirect Storage without a GPU
DeepSpeed refuses it
leave aio.use_gds out
== param-dtype
data_types.param_dtype that is not the precision of training
DeepSpeed refuses it
leave it out: it follows from fp16 and bf16
== accum-dtype-without-zero
gradients accumulated in another precision, without ZeRO
DeepSpeed ends with NotImplementedError
set the stage to 1, 2 or 3, or leave data_types.grad_accum_dtype out
== master-weights
16-bit master weights without what they need
DeepSpeed refuses them
{cure}
== optimizer-unknown
an optimizer that DeepSpeed does not know
DeepSpeed refuses it: "is not a supported DeepSpeed Optimizer"
use {right}
== optimizer-param
a parameter that the optimizer does not take
it ends with {error} when it is built
{cure}
== optimizer-untested
an optimizer that ZeRO was not tested with
DeepSpeed refuses it: "You are using an untested ZeRO Optimizer."
add "zero_allow_untested_optimizer": true, or use AdamW
== optimizer-not-offloadable
an optimizer that cannot be offloaded
it runs on the GPU only, and its states are on the CPU: it ends with an error at the first step
use AdamW, Adagrad or Lion, or do not offload the optimizer
== lamb-loss-scale
Lamb with a fixed loss scale
DeepSpeed refuses it: "requires dynamic loss scaling"
leave fp16.loss_scale out
== muon-reduce-scatter
Muon with reduce_scatter at ZeRO stage 3
DeepSpeed refuses it: "Muon and reduce scatter cannot be used together"
write "reduce_scatter": false in zero_optimization
== scheduler-unknown
a scheduler that neither DeepSpeed nor torch has
DeepSpeed refuses it: "does not recognize LR scheduler"
use {right}
== scheduler-param
parameters that the scheduler does not take, or misses
it ends with {error} when it is built
{cure}
== legacy-stage-1
legacy_stage1
DeepSpeed refuses it: it has been gone since 0.5.9
leave it out
== sum-gradients
gradient_allreduce_op sum where it is not supported
DeepSpeed refuses it
use "mean", or {cure}
== grad-norm
compute_grad_norm false where the norm is needed
DeepSpeed refuses it
{cure}
== predivide
dividing gradients beforehand, with reduce_scatter
DeepSpeed refuses it: "not yet supported with … reduce scatter enabled"
write "reduce_scatter": false in zero_optimization, or leave the key out
== secondary-partition
zero_hpz_partition_size that does not divide the processes
DeepSpeed refuses it
use the number of processes of one node
== autotuning
autotuning switched on
DeepSpeed measures some steps and then ends the job, with exit code 0
set autotuning.enabled to false
== accelerate-unknown-key
a key that Accelerate does not know
accelerate launch refuses the file: "had unknown keys"
{cure}
== accelerate-value
a value that Accelerate cannot take
accelerate launch or the job ends with an error, or takes it for something else
write {right}
== precision-unquoted
mixed_precision: no, without quotes
YAML reads it as false, and accelerate launch dies of it: "'bool' object has no attribute 'lower'"
write mixed_precision: "no"
== plugin-and-file
settings beside deepspeed_config_file that the file has to say
the job ends with an error: "the following accelerate config variables will be ignored"
write {right} into the DeepSpeed file, and leave it out here
== yaml-nvme-path
offloading to NVMe by the Accelerate YAML
Accelerate never hands a path on: DeepSpeed swaps to ./none in the working directory
use a DeepSpeed file, or set {variable} in the environment of the job
== multinode-launcher
several machines without deepspeed_multinode_launcher: standard
accelerate launch calls DeepSpeed's own launcher: without a hostfile each machine trains alone, unnoticed
write deepspeed_multinode_launcher: standard
== no-master
several machines without main_process_ip
they look for each other at "None"
write main_process_ip: the first machine's address
== port-by-chance
several machines with main_process_port: 0
each chooses a free port of its own, and they never meet
write one port for all, such as 29500
== uneven-processes
processes that do not divide evenly over the machines
accelerate launch rounds down: {consequence}
use a multiple of {machines}
== no-processes
no num_processes
accelerate launch refuses the file: "You need to manually pass in `--num_processes`"
write num_processes: all processes of all machines together
== machine-rank
a machine_rank that no machine has
the machines never meet
number the machines from 0 to {last}
== plugin-unknown-key
a key in deepspeed_config that the plugin does not have
Accelerate ignores it, silently
{cure}
== plugin-file-key
a key of a DeepSpeed file in deepspeed_config
Accelerate ignores it, silently: this block holds the plugin's own keys
{cure}
== plugin-clipping-zero
gradient_clipping: 0 in deepspeed_config
Accelerate drops it, and DeepSpeed clips at 1.0
use a DeepSpeed file with "gradient_clipping": 0, or write the norm that is meant
== msamp-at-stage-3
fp8 by MS-AMP at ZeRO stage 3
Accelerate refuses it: "MS-AMP is not supported for ZeRO Stage 3."
set zero_stage to 2, or fp8_config.backend to TE
== deepspeed-config-unused
deepspeed_config, and distributed_type is not DEEPSPEED
Accelerate trains without DeepSpeed
write distributed_type: DEEPSPEED, or remove deepspeed_config
"""

_WARNINGS = """
== deprecated-key
an old name of a key
DeepSpeed still takes it, but Accelerate looks only for the new one
write {right}
== batch-zero-init
a fixed train_batch_size beside an open train_micro_batch_size_per_gpu at ZeRO stage 3
a model that is built sharded (zero3_init_flag) takes 1 for the open one: `from_pretrained` ends with an error
write "train_batch_size": "auto", or give both
== auto-dataloader
"auto" that Accelerate fills from the script's DataLoader
without a DataLoader that has a batch_size, accelerator.prepare ends with an error
hand a DataLoader with a batch_size to accelerator.prepare, together with the model; or write numbers
== auto-accumulation
"auto" that Accelerate fills from the script's Accelerator
it becomes what Accelerator(gradient_accumulation_steps=…) says, else 1
say it in the script, or write a number
== auto-hidden-size
"auto" that Accelerate fills from the model's config
with a model that has no config.hidden_size or config.hidden_sizes, accelerator.prepare ends with an error
give the model a config with hidden_size, or write numbers
== auto-optimizer
"auto" that Accelerate fills from the script's DummyOptim
it becomes what accelerate.utils.DummyOptim is given; its own defaults are lr 0.001 and weight_decay 0
give lr and weight_decay to DummyOptim in the script, or write numbers
== auto-scheduler
"auto" that Accelerate fills from the script's DummyScheduler
without one, or without its total_num_steps where that is "auto", accelerator.prepare ends with an error
give total_num_steps and warmup_num_steps to accelerate.utils.DummyScheduler, or write numbers
== auto-trainer
"auto" that only the Trainer of transformers fills as it was meant
with any other script {outcome}
write the value, unless the script uses the Trainer
== nvme-path-unused
nvme_path without device nvme
DeepSpeed does not look at it
set the device to nvme, or remove the path
== stage-3-key
a key of ZeRO stage 3 below it
DeepSpeed does not look at it
set the stage to 3, or remove it
== moe-leaf-below-stage-3
MoE leaf classes below ZeRO stage 3
they have no effect: nothing is fetched layer by layer
set the stage to 3, or remove them
== no-gather
ZeRO stage 3 without gathering the weights on save
save_pretrained and get_state_dict end with "Cannot get 16bit model weights"
write {right}: true, or save checkpoints only and export them later
== optimizer-in-file
an optimizer in the DeepSpeed file
the script must hand accelerate.utils.DummyOptim to accelerator.prepare: an optimizer of its own is refused
make a DummyOptim in the script (the Trainer of transformers does), or remove "optimizer" from the file
== scheduler-in-file
a scheduler in the DeepSpeed file
the script must hand accelerate.utils.DummyScheduler to accelerator.prepare: a scheduler of its own is refused
make a DummyScheduler in the script (the Trainer of transformers does), or remove "scheduler" from the file
== optimizer-replaced
the optimizer is offloaded, and the script makes it
Accelerate puts DeepSpeedCPUAdam in its place, whatever it is (but CPUAdagrad for Adagrad)
nothing, if the script makes Adam or AdamW; else "zero_force_ds_cpu_optimizer": false, or an "optimizer" in the file
== optimizer-slow
an offloaded optimizer that is not one of DeepSpeed's for the CPU
torch's own runs on the CPU, several times slower
use AdamW, Adagrad or Lion, without torch_adam, and leave zero_force_ds_cpu_optimizer as it is
== elastic-checkpoint
elastic_checkpoint at ZeRO stage 3
DeepSpeed ignores it
remove it; universal checkpoints change the number of processes
== steps-per-print
steps_per_print
Accelerate sets it to infinity: DeepSpeed prints nothing
remove it, and print in the script
== clipping-default
no gradient_clipping
DeepSpeed clips at 1.0
{cure}
== monitor-package
a monitor whose package is not in the image
the job ends with an error where it is missing
add {package} to the image, or set {section}.enabled to false
== node-local-checkpoints
several nodes without checkpoint.use_node_local_storage
without a shared folder only the first node writes the model's part of a checkpoint, and the others cannot resume
write "checkpoint": {{"use_node_local_storage": true}}, if the nodes share no folder
== accelerate-ignored-key
a key of the Accelerate YAML that accelerate launch does not read
it stays at {value}
{cure}
== no-port
several machines without main_process_port
all take 29500, which may be in use
write main_process_port
== zero3-init-below-stage-3
zero3_init_flag below ZeRO stage 3
Accelerate warns, and ignores it
set zero_stage to 3, or remove it
== launcher-keys-unused
a hostfile or filter for DeepSpeed's own launcher
nobody reads it with the launcher standard
remove it
"""


def _read(text: str, level: Level) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for block in text.strip().removeprefix("== ").split("\n== "):
        name, about, consequence, cure = block.splitlines()
        kinds[name] = Kind(id=name, level=level, about=about, consequence=consequence, cure=cure)
    return kinds


KINDS: Mapping[str, Kind] = MappingProxyType(_read(_ERRORS, "error") | _read(_WARNINGS, "warning"))
