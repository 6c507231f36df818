import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, LlamaForSequenceClassification

from bench.models.configs import tiny_config
from fastrlhf.config import SFTConfig
from fastrlhf.data.packing import pack, sequence
from fastrlhf.models.adapters import frozen_copy
from fastrlhf.models.forward import sequence_scores, token_logprobs
from fastrlhf.models.loading import (
    build_policy,
    check_vocabulary,
    load_policy,
    load_reward_model,
    open_policy,
    read_model_config,
)
from fastrlhf.types import Segment
from tests import tiny

SEQUENCES = [[5, 6, 7, 8, 9, 10, tiny.EOS], [12, tiny.EOS], [5, 6, 7, 20, 21, 22, 23, 24, 25]]


@torch.no_grad()
def logprobs(model) -> torch.Tensor:
    return token_logprobs(model, pack([sequence(ids[:1], ids[1:]) for ids in SEQUENCES])).logprob


@torch.no_grad()
def scores(model) -> torch.Tensor:
    return sequence_scores(model, pack([Segment(token_ids=ids) for ids in SEQUENCES]))


def same_weights(a, b) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def drop_weight(folder, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# Loading policies. ----------------------------------------------------------


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_saved_policy_loads_with_identical_numbers(name, tmp_path):
    model = tiny.policy(name)
    model.save_pretrained(tmp_path)
    again = load_policy(str(tmp_path))
    assert type(again) is type(model)
    assert same_weights(again, model)
    assert torch.equal(logprobs(again), logprobs(model))
    assert not again.training


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_model_from_scratch_depends_only_on_its_seed(name):
    def built(seed: int):
        return build_policy(tiny.model_config(name), vocab_size=40, eos_token_id=tiny.EOS, seed=seed)

    torch.manual_seed(1)
    first = built(3)
    after = torch.rand(1)
    torch.manual_seed(2)
    assert same_weights(built(3), first)
    assert not same_weights(built(4), first)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after), "building a model moved the caller's random numbers"


def test_a_model_is_built_from_fields_with_the_vocabulary_and_eos_of_the_tokenizer():
    settings = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"intermediate_size": 8, "vocab_size": 999, "bos_token_id": 7, "attention_dropout": 0.5}
    model = build_policy(settings, vocab_size=40, eos_token_id=1, seed=0)
    config = model.config
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id, config.pad_token_id) == (40, 1, None, None)
    assert (config.hidden_size, config.attention_dropout) == (16, 0)
    assert model.get_input_embeddings().weight.shape == (40, 16)
    assert settings["model_type"] == "llama"


def test_the_given_configuration_is_not_changed():
    config = tiny.model_config()
    build_policy(config, vocab_size=40, eos_token_id=1, seed=0)
    assert config.vocab_size == tiny.VOCAB


@pytest.mark.parametrize("model_type", ["lama", "", None])
def test_an_unknown_model_type_is_refused(model_type):
    settings = {"hidden_size": 16} | ({} if model_type is None else {"model_type": model_type})
    with pytest.raises(ValueError, match=r"^model_config\.model_type: .* is not known"):
        build_policy(settings, vocab_size=40, eos_token_id=1, seed=0)


@pytest.mark.parametrize("load", [load_policy, lambda path: load_reward_model(path, pad_token_id=0)])
def test_a_place_without_a_model_is_refused_by_the_name_of_its_field(load, tmp_path):
    field = "model_name_or_path" if load is load_policy else "reward_model_path"
    with pytest.raises(ValueError, match=f"^{field}: '.*nowhere' is neither a local folder nor a"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=f"^{field}: .* holds no model that transformers can load"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(ValueError, match=f"^{field}: .* holds no model that transformers can load"):
        load(str(tmp_path))


def test_a_reward_model_is_refused_as_policy(tmp_path):
    path = tiny.save_reward_model(tmp_path)
    with pytest.raises(ValueError, match=r"^models: .* lacks the weights lm_head\.weight"):
        load_policy(path, field="models")


def test_missing_weights_are_an_error(tmp_path):
    for save, load in (
        (tiny.save_policy, load_policy),
        (tiny.save_reward_model, lambda path: load_reward_model(path, pad_token_id=0)),
    ):
        folder = tmp_path / save.__name__
        path = save(folder)
        drop_weight(folder, "model.layers.1.mlp.up_proj.weight")
        with pytest.raises(ValueError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"):
            load(path)


def test_a_loaded_policy_has_no_dropout(tmp_path):
    model = tiny.policy("gpt_neox")
    model.config.attention_dropout = model.config.hidden_dropout = 0.3
    model.save_pretrained(tmp_path)
    again = load_policy(str(tmp_path)).train()
    assert torch.equal(logprobs(again), logprobs(model.eval()))


def test_a_frozen_copy_does_not_change():
    model = tiny.policy()
    before, copy = logprobs(model), frozen_copy(model)
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert torch.equal(logprobs(copy), before)
    assert not torch.equal(logprobs(model), before)


# Opening the policy of a run. -----------------------------------------------

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 8}


def test_a_run_starts_from_a_saved_model_or_from_a_configuration(tmp_path):
    path = tiny.save_policy(tmp_path, seed=5)
    assert same_weights(open_policy(SFTConfig(model_name_or_path=path), tiny.tokenizer()), tiny.policy(seed=5))
    built = open_policy(SFTConfig(model_config=json.dumps(LLAMA), seed=5), tiny.tokenizer())
    expected = build_policy(LLAMA, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=5)
    assert same_weights(built, expected)


def test_a_run_needs_one_model_and_not_two(tmp_path):
    with pytest.raises(ValueError, match=r"^model_name_or_path: give a folder or a hub name"):
        open_policy(SFTConfig(), tiny.tokenizer())
    both = SFTConfig(model_name_or_path="a", model_config=json.dumps(LLAMA))
    with pytest.raises(ValueError, match=r"^model_config: give either a model or a configuration .* not both"):
        open_policy(both, tiny.tokenizer())


def test_additional_tokens_are_reported_and_get_random_embeddings(tmp_path, caplog):
    path = tiny.save_policy(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})

    def opened(seed: int):
        torch.manual_seed(int(torch.randint(1000, ())))
        return open_policy(SFTConfig(model_name_or_path=path, seed=seed), tokenizer)

    model, old = opened(3), tiny.policy()
    assert (
        "tokenizer_name_or_path: 1 rows added to the embedding of the model, for tokens that are new to it"
        in caplog.messages
    )
    embedding = model.get_input_embeddings().weight
    assert model.config.vocab_size == embedding.shape[0] == len(tokenizer) == tiny.VOCAB + 1
    assert torch.equal(embedding[:-1], old.get_input_embeddings().weight)
    assert same_weights(opened(3), model)
    assert not same_weights(opened(4), model)


def test_a_model_with_more_embeddings_than_tokens_keeps_them(tmp_path):
    build_policy(tiny.model_config(), vocab_size=64, eos_token_id=1, seed=0).save_pretrained(tmp_path)
    assert open_policy(SFTConfig(model_name_or_path=str(tmp_path)), tiny.tokenizer()).config.vocab_size == 64


def test_models_of_one_run_share_a_vocabulary_that_holds_the_tokenizer():
    small = tiny.policy()
    large = build_policy(tiny.model_config(), vocab_size=tiny.VOCAB + 1, eos_token_id=1, seed=0)
    tokenizer = tiny.tokenizer()
    check_vocabulary({"a": small, "b": large}, tokenizer)  # embeddings are padded to different widths
    tokenizer.add_tokens(["w29"])
    check_vocabulary({"a": large}, tokenizer)
    with pytest.raises(ValueError, match=f"^b: its vocabulary of {tiny.VOCAB} is smaller than the tokenizer's 33"):
        check_vocabulary({"a": large, "b": small}, tokenizer)


# Loading reward models. -----------------------------------------------------


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_saved_reward_model_is_a_plain_classifier_with_identical_scores(name, tmp_path):
    tiny.policy(name).save_pretrained(tmp_path / "policy")
    model = load_reward_model(str(tmp_path / "policy"), pad_token_id=0, seed=3)
    model.save_pretrained(tmp_path / "reward")
    again = load_reward_model(str(tmp_path / "reward"), pad_token_id=0, must_be_trained=True)
    assert same_weights(again, model)
    assert torch.equal(scores(again), scores(model))

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert same_weights(plain, model)
    width = max(map(len, SEQUENCES))
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in SEQUENCES])
    with torch.no_grad():
        padded = plain(ids, attention_mask=(ids != 0).long()).logits[:, 0]
    torch.testing.assert_close(padded, scores(model), rtol=1e-5, atol=1e-6)


def test_if_padding_is_eos_the_plain_classifier_still_reads_the_score_at_the_eos(tmp_path):
    """A plain transformers classifier reads the last token that is not padding, so the saved model must not declare the
    EOS as the padding token."""
    path = tiny.save_policy(tmp_path / "policy")
    load_reward_model(path, pad_token_id=None).save_pretrained(tmp_path / "reward")
    ours = scores(load_reward_model(str(tmp_path / "reward"), pad_token_id=None))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    with torch.no_grad():
        alone = torch.cat([plain(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
    torch.testing.assert_close(alone, ours, rtol=1e-5, atol=1e-6)


def test_a_new_head_is_small_and_depends_only_on_its_seed(tmp_path):
    model = build_policy(tiny.model_config(), vocab_size=40, eos_token_id=1, seed=0)
    model.save_pretrained(tmp_path)
    heads = []
    for state, seed in ((1, 3), (2, 3), (1, 4)):
        torch.manual_seed(state)
        heads.append(load_reward_model(str(tmp_path), pad_token_id=0, seed=seed).score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    # 32 draws: their standard deviation is within 50 % of 1 / sqrt(D + 1) with a probability near 1
    assert heads[0].shape == (1, 32)
    assert heads[0].std().item() == pytest.approx(33**-0.5, rel=0.5)


def test_a_trunk_without_a_trained_head_is_refused_if_one_is_needed(tmp_path):
    path = tiny.save_policy(tmp_path)
    with pytest.raises(ValueError, match=r"^reward_model_path: .* has no trained score head; train one with"):
        load_reward_model(path, pad_token_id=0, must_be_trained=True)


@pytest.mark.parametrize("must_be_trained", [True, False])
def test_a_trained_head_with_two_labels_is_refused(tmp_path, must_be_trained):
    path = tiny.save_policy(tmp_path / "policy")
    two = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, pad_token_id=0)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"^reward_model_path: .*two' has a trained head with 2 labels, but a reward"):
        load_reward_model(str(tmp_path / "two"), pad_token_id=0, must_be_trained=must_be_trained)


def test_a_classifier_with_a_nonlinear_head_is_refused(tmp_path, monkeypatch):
    path = tiny.save_reward_model(tmp_path)
    load = LlamaForSequenceClassification.from_pretrained

    def with_bias(*arguments, **keywords):
        model, info = load(*arguments, **keywords)
        model.score = torch.nn.Linear(32, 1, bias=True)
        return model, info

    monkeypatch.setattr(LlamaForSequenceClassification, "from_pretrained", with_bias)
    with pytest.raises(ValueError, match=r"^reward_model_path: LlamaForSequenceClassification of .* one linear map"):
        load_reward_model(path, pad_token_id=0)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_in_bfloat16_the_head_is_float32_in_our_forward_in_the_plain_one_and_in_a_copy(name, tmp_path):
    tiny.policy(name).save_pretrained(tmp_path)
    model = frozen_copy(load_reward_model(str(tmp_path), pad_token_id=0, dtype="bfloat16"))
    assert (model.dtype, model.score.weight.dtype) == (torch.bfloat16, torch.float32)
    assert scores(model).dtype == torch.float32
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
    assert alone.dtype == torch.float32
    torch.testing.assert_close(alone, scores(model), rtol=0.1, atol=0.1)


def test_a_policy_loads_in_the_dtype_asked_for(tmp_path):
    path = tiny.save_policy(tmp_path)
    assert load_policy(path, dtype="bfloat16").dtype == torch.bfloat16
    assert load_policy(path).dtype == torch.float32


def test_reading_a_configuration_loads_no_weights(tmp_path):
    path = tiny.save_policy(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert read_model_config(path, "models", False).vocab_size == tiny.VOCAB
    with pytest.raises(ValueError, match=r"^models: "):
        read_model_config(str(tmp_path / "nowhere"), "models", False)


@pytest.mark.parametrize("load", [load_policy, lambda path: load_reward_model(path, pad_token_id=0)])
def test_weights_that_are_absent_cut_short_or_of_another_shape_are_one_clear_error(load, tmp_path):
    path, weights = tiny.save_policy(tmp_path), tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for damage in (weights.unlink, lambda: weights.write_bytes(content[:-9])):
        damage()
        with pytest.raises(ValueError, match=r"^[a-z_]*: the weights of .* cannot be loaded: "):
            load(path)
    weights.write_bytes(content)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"vocab_size": tiny.VOCAB + 8}))
    with pytest.raises(ValueError, match=r"^[a-z_]*: .* lacks the weights .*embed_tokens\.weight"):
        load(path)


def test_code_of_a_model_folder_runs_only_on_request(tmp_path):
    marker = tmp_path / "ran"
    settings = {"model_type": "ours", "auto_map": {"AutoConfig": "ours.Ours"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "ours.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"^model_name_or_path: .* holds no model that transformers can load"):
        read_model_config(str(tmp_path), "model_name_or_path", SFTConfig().trust_remote_code)
    assert not marker.exists()


def test_only_the_language_model_of_a_composite_model_is_loaded_and_a_line_says_so(tmp_path, caplog):
    config = tiny_config("qwen3_5")
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    model = load_policy(str(tmp_path))
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)
    told = (
        f"model_name_or_path: only the language model of {tmp_path} is loaded, trained and saved (model_type "
        "qwen3_5_text in place of qwen3_5)"
    )
    assert told in caplog.messages


def test_a_misspelt_key_of_a_model_from_scratch_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"model_config: llama has no 'hidden_sise'; did you mean 'hidden_size'\?"):
        build_policy({"model_type": "llama", "hidden_sise": 32}, vocab_size=8, eos_token_id=1, seed=0)
    with pytest.raises(ValueError, match=r"model_config: .*hidden size \(30\) is not a multiple"):
        build_policy(
            {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, vocab_size=8, eos_token_id=1, seed=0
        )
