import logging

import pytest
import transformers
from huggingface_hub.utils import are_progress_bars_disabled

from fastrlhf.models.loading import load_reward_model
from fastrlhf.models.quiet import quiet
from tests import tiny


def state() -> tuple:
    settings, level = transformers.logging, logging.getLogger("bitsandbytes").level
    return settings.get_verbosity(), settings.is_progress_bar_enabled(), are_progress_bars_disabled(), level


@pytest.mark.parametrize("bars", ["enable_progress_bar", "disable_progress_bar"])
def test_logging_settings_are_restored(bars):
    getattr(transformers.logging, bars)()
    try:
        before = state()
        with quiet():
            inside = state()
        assert (inside[0], inside[1], inside[3]) == (transformers.logging.ERROR, False, logging.ERROR)
        assert state() == before
    finally:
        transformers.logging.enable_progress_bar()


def test_loading_a_new_reward_head_prints_nothing(tmp_path, capfd):
    tiny.save_policy(tmp_path / "policy")
    capfd.readouterr()
    load_reward_model(str(tmp_path / "policy"), pad_token_id=None)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
