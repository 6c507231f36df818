"""Tests of the checks of key combinations for RLP."""

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest

from fastrlhf.config import RLPConfig, TrainConfig
from fastrlhf.config.train import HUB_KEYS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"views_per_step": 1}, "views_per_step: must be at least 2"),
        ({"num_answers": 1}, "num_answers: must be at least 2"),
        ({"min_confidence": 1.5}, r"min_confidence: must be in 0\.\.1"),
        ({"beta_start": 0.0}, "beta_start: must be above 0"),
        ({"mib_loss": "infomax", "view_critic": "dot"}, "view_critic: must be mlp when mib_loss is infomax"),
        ({"policy_path": "runs/ppo"}, "reward_model_path: must be given when policy_path is"),
        (
            {"policy_path": "a", "reward_model_path": "b", "refinement": "none"},
            "policy_path: must be empty when refinement is none",
        ),
        ({"refinement": "nothing"}, "refinement: must be one of none, uml, spg, both"),
    ],
)
def test_contradictory_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RLPConfig(**fields)


def test_the_defaults_are_those_of_the_paper():
    config = RLPConfig()
    assert (config.num_answers, config.min_confidence, config.mib_weight, config.rounds) == (10, 0.5, 0.5, 1)
    assert (config.answer_temperature, config.clustering) == (1.0, "strict")


def test_a_weight_of_0_turns_views_off():
    kinds = {name: RLPConfig(refinement=name) for name in ("none", "uml", "spg", "both")}
    assert {name: (config.with_views, config.with_pairs) for name, config in kinds.items()} == {
        "none": (False, False),
        "uml": (True, False),
        "spg": (False, True),
        "both": (True, True),
    }
    assert not RLPConfig(refinement="uml", mib_weight=0.0).with_views


def another(hint: Any, default: Any) -> Any:
    """Returns a value of the key's type that differs from the key's default."""
    if choices := [choice for choice in get_args(hint) if isinstance(choice, str) and choice != default]:
        return choices[0]
    if isinstance(default, bool) or bool in get_args(hint):
        return not default
    return {str: "x", tuple: ("x",), float: 5.0}.get(type(default), 5)


def test_each_key_of_the_trainers_that_it_does_not_read_is_refused_and_its_sections_are_named():
    read = {"output_dir": "runs/rlp", "seed": 7, "device": "cpu", "dtype": "bfloat16", "micro_batch_tokens": 100}
    hints = get_type_hints(TrainConfig)
    pushed = RLPConfig(push_to_hub=True, hub_model_id="ada/x", hub_private_repo=True, hub_revision="b")
    hub = {name: getattr(pushed, name) for name in ("push_to_hub", *HUB_KEYS)}
    assert hub == {"push_to_hub": True, "hub_model_id": "ada/x", "hub_private_repo": True, "hub_revision": "b"}
    for field in (field for field in fields(TrainConfig) if field.name not in hub):
        changed = read.get(field.name, another(hints[field.name], field.default))
        assert changed != field.default
        if field.name in read:
            assert getattr(RLPConfig(**{field.name: changed}), field.name) == changed
            continue
        with pytest.raises(ValueError, match=rf"^{field.name}: must be .* in section rlp \(set it in section "):
            RLPConfig(**{field.name: changed})
    rule = r"16 in section rlp \(set it in section reward, drpo or shared\), since it would have no effect; got 8"
    with pytest.raises(ValueError, match=f"^lora_r: must be {rule}$"):
        RLPConfig(policy="drpo", lora_r=8)
