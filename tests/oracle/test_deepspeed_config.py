"""What Accelerate's DeepSpeed plugin and DeepSpeed's config class accept, drop and invent. One test per fact."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.oracle

FILE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
}


def plugin(**settings: Any) -> Any:
    from accelerate import DeepSpeedPlugin

    return DeepSpeedPlugin(**settings)


def zero_config(**settings: Any) -> Any:
    from deepspeed.runtime.zero.config import get_zero_config

    return get_zero_config({"zero_optimization": settings})


class TestAccelerateFact7:
    """A DeepSpeed file and overlapping settings."""

    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps(FILE))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
        return path

    @pytest.mark.parametrize(
        "key", ["mixed_precision", "zero_stage", "gradient_accumulation_steps", "zero3_save_16bit_model"]
    )
    @pytest.mark.usefixtures("file")
    def test_from_the_yaml_they_raise_inside_the_job(self, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
        monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", f"deepspeed_config_file,{key}")
        with pytest.raises(ValueError, match=f"config variables will be ignored:.*'{key}'"):
            plugin()

    @pytest.mark.parametrize("key", ["zero3_init_flag", "deepspeed_multinode_launcher"])
    @pytest.mark.usefixtures("file")
    def test_these_two_may_stand_beside_the_file(self, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
        monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", f"deepspeed_config_file,{key}")
        assert plugin().zero_stage == 3

    @pytest.mark.usefixtures("file")
    def test_as_flags_they_are_silently_ignored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        assert plugin().deepspeed_config["zero_optimization"]["stage"] == 3


class TestAccelerateFact10:
    def test_zero_3_needs_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import accelerate.utils.imports

        monkeypatch.setitem(sys.modules, "transformers", None)
        monkeypatch.setattr(accelerate.utils.imports, "is_transformers_available", lambda: False)
        with pytest.raises(Exception, match="pip install transformers"):
            plugin(zero_stage=3, zero3_init_flag=True).set_deepspeed_weakref()


class TestClipping:
    def test_clipping_left_out_is_auto_and_accelerate_fills_in_one(self) -> None:
        import inspect

        from accelerate import Accelerator

        assert plugin(zero_stage=2).deepspeed_config["gradient_clipping"] == "auto"
        assert '"gradient_clipping": 1.0' in inspect.getsource(Accelerator._prepare_deepspeed)

    def test_zero_is_no_clipping(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.0")
        assert "gradient_clipping" not in plugin(zero_stage=2).deepspeed_config


class TestDeepSpeedFact2:
    def test_parameter_offload_below_stage_3_passes_unnoticed(self) -> None:
        assert zero_config(stage=2, offload_param={"device": "cpu"}).offload_param.device == "cpu"

    @pytest.mark.parametrize("what", ["offload_optimizer", "offload_param"])
    def test_nvme_without_a_path_passes_unnoticed(self, what: str) -> None:
        assert getattr(zero_config(stage=3, **{what: {"device": "nvme"}}), what).nvme_path is None


class TestDeepSpeedFact3:
    @pytest.mark.parametrize("wrong", [{"stag": 3}, {"stage": 4}, {"stage": 3, "offload_param": {"device": "disk"}}])
    def test_the_zero_section_refuses_what_it_does_not_know(self, wrong: dict[str, Any]) -> None:
        from pydantic import ValidationError

        with pytest.raises(ValidationError):
            zero_config(**wrong)

    def test_an_auto_that_nobody_filled_becomes_the_default(self) -> None:
        assert zero_config(stage=3, reduce_bucket_size="auto").reduce_bucket_size == int(5e8)

    def test_aio_reads_intra_op_parallelism_and_not_thread_count(self) -> None:
        from deepspeed.runtime.swap_tensor.aio_config import get_aio_config

        assert get_aio_config({"aio": {"thread_count": 4}})["intra_op_parallelism"] == 1
        assert get_aio_config({"aio": {"intra_op_parallelism": 4}})["intra_op_parallelism"] == 4


class TestUnbuiltOps:
    def test_the_table_of_ops_is_asked_before_shared_memory_is_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import deepspeed.ops
        from deepspeed.comm.torch import build_shm_op

        monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {"deepspeed_shm_comm": False}, raising=False)
        assert build_shm_op() is None

    def test_torchrun_does_not_set_what_shared_memory_needs(self) -> None:
        import inspect

        from torch.distributed.elastic.agent.server import local_elastic_agent

        assert '"LOCAL_SIZE"' not in inspect.getsource(local_elastic_agent)
