import re

import pytest
from transformers import AutoConfig, LlamaConfig

from fastrlhf.models.architecture import check_decoder, check_head
from tests import tiny


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("t5", "an encoder-decoder model (t5)"),
        ("bart", "an encoder-decoder model (bart)"),
        ("bert", "an encoder (bert), which does not write text"),
        ("modernbert", "an encoder (modernbert), which does not write text"),
        ("vit", "a model of type vit, for which transformers has no causal language model"),
        (
            "mllama",
            "a model of type mllama, and transformers cannot load its language model (mllama_text_model)",
        ),
    ],
)
def test_models_that_are_not_causal_language_models_are_refused(kind, told):
    message = re.escape(f"model_name_or_path: 'x' is {told}; give a causal language model (decoder only)")
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_decoder(AutoConfig.for_model(kind), "model_name_or_path: 'x'")


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        AutoConfig.for_model("gpt_neox"),
        AutoConfig.for_model("bert", is_decoder=True),
        AutoConfig.for_model("vit", auto_map={"AutoModelForCausalLM": "mine.Model"}),
    ],
    ids=["llama", "gpt_neox", "bert as a decoder", "code of its own"],
)
def test_causal_language_models_pass(config):
    check_decoder(config, "model_name_or_path: 'x'")


def test_a_language_model_without_a_score_head_is_refused_by_its_configuration_and_one_with_a_head_is_not(tmp_path):
    base, judge = tiny.save_policy(tmp_path / "base"), tiny.save_reward_model(tmp_path / "judge")
    check_head(AutoConfig.from_pretrained(judge), judge, "reward_model_path")
    for field in ("reward_model_path", "critic_model_path"):
        told = rf"^{field}: '.*base' has no trained score head; train one with `fastrlhf reward`$"
        with pytest.raises(ValueError, match=told):
            check_head(AutoConfig.from_pretrained(base), base, field)
    renamed = AutoConfig.from_pretrained(judge)
    renamed.architectures = ["LlamaForCausalLM"]  # only the weights matter
    check_head(renamed, judge, "reward_model_path")
