"""Tests of the checks of key combinations for training on pairs and groups."""

import pytest

from fastrlhf.config import (
    DPOConfig,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dpo"}, r"^loss_type: must be one of sigmoid, ipo, .*, sft, or file.py:function; got 'dpo'"),
        ({"loss_type": ("sigmoid", "dpo")}, r"^loss_type: must be one of .*; got \('sigmoid', 'dpo'\)"),
        ({"loss_type": ()}, "^loss_type: must be at least one loss on pairs"),
        ({"loss_type": "sft"}, "^loss_type: must be at least one loss on pairs"),
        ({"loss_type": ("ipo", "ipo")}, "^loss_type: must be without repeats"),
        ({"loss_weights": (1.0, 2.0)}, r"^loss_weights: must be 1 number, for sigmoid; got \(1.0, 2.0\)"),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.0)}, "^loss_weights: must be above 0"),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, float("nan"))}, "^loss_weights: must be finite"),
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "^label_smoothing: must be 0 when loss_type is hinge; got 0.1",
        ),
        (
            {"loss_type": "robust", "label_source": "label_prob"},
            "^label_source: must be data when loss_type is robust",
        ),
        (
            {"label_source": "label_prob", "label_smoothing": 0.1},
            "^label_smoothing: must be 0 when label_source is not data",
        ),
        ({"label_source": "reward_model"}, "^reward_model_path: must be given when label_source is reward_model"),
        (
            {"reward_model_path": "somewhere"},
            r"^reward_model_path: must be given when .* only then; got 'somewh",
        ),
        ({"psi": "logit"}, "^loss_type: must be ipo when psi is not identity"),
        ({"psi_backend": "groupwise"}, "^loss_type: must be ipo when psi_backend is groupwise"),
        (
            {"loss_type": "ipo", "psi": "logit", "length_norm": "mean"},
            "^length_norm: must be auto or sum when psi is not",
        ),
        ({"loss_type": "ipo", "psi": "logit", "label_smoothing": 0.1}, "^label_smoothing: must be 0 when psi is not"),
        (
            {"loss_type": "ipo", "psi_backend": "groupwise", "label_source": "counts"},
            "^label_source: must be data or reward_model when psi_backend is groupwise",
        ),
        ({"loss_type": ("sigmoid", "ipo"), "margin_scale": 1.0}, "^margin_scale: must be 0 when loss_type is ipo"),
        (
            {"ref_cache_dir": "x", "precompute_ref_log_probs": False},
            "^ref_cache_dir: must be empty when precompute_ref_log_probs is",
        ),
    ],
)
def test_incompatible_losses_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**settings)
