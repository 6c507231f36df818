import pytest

from fastrlhf import cli
from fastrlhf.config import GRPOConfig, SFTConfig
from fastrlhf.config.choices import nearest_choice


@pytest.mark.parametrize(
    ("value", "choices", "meant"),
    [
        ("bf16", ("float32", "bfloat16"), "bfloat16"),
        ("BFloat16", ("float32", "bfloat16"), "bfloat16"),
        ("fp16", ("float32", "bfloat16"), ""),
        (False, ("group", "batch", "none"), "none"),
        ("True", ("group", "batch", "none"), "group"),
        ("false", ("auto", "never"), ""),
        ("adamw_torch", ("adamw_torch_fused", "adamw_8bit"), "adamw_torch_fused"),
        ("constant_with_warmup", ("linear", "constant"), "constant"),
        ("polynomial", ("linear", "cosine", "constant"), ""),
        ("cosin", ("linear", "cosine", "constant"), "cosine"),
    ],
)
def test_the_equivalent_or_the_most_similar_choice_is_suggested(value, choices, meant):
    assert nearest_choice(value, choices) == meant


TOLD = "scale_rewards: must be one of group, batch, none; got {}; did you mean none?"


def test_an_invalid_choice_is_refused_with_a_suggestion(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^scale_rewards: must be") as error:
        GRPOConfig(scale_rewards=False)  # pyright: ignore
    assert str(error.value) == TOLD.format(False)
    for flags in (["--scale_rewards", "false"], ["--scale_rewards=false"]):
        assert cli.main(["grpo", *flags]) == 2
        assert capsys.readouterr().err == f"fastrlhf grpo: {TOLD.format(repr('false'))}\n"
    file = tmp_path / "grpo.yaml"
    file.write_text("grpo:\n  scale_rewards: off\n")
    assert cli.main(["grpo", "--config", str(file)]) == 2
    assert capsys.readouterr().err == f"fastrlhf grpo: {file}, grpo: {TOLD.format(repr('off'))}\n"


def test_an_unknown_key_is_refused_with_a_suggestion():
    for key, told in (("learningrate", "did you mean 'learning_rate'?"), ("max_seq_length", "here it is max_length")):
        with pytest.raises(TypeError, match=r"^SFTConfig has no key") as error:
            SFTConfig(**{key: 3})
        assert str(error.value) == f"SFTConfig has no key {key!r}; {told}"
