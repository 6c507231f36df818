import copy

import pytest
import torch
from safetensors.torch import save_file

from fastrlhf.config import SFTConfig
from fastrlhf.models.adapters import add_adapter
from fastrlhf.models.weights import all_weights, contiguous, fingerprint, load_weights, read_tensors, trained_weights
from tests import tiny


def test_tied_weights_are_there_once_and_frozen_ones_are_not_trained():
    config = tiny.model_config()
    config.tie_word_embeddings = True
    model = tiny.build_policy(config, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=0)
    assert all_weights(model).keys() == trained_weights(model).keys() == dict(model.named_parameters()).keys()
    assert "lm_head.weight" in model.state_dict()
    assert "lm_head.weight" not in all_weights(model)
    add_adapter(model, SFTConfig(use_peft=True, lora_r=2), "base")
    assert {name.rpartition(".lora_")[1] for name in trained_weights(model)} == {".lora_"}
    assert any("embed_tokens" in name for name in all_weights(model))


def test_loading_fills_the_tensors_that_are_there_and_names_what_does_not_fit(tmp_path):
    model, other = tiny.policy(seed=0), tiny.policy(seed=1)
    file = tmp_path / "model.safetensors"
    save_file(contiguous(trained_weights(other)), file)
    places = {name: tensor.data_ptr() for name, tensor in trained_weights(model).items()}
    load_weights(model, file)
    assert {name: tensor.data_ptr() for name, tensor in trained_weights(model).items()} == places
    for name, tensor in trained_weights(model).items():
        assert torch.equal(tensor, read_tensors(file)[name])
    save_file({**contiguous(trained_weights(other)), "model.norm.weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is torch\.float32 \[3\] there"):
        load_weights(model, file)
    save_file({"model.norm.weight": torch.ones(32)}, file)
    with pytest.raises(ValueError, match="is in one of the two alone"):
        load_weights(model, file)


def test_a_fingerprint_notices_a_step_of_any_tensor():
    model = tiny.policy()
    start = fingerprint({"": model})
    assert fingerprint({"": copy.deepcopy(model)}) == start
    for parameter in model.parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.001)
        assert fingerprint({"": model}) != start
        with torch.no_grad():
            parameter.copy_(before)
    assert fingerprint({"": model}) == start
