"""Tests of uploads against a stand-in of the hub's API (tests/hub_server.py), with the hub's own client."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from fastrlhf import cli
from fastrlhf.config import RewardConfig, RLPConfig, SFTConfig
from fastrlhf.publish.push import PushFailed, check_push, check_sections, open_repository, push
from tests import hub_server, tiny

MODEL = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    "tokenizer_config.json",
}


@pytest.fixture
def hub(monkeypatch):
    with hub_server.serving() as hub:
        hub_server.use(monkeypatch, hub.url)
        yield hub


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("push")
    tiny.save_policy(place / "policy")
    rows = [{"prompt": row.prompt, "completion": row.reference} for row in tiny.examples(6)]
    (place / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return place


def train(place: Path, folder: Path, *flags: str) -> int:
    keys = {
        "model_name_or_path": place / "policy",
        "dataset_name": place / "rows.jsonl",
        "output_dir": folder,
        "max_length": 32,
        "max_steps": 1,
        "progress": "false",
        "push_to_hub": "true",
    }
    return cli.main(["sft", *(text for key, value in keys.items() for text in (f"--{key}", str(value))), *flags])


def test_a_run_uploads_its_model_and_its_card_and_nothing_else(hub, place, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = tmp_path / "run"
    assert train(place, run, "--save_steps", "1", "--hub_model_id", "ada/tiny", "--use_peft", "true") == 0
    assert hub.private == {"ada/tiny": False}
    files = hub.files["ada/tiny", "main"]
    assert {*files} == MODEL
    assert all(content == (run / name).read_bytes() for name, content in files.items())
    card = ModelCard(files["README.md"].decode())
    assert card.data.tags == ["fastrlhf", "sft", "lora"]
    assert '.from_pretrained("ada/tiny")' in card.text
    card.validate()
    assert hub.requests[-1] == "POST /api/validate-yaml"
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert f"uploaded to {hub.url}/ada/tiny" in caplog.text
    assert "adapter/ is not uploaded, because its base model is local" in caplog.text


def test_private_repositories_and_branches_are_created(hub, place, tmp_path):
    flags = ("--hub_private_repo", "true", "--hub_revision", "beta")
    assert train(place, tmp_path / "named-by-its-folder", *flags) == 0
    assert hub.private == {"ada/named-by-its-folder": True}
    assert hub.files["ada/named-by-its-folder", "main"] == {}
    assert {*hub.files["ada/named-by-its-folder", "beta"]} == MODEL
    assert train(place, tmp_path / "again", "--hub_model_id", "ada/named-by-its-folder", *flags) == 0


def test_an_adapter_over_a_model_of_the_hub_is_uploaded_with_it(hub, tmp_path):
    for name in ("config.json", "model.safetensors", "adapter/adapter_config.json", "adapter/README.md", "x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    push(SFTConfig(output_dir=str(tmp_path), model_name_or_path="owner/base", push_to_hub=True), tmp_path)
    assert {*hub.files[f"ada/{tmp_path.name}", "main"]} == {
        *("config.json", "model.safetensors", "adapter/adapter_config.json", "adapter/README.md")
    }


@pytest.mark.parametrize(
    ("broken", "flags", "told"),
    [
        ({}, ("--hub_model_id", "others/new"), "403 You don't have the rights to create a model under this namespace"),
        ({}, ("--hub_model_id", "others/old"), "403 Read-only token"),
        ({"repos/create": 401}, ("--hub_model_id", "ada/x"), "401 refused by the stand-in"),
        ({"branch": 403}, ("--hub_model_id", "ada/x", "--hub_revision", "beta"), "403 refused by the stand-in"),
    ],
)
def test_a_refusal_ends_the_run_before_a_model_is_loaded(hub, place, tmp_path, capsys, broken, flags, told):
    hub.private["others/old"], hub.broken = False, broken
    assert train(place, tmp_path / "run", *flags) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastrlhf sft:")]
    assert line == (
        f"fastrlhf sft: hub_model_id: the token cannot write to {flags[1]!r} at {hub.url}: {told}; give another "
        "repository or token, or set push_to_hub to false"
    )
    assert not (tmp_path / "run").exists()


def test_weights_that_must_be_private_do_not_go_to_a_public_repository(hub):
    hub.private["ada/open"] = False
    config = SFTConfig(output_dir="x", push_to_hub=True, hub_model_id="ada/open", hub_private_repo=True)
    with pytest.raises(ValueError, match="hub_private_repo: ada/open exists and is public; make it private, or"):
        open_repository(config)


def test_a_failed_upload_leaves_the_model_and_names_the_command_that_repeats_it(
    hub, place, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the hub's client waits between its attempts
    hub.broken = {"preupload": 503}
    run = tmp_path / "run"
    assert train(place, run, "--hub_model_id", "ada/tiny", "--hub_private_repo", "true", "--hub_revision", "b1") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    told, _, command = line.partition("; to upload it: ")
    assert told == (
        "fastrlhf sft: push_to_hub: the upload to 'ada/tiny' has failed: 503 refused by the stand-in; the model is "
        f"complete in {str(run)!r}"
    )
    assert {path.name for path in run.iterdir() if path.is_dir()} <= {".lock"}  # no checkpoint, nothing in interrupted/
    assert (run / "config.json").exists()
    hub.broken, words = {}, shlex.split(command)
    assert words[:2] == ["hf", "upload"]
    program = "import sys; from huggingface_hub.cli.hf import main; main()"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    repeated = [sys.executable, "-c", program, *words[1:]]
    subprocess.run(repeated, env=environment, check=True, capture_output=True, timeout=100)
    assert {*hub.files["ada/tiny", "b1"]} == MODEL
    assert hub.files["ada/tiny", "b1"]["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_an_interrupted_upload_also_names_the_command(hub, tmp_path, monkeypatch, caplog):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("fastrlhf.publish.push.HfApi.upload_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        push(SFTConfig(output_dir=str(tmp_path), push_to_hub=True, hub_model_id="ada/x"), tmp_path)
    assert f"to upload it: hf upload ada/x {tmp_path} . --include config.json" in caplog.text


def test_shards_are_one_pattern_of_the_command(hub, tmp_path):
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (tmp_path / name).write_text("{}")
    hub.broken = {"repos/create": 500}
    with pytest.raises(PushFailed) as failed:
        push(SFTConfig(output_dir=str(tmp_path), push_to_hub=True), tmp_path)
    patterns = ("--include 'model-*.safetensors'", "--include model.safetensors.index.json")
    assert f"hf upload {tmp_path.name} {tmp_path} . {' '.join(patterns)}" in str(failed.value)
    hub.broken = {}
    push(SFTConfig(output_dir=str(tmp_path), push_to_hub=True), tmp_path)
    assert len(hub.files[f"ada/{tmp_path.name}", "main"]) == 3


def test_without_a_token_or_a_connection_the_run_does_not_start(monkeypatch, tmp_path):
    config = SFTConfig(output_dir="x", push_to_hub=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset one"):
        check_push(config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="push_to_hub: no token; run `hf auth login`, or set HF_TOKEN to a token that"):
        check_push(config)
    with pytest.raises(ValueError, match="push_to_hub: must be false without an output_dir"):
        check_push(SFTConfig(push_to_hub=True))
    check_push(SFTConfig())


def test_a_token_is_no_key_and_its_value_is_not_repeated(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("hub_token: hf_secret\n")
    assert cli.main(["sft", "--config", str(tmp_path / "run.yaml")]) == 2
    told = capsys.readouterr().err
    assert "unknown key 'hub_token'; not supported: run `hf auth login` or set HF_TOKEN" in told
    assert "hf_secret" not in told


@pytest.mark.parametrize("name", ["a/b/c", "-x /y", "ada/", "ada/x y", "../x"])
def test_names_that_no_repository_has_are_refused(name):
    with pytest.raises(ValueError, match="hub_model_id: must be a repository of the hub, as owner/name"):
        SFTConfig(push_to_hub=True, hub_model_id=name)


def test_a_hub_that_does_not_answer_ends_the_run_at_once(hub, monkeypatch):
    monkeypatch.setattr("fastrlhf.publish.push.is_silent", lambda: True)
    with pytest.raises(ValueError, match=r"push_to_hub: the hub at .* has not answered for"):
        open_repository(SFTConfig(output_dir="x", push_to_hub=True))


def test_sections_of_rlp_do_not_upload(hub):
    config = RLPConfig(output_dir="x", push_to_hub=True, hub_model_id="ada/rlp")
    check_sections(config, {"reward": RewardConfig()})
    with pytest.raises(ValueError, match="push_to_hub: must be false in section reward; set it in section rlp"):
        check_sections(config, {"reward": RewardConfig(push_to_hub=True)})
