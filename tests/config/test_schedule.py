import inspect
import re

import pytest
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from fastrlhf.config import SFTConfig
from fastrlhf.config.command_line import parse
from fastrlhf.config.schedule import SCHEDULES, parse_scheduler_kwargs

MIN = '{"min_lr_rate": 0.1}'


def test_the_parameters_of_each_schedule_are_those_of_transformers():
    functions = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    assert {*functions} - {*SCHEDULES} == {"reduce_lr_on_plateau", "greedy"}
    general = {"optimizer", "num_warmup_steps", "num_training_steps", "num_stable_steps", "last_epoch"}
    for name, keys in SCHEDULES.items():
        assert {*inspect.signature(functions[name]).parameters} - general == {*keys}, name


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"lr_scheduler_kwargs": MIN},
            f"lr_scheduler_kwargs: must be empty when lr_scheduler_type is linear; got {MIN!r}",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": MIN},
            "lr_scheduler_kwargs: must be a mapping with keys among lr_end, power when lr_scheduler_type is "
            f"polynomial; got {MIN!r}",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_kwargs: must be a mapping with either min_lr or min_lr_rate when lr_scheduler_type is "
            "cosine_with_min_lr; got ''",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            'lr_scheduler_kwargs: must be a mapping such as {"num_decay_steps": 200} when lr_scheduler_type is '
            "warmup_stable_decay; got ''",
        ),
        ({"warmup_ratio": 1.0}, "warmup_ratio: must be at least 0 and below 1; got 1.0"),
        (
            {"warmup_ratio": 0.1, "warmup_steps": 5},
            "warmup_ratio: must be 0 when warmup_steps is 5: give one of the two; got 0.1",
        ),
    ],
)
def test_parameters_that_do_not_fit_the_schedule_are_refused(keys, told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        SFTConfig(**keys)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": [1]}', '{"a": null}', "3"])
def test_the_parameters_are_a_mapping_of_plain_values(text):
    with pytest.raises(ValueError, match=r"^lr_scheduler_kwargs: (must be a mapping such as|not valid JSON)"):
        parse_scheduler_kwargs(text)


def test_parameters_are_a_mapping_in_yaml_and_json_in_a_flag(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\nwarmup_ratio: 0.05\n"
    )
    config = parse(SFTConfig, ["--config", str(tmp_path / "run.yaml")], "sft")
    assert (config.lr_scheduler_kwargs, config.num_warmup_steps(41)) == (MIN, 3)
    assert parse(SFTConfig, ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", MIN], "sft") == (
        SFTConfig(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=MIN)
    )


def test_names_of_transformers_for_one_implementation_give_the_same_configuration():
    assert SFTConfig(optim="adamw_torch") == SFTConfig()
    assert SFTConfig(optim="adamw_bnb_8bit") == SFTConfig(optim="adamw_8bit")
