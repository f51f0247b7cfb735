"""What `accelerate launch` makes of its YAML and its flags, asked of its own code. One test per fact."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.oracle

YAML: dict[str, object] = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "mixed_precision": "no",
    "use_cpu": False,
    "debug": False,
    "num_machines": 2,
    "num_processes": 4,
    "machine_rank": 1,
    "main_process_ip": "10.0.0.1",
    "main_process_port": 29501,
    "main_training_function": "main",
    "deepspeed_config": {"zero_stage": 3, "deepspeed_multinode_launcher": "standard"},
}


def without(*keys: str, **changes: object) -> dict[str, object]:
    return {key: value for key, value in YAML.items() if key not in keys} | changes


def deepspeed(**settings: object) -> dict[str, object]:
    return without(deepspeed_config={"zero_stage": 3, "deepspeed_multinode_launcher": "standard"} | settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def load(config: dict[str, object] | str, folder: Path) -> Any:
    """As accelerate reads the file."""
    from accelerate.commands.config.config_args import load_config_from_file

    path = folder / "accelerate.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False))
    return load_config_from_file(str(path))


def parsed(config: dict[str, object] | str, folder: Path, *flags: str) -> argparse.Namespace:
    """As `accelerate launch` understands file and flags together, up to the choice of a launcher."""
    from accelerate.commands import launch

    load(config, folder)
    words = ["--config_file", str(folder / "accelerate.yaml"), *flags, "job.py"]
    args, defaults, precision_from_file = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(words)
    )
    fields = [*(defaults.deepspeed_config or {}), *(["mixed_precision"] if precision_from_file else [])]
    args.deepspeed_fields_from_accelerate_config = ",".join(fields)
    assert isinstance(args, argparse.Namespace)
    return args


def prepared(config: dict[str, object], folder: Path, *flags: str) -> tuple[Any, argparse.Namespace, dict[str, str]]:
    """The command (None: torchrun), torchrun's arguments, and the job's environment."""
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    args = parsed(config, folder, *flags)
    command, env = prepare_deepspeed_cmd_env(args)
    return command, args, env


class TestFact1:
    def test_an_unquoted_no_is_false_and_launch_dies_of_it(self, folder: Path) -> None:
        text = yaml.safe_dump(YAML).replace("mixed_precision: 'no'", "mixed_precision: no")
        assert load(text, folder).mixed_precision is False
        with pytest.raises(AttributeError, match="'bool' object has no attribute 'lower'"):
            prepared(yaml.safe_load(text), folder)

    def test_a_quoted_no_is_a_word(self, folder: Path) -> None:
        assert load(YAML, folder).mixed_precision == "no"


class TestFact2:
    IGNORED = without(rdzv_backend="c10d", same_network=True, enable_cpu_affinity=True, downcast_bf16="yes")

    def test_four_keys_of_the_file_are_ignored(self, folder: Path) -> None:
        args = parsed(self.IGNORED, folder)
        assert (args.rdzv_backend, args.same_network, args.enable_cpu_affinity) == ("static", False, False)
        assert args.downcast_bf16 is False

    def test_as_flags_they_count(self, folder: Path) -> None:
        flags = ("--rdzv_backend", "c10d", "--same_network", "--enable_cpu_affinity", "--downcast_bf16")
        args = parsed(YAML, folder, *flags)
        assert (args.rdzv_backend, args.same_network, args.enable_cpu_affinity) == ("c10d", True, True)
        assert args.downcast_bf16 is True

    def test_same_network_and_c10d_leave_no_endpoint(self, folder: Path) -> None:
        _command, args, _env = prepared(YAML, folder, "--rdzv_backend", "c10d", "--same_network")
        assert not getattr(args, "rdzv_endpoint", "")

    def test_same_network_and_static_name_the_master(self, folder: Path) -> None:
        _command, args, _env = prepared(YAML, folder, "--rdzv_backend", "static", "--same_network")
        assert (args.master_addr, args.master_port) == ("10.0.0.1", "29501")
        assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "2", 1)


class TestFact3:
    NVME = deepspeed(
        offload_optimizer_device="nvme",
        offload_optimizer_nvme_path="/nvme/a",
        offload_param_device="nvme",
        offload_param_nvme_path="/nvme/b",
    )

    def test_the_nvme_paths_of_the_file_never_reach_the_job(self, folder: Path) -> None:
        _command, _args, env = prepared(self.NVME, folder)
        assert {key: value for key, value in env.items() if key.startswith("ACCELERATE_DEEPSPEED_OFFLOAD")} == {
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme",
        }

    @pytest.mark.parametrize("path", [None, "/nvme/a"])
    def test_two_variables_that_nobody_sets_carry_them(self, monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
        from accelerate import DeepSpeedPlugin

        for what in ("OPTIMIZER", "PARAM"):
            monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "nvme")
            if path is not None:
                monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_NVME_PATH", path)
        zero = DeepSpeedPlugin(zero_stage=3).deepspeed_config["zero_optimization"]
        assert zero["offload_optimizer"]["nvme_path"] == zero["offload_param"]["nvme_path"] == (path or "none")


class TestFact4:
    def test_without_standard_two_machines_become_a_hostfile_that_is_none(self, folder: Path) -> None:
        command, _args, _env = prepared(without(deepspeed_config={"zero_stage": 3}), folder)
        assert command[:3] == ["deepspeed", "--hostfile", "None"]

    def test_standard_is_torchrun(self, folder: Path) -> None:
        assert prepared(YAML, folder)[0] is None


class TestFact6:
    def test_seven_processes_on_two_machines_are_three_each(self, folder: Path) -> None:
        assert prepared(without(num_processes=7), folder)[1].nproc_per_node == "3"

    def test_a_missing_address_is_called_none(self, folder: Path) -> None:
        assert prepared(without("main_process_ip"), folder)[1].rdzv_endpoint == "None:29501"

    def test_unknown_deepspeed_keys_pass(self, folder: Path) -> None:
        assert load(deepspeed(zero_stag=2), folder).deepspeed_config["zero_stag"] == 2


class TestFact8:
    def test_an_unknown_key_raises(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"unknown keys.*num_machine'"):
            load(without(num_machine=2), folder)

    def test_the_keys_are_these(self) -> None:
        from dataclasses import fields

        from accelerate.commands.config.config_args import ClusterConfig

        assert {field.name for field in fields(ClusterConfig)} == {
            "command_file",
            "commands",
            "compute_environment",
            "debug",
            "deepspeed_config",
            "distributed_type",
            "downcast_bf16",
            "dynamo_config",
            "enable_cpu_affinity",
            "fp8_config",
            "fsdp_config",
            "gpu_ids",
            "machine_rank",
            "main_process_ip",
            "main_process_port",
            "main_training_function",
            "megatron_lm_config",
            "mixed_precision",
            "mpirun_config",
            "num_machines",
            "num_processes",
            "parallelism_config",
            "rdzv_backend",
            "same_network",
            "tpu_env",
            "tpu_name",
            "tpu_use_cluster",
            "tpu_use_sudo",
            "tpu_vm",
            "tpu_zone",
            "use_cpu",
        }


class TestFact11:
    def test_torchrun_waits_fifteen_minutes_for_a_missing_node(self) -> None:
        from torch.distributed.launcher.api import LaunchConfig

        assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).rdzv_configs["timeout"] == 900

    def test_the_static_rendezvous_reads_timeout_and_not_join_timeout(self) -> None:
        assert rendezvous_timeout(timeout="60") == 60
        assert rendezvous_timeout(timeout="60", join_timeout="30") == 60


def rendezvous_timeout(**config: Any) -> float:
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import create_rdzv_handler

    asked = RendezvousParameters("static", "127.0.0.1:29501", "run", 1, 1, None, rank=0, **config)
    return float(create_rdzv_handler(asked).timeout.total_seconds())


class TestFact12:
    @pytest.mark.parametrize("key", ["rdzv_conf", "max_restarts", "monitor_interval", "log_dir", "tee"])
    def test_these_are_flags_only(self, folder: Path, key: str) -> None:
        with pytest.raises(ValueError, match="unknown keys"):
            load(without(**{key: 1}), folder)
        assert hasattr(parsed(YAML, folder), key)


class TestFact13:
    EVERY: dict[str, object] = {  # noqa: RUF012 - a constant
        "zero_stage": 3,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "none",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,
        "deepspeed_moe_layer_cls_names": "Moe",
    }

    def test_each_setting_reaches_the_job_by_its_variable(self, folder: Path) -> None:
        _command, _args, env = prepared(deepspeed(**self.EVERY), folder)
        mine = {key: value for key, value in env.items() if key.startswith("ACCELERATE_")}
        assert mine == {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_MIXED_PRECISION": "no",
            "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,deepspeed_multinode_launcher,gradient_accumulation_steps,"
            "gradient_clipping,offload_optimizer_device,offload_param_device,zero3_init_flag,zero3_save_16bit_model,"
            "deepspeed_moe_layer_cls_names,mixed_precision",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
            "ACCELERATE_GRADIENT_CLIPPING": "0.5",
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
            "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
            "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "Moe",
        }


class TestPlainTraining:
    """Stage 0 goes through torchrun only as MULTI_GPU, with or without a GPU, for any number of processes."""

    @pytest.mark.parametrize("processes", [1, 2])
    def test_multi_gpu_of_the_file_needs_no_gpu(self, folder: Path, processes: int) -> None:
        plain = without("deepspeed_config", distributed_type="MULTI_GPU", num_machines=1, num_processes=processes)
        assert parsed(plain | {"machine_rank": 0}, folder).multi_gpu is True

    @pytest.mark.parametrize("kind", ["MULTI_CPU", "NO"])
    def test_multi_cpu_would_leave_torchrun(self, folder: Path, kind: str) -> None:
        args = parsed(without("deepspeed_config", distributed_type=kind), folder)
        assert not any((args.multi_gpu, args.use_deepspeed, args.use_fsdp, args.tpu, args.use_megatron_lm))


class TestLints:
    """What the lints of an Accelerate YAML stand on (launcher/lints/accelerate.py)."""

    def test_the_keys_are_these_and_two_of_old_files(self) -> None:
        from dataclasses import fields

        from accelerate.commands.config.config_args import ClusterConfig

        from launcher.lints import accelerate as ours

        assert {field.name for field in fields(ClusterConfig)} | {"fp16", "dynamo_backend"} == set(ours.KEYS)

    @pytest.mark.parametrize("key", ["tpu_use_cluster", "tpu_use_sudo"])
    def test_two_more_keys_are_ignored(self, folder: Path, key: str) -> None:
        assert getattr(parsed(without(**{key: True}), folder), key) is False

    def test_what_is_ignored_stays_at_these_values(self, folder: Path) -> None:
        from launcher.lints import accelerate as ours

        args = parsed(YAML, folder)
        assert {key: getattr(args, key) for key in ours.IGNORED} == {
            key: value for key, (value, _cure) in ours.IGNORED.items()
        }

    def test_flags_are_refused_as_keys(self, folder: Path) -> None:
        from launcher.lints import accelerate as ours

        for key in ours.FLAGS_ONLY:
            with pytest.raises(ValueError, match="unknown keys"):
                load(without(**{key: 1}), folder)

    def test_the_plugin_has_these_keys(self) -> None:
        """Those that `accelerate launch` knows as flags about DeepSpeed."""
        from accelerate.commands import launch

        from launcher.lints import accelerate as ours

        parser = launch.launch_command_parser()
        group = next(one for one in parser._action_groups if one.title == "DeepSpeed Arguments")
        assert {action.dest for action in group._group_actions} == set(ours.PLUGIN)

    def test_these_may_not_stand_beside_a_file(self) -> None:
        import ast
        import inspect
        import textwrap

        from accelerate import DeepSpeedPlugin

        from launcher.lints import accelerate as ours

        tree = ast.parse(textwrap.dedent(inspect.getsource(DeepSpeedPlugin._deepspeed_config_checks)))
        names = {one.value for node in ast.walk(tree) if isinstance(node, ast.List) for one in node.elts}  # type: ignore[attr-defined]
        fields = {name.replace("ACCELERATE_", "").replace("DEEPSPEED_", "").lower() for name in names}
        assert fields == {*ours.OVERLAP, "mixed_precision"}

    def test_every_one_of_them_becomes_that_key_of_the_file(self) -> None:
        from accelerate import DeepSpeedPlugin

        from launcher.lints import accelerate as ours
        from tests.oracle.test_deepspeed_keys import tree_values

        assert set(ours.OVERLAP.values()) == tree_values(DeepSpeedPlugin.__post_init__, "plugin_to_config_mapping")

    def test_without_num_processes_launch_refuses_the_file(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="You need to manually pass in `--num_processes`"):
            parsed(without("num_processes"), folder)

    def test_without_a_kind_launch_refuses_the_file(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="A `distributed_type` must be specified"):
            load(without("distributed_type"), folder)

    def test_a_port_of_zero_is_another_on_every_machine(self, folder: Path) -> None:
        ports = {prepared(without(main_process_port=0), folder)[1].main_process_port for _ in range(4)}
        assert len(ports) > 1

    def test_a_port_left_out_is_29500(self, folder: Path) -> None:
        assert prepared(without("main_process_port"), folder)[1].rdzv_endpoint == "10.0.0.1:29500"

    def test_the_precisions_are_these(self) -> None:
        from accelerate.utils import PrecisionType

        from launcher.lints import accelerate as ours

        assert set(PrecisionType.list()) == set(ours.PRECISIONS)

    def test_deepspeed_settings_without_deepspeed_are_not_used(self, folder: Path) -> None:
        assert parsed(without(distributed_type="MULTI_GPU"), folder).use_deepspeed is False

    def test_sharded_building_below_stage_3_is_warned_of_and_dropped(self) -> None:
        from accelerate import DeepSpeedPlugin

        with pytest.warns(UserWarning, match="only applicable for ZeRO Stage 3"):
            assert DeepSpeedPlugin(zero_stage=2, zero3_init_flag=True).zero3_init_flag is False

    def test_the_standard_launcher_reads_no_hostfile(self, folder: Path) -> None:
        command, args, env = prepared(deepspeed(deepspeed_hostfile="/etc/hosts"), folder)
        assert command is None
        assert "/etc/hosts" not in env.values()
        assert args.deepspeed_hostfile == "/etc/hosts"

    def test_fp8_by_msamp_is_refused_at_stage_3(self, folder: Path) -> None:
        from accelerate import DeepSpeedPlugin

        assert parsed(without(fp8_config={"backend": "MSAMP"}), folder).fp8_backend == "MSAMP"
        with pytest.raises(NotImplementedError, match="MS-AMP is not supported for ZeRO Stage 3"):
            DeepSpeedPlugin(zero_stage=3, enable_msamp=True)
