"""Every key that DeepSpeed 0.19.8 reads from its configuration, and what it takes there. Data; judges no file.

tests/oracle/test_deepspeed_keys.py holds it against DeepSpeed's own classes: a new version of DeepSpeed is told by a
failing test. Documented at https://www.deepspeed.ai/docs/config-json/, but not all of it, and not all of it right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

VERSION = "0.19.8"
Path: TypeAlias = tuple[str, ...]

# One section after another: `[where]`, then a word that says what happens to a key that is not in the table
# (`refuses`: DeepSpeed ends with an error; `ignores`: silently; `open`: any key may stand there), then its keys.
#
# A key's kind: bool, int (or a float without a fraction), num, text, name (text, not empty), list, map, any, null,
# never (for code), or the words that are allowed, with | between them (~ before: in any case). A bound follows (>0,
# >=0, >=1, or an interval as in mathematics), then `?` where null may stand. `= name`: the same key has a second name.
# `-> name`: deprecated.
_TABLE = """
[] ignores
train_batch_size int>0?
train_micro_batch_size_per_gpu int>0?
gradient_accumulation_steps int>0
managed_gradient_accumulation bool
steps_per_print num>0?
dump_state bool
disable_python_gc bool
disable_allgather bool
communication_data_type ~fp16|bf16|fp32?
seq_parallel_communication_data_type ~fp16|bf16|fp32?
prescale_gradients bool
gradient_predivide_factor num
gradient_allreduce_op ~mean|sum
gradient_clipping num>=0
zero_optimization map
zero_allow_untested_optimizer bool
zero_force_ds_cpu_optimizer bool
fp16 map
bf16 map
bfloat16 map -> bf16
torch_autocast map
optimizer map
scheduler map
wall_clock_breakdown bool
memory_breakdown bool
activation_checkpointing map
comms_logger map
tensorboard map
wandb map
csv_monitor map
comet map
flops_profiler map
autotuning map
use_data_before_expert_parallelism bool
hybrid_engine map
pipeline map
data_efficiency map
checkpoint map
data_types map
aio map?
dataloader_drop_last bool
log_level text?
datastates_ckpt any
weight_quantization map
compile map
timers map
tensor_parallel map
expert_parallel map
msamp map
vocabulary_size int>0?
sequence_parallel_size int>0
data_parallel_size int>0

[zero_optimization] refuses
stage int[0,3]
contiguous_gradients bool
reduce_scatter bool
reduce_bucket_size int>0
use_multi_rank_bucket_allreduce bool
allgather_partitions bool
allgather_bucket_size int>=0
overlap_comm bool?
compute_grad_norm bool
load_from_fp32_weights bool
elastic_checkpoint bool
offload_param map?
offload_optimizer map?
zenflow map?
sub_group_size int>=0
cpu_offload_param bool? -> offload_param
cpu_offload_use_pin_memory bool? -> offload_param or offload_optimizer
cpu_offload bool? -> offload_optimizer
stage3_prefetch_bucket_size int>=0 = prefetch_bucket_size
stage3_param_persistence_threshold int>=0 = param_persistence_threshold
stage3_model_persistence_threshold int>=0 = model_persistence_threshold
stage3_max_live_parameters int>=0 = max_live_parameters
stage3_max_reuse_distance int>=0 = max_reuse_distance
stage3_gather_16bit_weights_on_model_save bool = gather_16bit_weights_on_model_save
stage3_module_granularity_threshold int = module_granularity_threshold
stage3_use_all_reduce_for_fetch_params bool = use_all_reduce_for_fetch_params
stage3_allgather_sequential bool = allgather_sequential
stage3_gather_fp16_weights_on_model_save bool -> gather_16bit_weights_on_model_save
ignore_unused_parameters bool
legacy_stage1 bool
round_robin_gradients bool
parameter_alignment bool
zero_hpz_partition_size int>=0
zero_quantized_weights bool
zero_quantized_nontrainable_weights bool
zero_quantized_gradients bool
memory_efficient_linear bool
pipeline_loading_checkpoint bool
override_module_apply bool
log_trace_cache_warnings bool
enable_sanity_checks bool
save_muon_momentum_buffer_in_memory bool
leaf_module map

[zero_optimization.offload_param] refuses
device none|cpu|nvme
nvme_path text?
buffer_count int>=0
buffer_size int>=0
max_in_cpu int>=0
pin_memory bool

[zero_optimization.offload_optimizer] refuses
device none|cpu|nvme
nvme_path text?
buffer_count int>=0
pin_memory bool
pipeline_read bool
pipeline_write bool
fast_init bool
ratio num[0,1]
super_offload bool
cpuadam_cores_perc num[0,1]

[zero_optimization.zenflow] refuses
topk_ratio num(0,1)
select_strategy auto|step|epoch
select_interval auto|int
update_interval auto|int>=1
overlap_step bool
offload bool
auto_ratio num[0,1]
full_warm_up_rounds int
pt_reserved_cores_perc num[0,1]
steps_per_epoch int?

[zero_optimization.leaf_module] refuses
classes list
names list
name_suffixes list

[fp16] refuses
enabled bool
auto_cast bool
loss_scale num>=0
initial_scale_power int
loss_scale_window int>0
hysteresis int
consecutive_hysteresis bool
min_loss_scale int>0
fp16_master_weights_and_grads bool

[bf16] refuses
enabled bool
immediate_grad_update bool
check_grad_overflow bool
bf16_master_weights_and_grads bool
bf16_optimizer_states bool

[torch_autocast] ignores
enabled bool
dtype torch.float16|fp16|float16|half|torch.float32|fp32|float32|float|torch.int8|int8|torch.bfloat16|bf16|bfloat16
lower_precision_safe_modules list

[optimizer] ignores
type text
params map
legacy_fusion bool

[scheduler] ignores
type text
params map

[activation_checkpointing] ignores
partition_activations bool
number_checkpoints int?
contiguous_memory_optimization bool
synchronize_checkpoint_boundary bool
profile bool
cpu_checkpointing bool

[comms_logger] refuses
enabled bool
prof_all bool
prof_ops list
verbose bool
debug bool

[tensorboard] refuses
enabled bool
output_path text
job_name text

[wandb] refuses
enabled bool
group text?
team text?
project text

[csv_monitor] refuses
enabled bool
output_path text
job_name text

[comet] refuses
enabled bool
samples_log_interval int
project text?
workspace text?
api_key text?
experiment_name text?
experiment_key text?
online bool?
mode text?

[flops_profiler] ignores
enabled bool
recompute_fwd_factor num
profile_step int
module_depth int
top_modules int
detailed bool
output_file text?

[autotuning] ignores
enabled bool
fast bool
results_dir name
exps_dir name
overwrite bool
start_profile_step int
end_profile_step int
metric text
metric_path text?
tuner_type text
tuner_early_stopping int
tuner_num_trials int
arg_mappings map?
model_info map?
model_info_path text?
mp_size int
max_train_batch_size int?
min_train_batch_size int
max_train_micro_batch_size_per_gpu int
min_train_micro_batch_size_per_gpu int
num_tuning_micro_batch_sizes int

[autotuning.arg_mappings] open

[autotuning.model_info] ignores
profile bool
num_params int?
hidden_size int?
num_layers int?

[hybrid_engine] refuses
enabled bool
max_out_tokens int>0
inference_tp_size int
release_inference_cache bool
pin_parameters bool
tp_gather_partition_size int
enable_cuda_graph bool

[pipeline] ignores
stages any
partition text
seed_layers bool
activation_checkpoint_interval int>=0
pipe_partitioned bool
grad_partitioned bool
use_reentrant bool

[data_efficiency] ignores
enabled bool
seed int
data_sampling map
data_routing map

[data_efficiency.data_sampling] ignores
enabled bool
num_epochs int
num_workers int
pin_memory bool
curriculum_learning map
dynamic_batching map

[data_efficiency.data_sampling.curriculum_learning] open

[data_efficiency.data_sampling.dynamic_batching] ignores
enabled bool
metrics_path text
lr_scaling_method linear|sqrt|none
min_batch_size int
max_batch_size int
sequence_picking_order random|seqlen|dataloader
max_tokens int
verbose bool

[data_efficiency.data_routing] ignores
enabled bool
random_ltd map

[data_efficiency.data_routing.random_ltd] open

[checkpoint] ignores
tag_validation ~warn|ignore|fail
load_universal bool
use_node_local_storage bool
parallel_write map
checkpoint_serialization bool
writer map?

[checkpoint.parallel_write] ignores
pipeline_stage bool

[checkpoint.writer] ignores
type ~mock|python|fast?
io_buffer_size int
io_buffer_double bool
show_statistics bool
data_parallel ~replica|socket|machine?
decoupled bool
io_multiplier int

[data_types] ignores
grad_accum_dtype torch.float16|fp16|float16|half|torch.float32|fp32|float32|float|torch.bfloat16|bf16|bfloat16?
param_dtype torch.float16|fp16|float16|half|torch.float32|fp32|float32|float|torch.bfloat16|bf16|bfloat16?
buffer_dtype torch.float16|fp16|float16|half|torch.float32|fp32|float32|float|torch.bfloat16|bf16|bfloat16?
keep_in_fp32_modules auto|list

[aio] ignores
block_size int>0
queue_depth int>0
intra_op_parallelism int>0
single_submit bool
overlap_events bool
use_gds bool

[datastates_ckpt] open

[msamp] open

[weight_quantization] refuses
enabled bool
num_bits int
q_type asymmetric|symmetric
q_groups int
quantized_initialization map
post_init_quant map

[weight_quantization.quantized_initialization] open

[weight_quantization.post_init_quant] open

[compile] refuses
deepcompile bool
autoep_non_moe bool
free_activation bool
free_activation_threshold int
offload_activation bool
offload_activation_pin_memory bool
offload_opt_states bool
double_buffer bool
symmetric_memory bool
debug_log bool
offload_parameters bool
sync_before_reduce bool
sync_after_reduce bool
sync_before_allgather bool
sync_after_allgather bool
keep_int_input_tensors bool
keep_all_input_tensors bool
passes list?

[timers] ignores
throughput map

[timers.throughput] refuses
enabled bool
synchronized bool

[tensor_parallel] refuses
dtype never
autotp_size int>=0
tp_overlap_comm bool
vocab_parallel_lm_head bool?
vocab_parallel_ce_backend torch|liger
tp map = tensor_parallel
injection_policy_tuple list?
partition_config map?
preset_model text?
keep_module_on_host bool
kernel_inject bool = replace_with_kernel_inject

[tensor_parallel.tp] refuses
tp_size int
tp_grain_size int
mpu any
tp_group any

[tensor_parallel.partition_config] open

[expert_parallel] ignores
enabled bool
autoep_size int>0
expert_tensor_parallel_size int>0
validate_folding_routing bool
async_split_plan bool
preset_model text?
moe_layer_pattern text?
expert_pattern text?
router_pattern text?
use_grouped_mm bool
disable_triton_grouped_mm bool
route_norm bool?
route_scale num
score_apply auto|pre|post
combine_impl auto|weighted_sum|fused_weighted_sum|legacy_bmm
row_weighting_impl auto|eager|fused
gate_up_impl separate|fused
comm_backend comm|deepep
comm_num_sm int>0
comm_qp_margin int>=0
comm_max_tokens_per_rank int>=0
num_expert_groups int>0?
num_limited_groups int>0?
score_func auto|softmax|sigmoid
top_k auto|int
load_balance_coeff null
routed_scaling_factor auto|num
expert_w1 text?
expert_w2 text?
expert_w3 text?
num_experts_attr text?
top_k_attr text?
has_shared_experts bool?
shared_experts_pattern text?
shared_experts_gate_pattern text?
expert_activation text?
"""

# What DeepSpeed ends with an error over, since what they asked for is gone.
REMOVED: Mapping[Path, str] = MappingProxyType(
    {
        ("nebula",): "Nebula checkpoints",
        ("compression_training",): "the compression library",
        ("amp",): "Apex AMP; use fp16, bf16 or torch_autocast",
        ("quantize_training",): "Mixture-of-Quantization",
        ("sparse_gradients",): "the flag; embeddings made with sparse=True need none",
        ("eigenvalue",): "eigenvalues for Mixture-of-Quantization",
        ("sparse_attention",): "sparse attention",
        ("elasticity",): "elastic training; set the batch sizes themselves",
        ("graph_harvesting",): "graph harvesting",
        ("curriculum_learning",): "the old place; use data_efficiency.data_sampling.curriculum_learning",
        ("progressive_layer_drop",): "progressive layer dropping",
        ("zero_optimization", "mics_shard_size"): "MiCS",
        ("zero_optimization", "mics_hierarchical_params_gather"): "MiCS",
        ("zero_optimization", "zeropp_loco_param"): "LoCo for ZeRO++",
    }
)

# The optimizers that DeepSpeed makes, which it knows in any case: the parameters that each takes on the GPU, and where
# the optimizer is offloaded (`-`: it cannot be; `*`: any). Those of a library that is not in the image take any.
_MADE = """
adam lr betas eps weight_decay bias_correction amsgrad set_grad_none torch_adam adam_w_mode fp32_optimizer_states
adam/offloaded lr betas eps weight_decay bias_correction amsgrad torch_adam adam_w_mode fp32_optimizer_states
adamw lr betas eps weight_decay bias_correction amsgrad set_grad_none torch_adam adam_w_mode fp32_optimizer_states
adamw/offloaded lr betas eps weight_decay bias_correction amsgrad torch_adam adam_w_mode fp32_optimizer_states
adagrad lr lr_decay weight_decay initial_accumulator_value eps foreach maximize differentiable fused
adagrad/offloaded lr eps weight_decay amsgrad fp32_optimizer_states
lamb lr betas eps weight_decay bias_correction eps_inside_sqrt max_coeff min_coeff amsgrad
lamb/offloaded -
lion lr betas weight_decay set_grad_none
lion/offloaded lr betas weight_decay fp32_optimizer_states
muon lr betas eps weight_decay momentum ns_method muon_lr adam_lr per_head_muon adam_w_mode torch_adam \
  fp32_optimizer_states foreach
muadam *
muadamw *
musgd *
"""
# What torch_adam: true makes of adam and adamw, and what torch.optim has besides, in exactly these letters.
_TORCH = """
Adam lr betas eps weight_decay amsgrad foreach maximize capturable differentiable fused decoupled_weight_decay
AdamW lr betas eps weight_decay amsgrad maximize foreach capturable differentiable fused
ASGD lr lambd alpha t0 weight_decay foreach maximize differentiable capturable
Adadelta lr rho eps weight_decay foreach capturable maximize differentiable
Adafactor lr beta2_decay eps d weight_decay foreach maximize
Adamax lr betas eps weight_decay foreach maximize differentiable capturable
LBFGS lr max_iter max_eval tolerance_grad tolerance_change history_size line_search_fn
NAdam lr betas eps weight_decay momentum_decay decoupled_weight_decay foreach maximize capturable differentiable
RAdam lr betas eps weight_decay decoupled_weight_decay foreach maximize capturable differentiable
RMSprop lr alpha eps weight_decay momentum centered capturable foreach maximize differentiable
Rprop lr etas step_sizes capturable foreach maximize differentiable
SGD lr momentum dampening weight_decay nesterov maximize foreach differentiable fused
SparseAdam lr betas eps maximize
"""
# DeepSpeed's schedules, then torch's that a file can describe; `!`: it must be given.
_SCHEDULES = """
LRRangeTest lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase
OneCycle cycle_min_lr! cycle_max_lr! decay_lr_rate cycle_first_step_size cycle_second_step_size \
  cycle_first_stair_count cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom \
  decay_mom_rate
WarmupLR warmup_min_lr warmup_max_lr warmup_num_steps warmup_type
WarmupDecayLR total_num_steps! warmup_min_lr warmup_max_lr warmup_num_steps warmup_type
WarmupCosineLR total_num_steps! warmup_min_ratio warmup_num_steps cos_min_ratio warmup_type
ConstantLR factor total_iters
CosineAnnealingLR T_max! eta_min
CosineAnnealingWarmRestarts T_0! T_mult eta_min
CyclicLR base_lr! max_lr! step_size_up step_size_down mode gamma scale_fn scale_mode cycle_momentum base_momentum \
  max_momentum
ExponentialLR gamma!
LinearLR start_factor end_factor total_iters
MultiStepLR milestones! gamma
OneCycleLR max_lr! total_steps epochs steps_per_epoch pct_start anneal_strategy cycle_momentum base_momentum \
  max_momentum div_factor final_div_factor three_phase
PolynomialLR total_iters power
ReduceLROnPlateau mode factor patience threshold threshold_mode cooldown min_lr eps
StepLR step_size! gamma
"""
# The ZeRO stages take these optimizers without zero_allow_untested_optimizer.
TESTED = frozenset({"adam", "adamw", "adagrad", "lion", "muon"})
# Names that DeepSpeed once had, or that people write for what it has.
OPTIMIZER_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "fusedadam": "AdamW: DeepSpeed takes FusedAdam for it on the GPU",
        "cpuadam": "AdamW: DeepSpeed takes its CPUAdam for it where the optimizer is offloaded",
        "deepspeedcpuadam": "AdamW: DeepSpeed takes its CPUAdam for it where the optimizer is offloaded",
        "fusedlamb": "Lamb",
        "fusedlion": "Lion",
        "onebitadam": f"AdamW: the 1-bit optimizers are gone from DeepSpeed {VERSION}",
        "onebitlamb": f"Lamb: the 1-bit optimizers are gone from DeepSpeed {VERSION}",
        "zerooneadam": f"AdamW: the 1-bit optimizers are gone from DeepSpeed {VERSION}",
    }
)

Filler: TypeAlias = Literal["dataloader", "accumulation", "hidden-size", "optimizer", "scheduler", "trainer"]
# Who fills an "auto": Accelerate with what the script gives it, or only transformers' Trainer.
FILLED: Mapping[str, Filler] = MappingProxyType(
    {
        "train_batch_size": "dataloader",
        "train_micro_batch_size_per_gpu": "dataloader",
        "gradient_accumulation_steps": "accumulation",
        "zero_optimization.reduce_bucket_size": "hidden-size",
        "zero_optimization.stage3_prefetch_bucket_size": "hidden-size",
        "zero_optimization.stage3_param_persistence_threshold": "hidden-size",
        "optimizer.params.lr": "optimizer",
        "optimizer.params.weight_decay": "optimizer",
        "optimizer.params.betas": "trainer",
        "optimizer.params.eps": "trainer",
        "scheduler.params.warmup_min_lr": "scheduler",
        "scheduler.params.warmup_max_lr": "scheduler",
        "scheduler.params.warmup_num_steps": "scheduler",
        "scheduler.params.total_num_steps": "scheduler",
    }
)
# What Accelerate fills in without asking anybody, where the launch says nothing: the value, and whether the Trainer
# has a better one.
DEFAULTED: Mapping[str, tuple[object, bool]] = MappingProxyType(
    {
        "zero_optimization.stage": (2, False),
        "zero_optimization.offload_optimizer.device": ("none", False),
        "zero_optimization.offload_optimizer.nvme_path": ("none", False),
        "zero_optimization.offload_param.device": ("none", False),
        "zero_optimization.offload_param.nvme_path": ("none", False),
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": (False, False),
        "gradient_clipping": (1.0, True),
        "fp16.enabled": (False, True),
        "bf16.enabled": (False, True),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key. `words` are the texts that are allowed; `also` is its second name, `instead` what has replaced it."""

    name: str
    kind: str
    low: float = -math.inf
    high: float = math.inf
    closed: tuple[bool, bool] = (True, True)
    words: tuple[str, ...] = ()
    any_case: bool = False
    null: bool = False
    also: str | None = None
    instead: str | None = None

    def refuses(self, value: object) -> str | None:
        """What the value must be, where it is not; "auto" is for others to judge."""
        if value is None:
            return None if self.null or self.kind in ("any", "null") else self.must_be
        if isinstance(value, str) and self._is_word(value):
            return None
        return None if self._fits(value) else self.must_be

    def _is_word(self, text: str) -> bool:
        return (text.lower() if self.any_case else text) in self.words

    def _fits(self, value: object) -> bool:
        if self.kind in ("int", "num") and isinstance(value, int | float) and not isinstance(value, bool):
            whole = self.kind == "num" or isinstance(value, int) or value.is_integer()
            above = self.low <= value if self.closed[0] else self.low < value
            return whole and above and (value <= self.high if self.closed[1] else value < self.high)
        return {
            "any": True,
            "bool": isinstance(value, bool),
            "text": isinstance(value, str),
            "name": isinstance(value, str) and value != "",
            "list": isinstance(value, list | tuple),
            "map": isinstance(value, Mapping),
        }.get(self.kind, False)

    @property
    def must_be(self) -> str:
        """In words: `true or false`, `a whole number above 0`."""
        kinds = {
            "bool": "true or false",
            "int": "a whole number",
            "num": "a number",
            "text": "text",
            "list": "a list",
            "map": "an object in braces",
            "any": "any value",
            "null": "null",
            "name": "text that is not empty",
            "never": "nothing: a file cannot say it",
        }
        said = ([kinds[self.kind] + self._bounds()] if self.kind in kinds else []) + [f'"{one}"' for one in self.words]
        *others, last = said
        return f"{', '.join(others)} or {last}" if others else last

    def _bounds(self) -> str:
        if self.high < math.inf:
            return f" between {self.low:g} and {self.high:g}" + ("" if all(self.closed) else ", neither of them")
        if self.low > -math.inf:
            return f" of at least {self.low:g}" if self.closed[0] else f" above {self.low:g}"
        return ""


Rest: TypeAlias = Literal["refuses", "ignores", "open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The keys of one object. `rest` is what happens to any other key in it."""

    rest: Rest
    keys: Mapping[str, Key]


_KINDS = ("bool", "int", "num", "text", "list", "map", "any", "null", "never", "name")
_LINE = re.compile(r"(?P<name>\w+) (?P<kind>\S+?)(?P<null>\?)?(?: = (?P<also>\w+))?(?: -> (?P<instead>.+))?")
_KIND = re.compile(
    r"(?P<word>.+?)(?:(?P<more>>=?)(?P<least>\d)|(?P<open>[\[(])(?P<low>\d),(?P<high>\d)(?P<close>[\])]))?"
)


def _read_table(table: str) -> Mapping[Path, Section]:
    sections: dict[Path, Section] = {}
    for block in table.strip().split("\n\n"):
        head, *lines = block.splitlines()
        where, _, rest = head.partition(" ")
        keys = [key for line in lines for key in _read_line(line)]
        path = tuple(part for part in where.strip("[]").split(".") if part)
        sections[path] = Section(rest=rest, keys={key.name: key for key in keys})  # type: ignore[arg-type]
    return MappingProxyType(sections)


def _read_line(line: str) -> tuple[Key, ...]:
    found = _LINE.fullmatch(line)
    assert found is not None, line
    *words, last = found["kind"].removeprefix("~").split("|")
    kind = _KIND.fullmatch(last)
    assert kind is not None, line
    if kind["word"] not in _KINDS:
        words.append(last)
    key = Key(
        name=found["name"],
        kind=kind["word"] if kind["word"] in _KINDS else "word",
        low=float(kind["least"] or kind["low"] or -math.inf),
        high=float(kind["high"] or math.inf),
        closed=(kind["more"] != ">" and kind["open"] != "(", kind["close"] != ")"),
        words=tuple(words),
        any_case=found["kind"].startswith("~"),
        null=bool(found["null"]),
        also=found["also"],
        instead=found["instead"],
    )
    return (key,) if key.also is None else (key, replace(key, name=key.also, also=key.name))


def _read_words(table: str) -> Mapping[str, tuple[str, ...]]:
    lines = (line.split() for line in table.replace("\\\n", "").strip().splitlines())
    return MappingProxyType({name: tuple(words) for name, *words in lines})


SECTIONS = _read_table(_TABLE)
MADE, TORCH, SCHEDULES = _read_words(_MADE), _read_words(_TORCH), _read_words(_SCHEDULES)


def optimizer_params(name: str, *, offloaded: bool, torch_adam: bool = False) -> tuple[str, ...] | None:
    """The parameters that an optimizer takes: `("*",)` any, `()` it cannot be offloaded, None: there is none such."""
    known = name.lower()
    if torch_adam and known in ("adam", "adamw"):
        return ("torch_adam", "adam_w_mode", "fp32_optimizer_states", *TORCH["AdamW"])
    if known not in MADE:
        return TORCH.get(name)
    params = MADE.get(f"{known}/offloaded", MADE[known]) if offloaded else MADE[known]
    return () if params == ("-",) else params


def places_of(name: str) -> tuple[str, ...]:
    """Where else a key of this name is read: the dotted sections, the nearest to the top first; `` is the top."""
    found = (path for path, section in SECTIONS.items() if name in section.keys)
    return tuple(".".join(path) for path in sorted(found, key=len))
