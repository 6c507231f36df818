import logging

import transformers
from huggingface_hub.utils import are_progress_bars_disabled

from fastrlhf.models.loading import load_reward_model
from fastrlhf.models.quiet import quiet
from tests import tiny


def state() -> tuple:
    settings, level = transformers.logging, logging.getLogger("bitsandbytes").level
    return settings.get_verbosity(), settings.is_progress_bar_enabled(), are_progress_bars_disabled(), level


def test_settings_come_back(monkeypatch):
    before = state()
    with quiet():
        assert state() == (transformers.logging.ERROR, False, True, logging.ERROR)
    assert state() == before
    transformers.logging.disable_progress_bar()
    try:
        with quiet():
            pass
        assert state() == (before[0], False, True, before[3])
    finally:
        transformers.logging.enable_progress_bar()
    assert state() == before


def test_a_new_reward_head_is_loaded_without_a_word(tmp_path, capfd):
    tiny.save_policy(tmp_path / "policy")
    capfd.readouterr()
    load_reward_model(str(tmp_path / "policy"), pad_token_id=None)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
