import torch
import transformers
from torch.nn import Dropout, Linear, Module

from fastrlhf.models.loading import build_policy
from fastrlhf.models.noise import silence, silent_config
from tests import tiny


def test_every_probability_of_a_configuration_and_its_parts_is_0_and_nothing_else_changes():
    text = {"attention_dropout": 0.3, "hidden_dropout_prob": 0.2, "router_jitter_noise": 0.1, "rms_norm_eps": 0.5}
    config = transformers.Gemma3Config(text_config={"num_hidden_layers": 2})
    for name, value in text.items():
        setattr(config.text_config, name, value)
    silent_config(config)
    found = [getattr(config.text_config, name) for name in text]
    assert found == [0.0, 0.0, 0.0, 0.5]


def test_dropout_of_modules_and_their_attributes_is_turned_off():
    class Layer(Module):
        def __init__(self):
            super().__init__()
            self.inner, self.linear = Dropout(0.5), Linear(2, 2)
            self.residual_dropout, self.jitter, self.scale = 0.1, 0.01, 0.7

    layer = Layer()
    silence(layer)
    assert (layer.inner.p, layer.residual_dropout, layer.jitter, layer.scale) == (0.0, 0.0, 0.0, 0.7)


def test_a_model_gives_the_same_numbers_in_training_mode():
    """Uses OPT, which stores dropout as an attribute of its layers and also skips layers at random (layerdrop)."""
    config = transformers.OPTConfig(
        hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16, dropout=0.4,
        attention_dropout=0.4, layerdrop=0.5, max_position_embeddings=32,
    )  # fmt: skip
    model = build_policy(config, vocab_size=tiny.VOCAB, eos_token_id=tiny.EOS, seed=0)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        evaluated, trained = model(ids).logits, model.train()(ids).logits
    assert torch.equal(evaluated, trained)
