"""Tests of the dtype that `dtype: auto` chooses, and of the lines about device and precision at the start of a run."""

import dataclasses

import pytest
import torch

from fastrlhf.config import DPOConfig, EvalConfig, SFTConfig
from fastrlhf.config.paths import Filled, as_given, with_variables
from fastrlhf.models.precision import OFFER, describe_float32, describe_precision, resolve_device, with_dtype
from tests import tiny


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that the machine has a GPU; returns a function that sets its compute capability."""

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")

    return pretend


def test_auto_is_float32_on_a_cpu():
    assert SFTConfig().dtype == "auto"
    assert with_dtype(SFTConfig(device="cpu")).dtype == "float32"


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")])
def test_auto_is_bfloat16_from_compute_capability_8(gpu, capability, dtype):
    gpu(*capability)
    assert with_dtype(DPOConfig()).dtype == dtype
    assert with_dtype(DPOConfig(device="cuda")).dtype == dtype
    assert with_dtype(DPOConfig(device="cpu")).dtype == "float32"


def test_weights_with_a_merged_adapter_stay_in_float32(gpu, tmp_path, caplog):
    gpu(9, 0)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with caplog.at_level("INFO", "fastrlhf"):
        assert with_dtype(DPOConfig(model_name_or_path=str(tmp_path))).dtype == "float32"
    assert caplog.messages == [
        f"dtype: auto is float32, because {tmp_path} holds weights with a merged adapter, of which bfloat16, the "
        "faster setting, would lose a part"
    ]
    assert with_dtype(EvalConfig(models=("base", str(tmp_path)))).dtype == "float32"
    assert with_dtype(DPOConfig(model_name_or_path=str(tmp_path), dtype="bfloat16")).dtype == "bfloat16"
    assert with_dtype(DPOConfig(model_name_or_path=str(tmp_path / "adapter"))).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_given_dtype_is_kept(gpu, dtype):
    gpu(9, 0)
    config = SFTConfig(dtype=dtype)
    assert with_dtype(config) is config


def test_auto_is_the_dtype_of_the_model_that_a_program_passes():
    config = SFTConfig(device="cpu")
    assert with_dtype(config, tiny.policy().bfloat16()).dtype == "bfloat16"
    assert with_dtype(config, tiny.policy().half()).dtype == "float32"  # `adopt` then refuses the model


def test_the_names_of_environment_variables_are_kept(monkeypatch):
    monkeypatch.setenv("SEED", "3")
    config = with_variables(SFTConfig(device="cpu", seed=3), {"seed": Filled("3", "$SEED")})
    assert as_given(with_dtype(config))["seed"] == "$SEED"


def test_master_weights_are_refused_if_auto_is_float32():
    config = SFTConfig(master_weights="stochastic_rounding", device="cpu")
    with pytest.raises(ValueError, match=r"^master_weights: must be 'float32' when dtype is float32"):
        with_dtype(config)


def test_the_first_lines_on_a_cpu():
    assert describe_precision(with_dtype(SFTConfig(device="cpu"))) == ["device: cpu, weights in float32"]


def test_the_first_lines_on_a_gpu(gpu):
    gpu(9, 0)
    fast = with_dtype(SFTConfig())
    assert describe_precision(fast) == ["device: NVIDIA H100, weights in bfloat16", OFFER]
    small = dataclasses.replace(fast, activation_checkpointing=True)
    assert describe_precision(small) == ["device: NVIDIA H100, weights in bfloat16"]
    slow = dataclasses.replace(small, dtype="float32")
    assert describe_precision(slow) == ["device: NVIDIA H100, weights in float32", describe_float32("highest")]
    gpu(7, 5)  # this GPU has no matrix units for bfloat16 or TF32, so no faster setting exists
    assert describe_precision(slow) == ["device: NVIDIA H100, weights in float32"]


def test_float32_names_its_cost_or_the_setting_of_torch_that_avoids_it():
    assert "TF32 off" in describe_float32("highest")
    assert "16 times" in describe_float32("highest")
    assert describe_float32("high") == (
        "dtype: float32 with TF32 products, because torch's float32 matmul precision is 'high'"
    )


def test_a_missing_device_is_refused(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto") == torch.device(expected)
    with pytest.raises(ValueError, match=r"^device: 'cuda:1' is not available, because torch finds no CUDA GPU"):
        resolve_device("cuda:1")
    with pytest.raises(ValueError, match=r"^device: 'gpu' is not a device"):
        resolve_device("gpu")
