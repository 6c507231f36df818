"""Uploads the final model of a run to the Hugging Face hub.

Token, repository and permissions are checked before any time is spent. Weights, tokenizer and card are uploaded; rows,
metrics, checkpoints and config.yaml, which may contain paths of the machine, are not. If the upload fails, the model is
complete in its folder, and the error message has the command that uploads it.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import disable_progress_bars

from fastrlhf.config import TrainConfig, require
from fastrlhf.config.paths import as_given
from fastrlhf.data.hub import is_silent
from fastrlhf.data.rows import is_local

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
"""Endings of the files that model classes and tokenizers of transformers and peft write."""


class PushFailed(OSError):
    """Raised if the upload of a finished model fails; the message has the command that repeats it."""


def check_push(config: TrainConfig) -> None:
    """Raises ValueError if `push_to_hub` is set and nothing could be uploaded: no output folder, no token, or
    HF_HUB_OFFLINE is set. The hub is not contacted."""
    if not config.push_to_hub:
        return
    require(bool(config.output_dir), "push_to_hub", True, "false without an output_dir")
    if constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset one of the two")
    if get_token() is None:
        raise ValueError("push_to_hub: no token; run `hf auth login`, or set HF_TOKEN to a token that may write")


def check_sections(config: TrainConfig, sections: Mapping[str, TrainConfig]) -> None:
    """Checks `config` like `check_push`, and raises ValueError if a section that configures its stages sets
    `push_to_hub`. `sections`: name -> configuration."""
    check_push(config)
    for name, section in sections.items():
        rule = f"false in section {name}; set it in section rlp, which uploads its last policy"
        require(not section.push_to_hub, "push_to_hub", True, rule)


def open_repository(config: TrainConfig) -> None:
    """Creates the repository and the branch to upload to, if `push_to_hub` is set.

    Raises ValueError as `check_push` does, and also if the hub does not answer, if the token may not create or write
    the repository or the branch, or if an existing repository is public but `hub_private_repo` is set.
    """
    check_push(config)
    if not config.push_to_hub:
        return
    name, api = _name(config), HfApi()
    if is_silent():
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        raise ValueError(f"push_to_hub: the hub at {constants.ENDPOINT} has not answered for {seconds} s; try again")
    try:
        repository = _create(config, api)
        api.auth_check(repository, write=True)
        public = config.hub_private_repo and not api.repo_info(repository).private
        if config.hub_revision and not public:
            api.create_branch(repository, branch=config.hub_revision, exist_ok=True)
    except Exception as error:  # of the hub's client, which raises errors of several libraries
        raise ValueError(
            f"hub_model_id: the token cannot write to {name!r} at {constants.ENDPOINT}: {_told(error)}; give another "
            "repository or token, or set push_to_hub to false"
        ) from error
    if public:
        raise ValueError(f"hub_private_repo: {repository} exists and is public; make it private, or give another")


def push(config: TrainConfig, folder: Path) -> None:
    """Uploads the model in `folder`, if `push_to_hub` is set, and logs its address. Raises PushFailed, with the command
    that repeats the upload, if the hub refuses or cannot be reached."""
    if not config.push_to_hub:
        return
    if not config.progress:
        disable_progress_bars()
    api, patterns = HfApi(), list(_uploaded(config, folder))
    command = _command(config, folder, patterns)
    try:
        repository = _create(config, api)
        branch = config.hub_revision or None
        told = {"commit_message": "Model trained by fastrlhf", "allow_patterns": patterns}
        api.upload_folder(repo_id=repository, folder_path=folder, revision=branch, **told)
    except KeyboardInterrupt:
        log.warning("push_to_hub: interrupted; the model is complete in %s; to upload it: %s", folder, command)
        raise
    except Exception as error:  # of the hub's client, which raises errors of several libraries
        raise PushFailed(
            f"push_to_hub: the upload to {_name(config)!r} has failed: {_told(error)}; the model is complete in "
            f"{str(folder)!r}; to upload it: {command}"
        ) from error
    at = f"/tree/{config.hub_revision}" if config.hub_revision else ""
    log.info("uploaded to %s/%s%s", constants.ENDPOINT, repository, at)


def _create(config: TrainConfig, api: HfApi) -> str:
    """Creates the repository if it does not exist, and returns its name with the owner."""
    private = True if config.hub_private_repo else None  # None: the default of the account
    return api.create_repo(_name(config), private=private, exist_ok=True).repo_id


def target_of(config: TrainConfig) -> tuple[str, str]:
    """Returns the repository and the branch to which a run with push_to_hub uploads."""
    return _name(config), config.hub_revision


def _name(config: TrainConfig) -> str:
    return config.hub_model_id or Path(os.path.abspath(config.output_dir)).name


def _uploaded(config: TrainConfig, folder: Path) -> Iterator[str]:
    """Yields the patterns of the files to upload, relative to the folder. The adapter is left out if its base is a
    local model, which nobody else could load."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    for name in names:
        if name.endswith(SUFFIXES) or name == "README.md":
            shard = name.startswith("model-") and name.endswith(".safetensors")
            if not shard or name == next(n for n in names if n.startswith("model-")):
                yield "model-*.safetensors" if shard else name
    if (folder / "adapter").is_dir():
        if is_local(config.model_name_or_path):
            log.warning("push_to_hub: adapter/ is not uploaded, because its base model is local; the merged model is")
        else:
            yield "adapter/*"


def _command(config: TrainConfig, folder: Path, patterns: Sequence[str]) -> str:
    """Returns the command of the hub's own client that uploads the same files."""
    given = str(as_given(config)["output_dir"])
    place = given if os.path.abspath(given) == str(folder) else str(folder)
    parts = ["hf", "upload", _name(config), place, "."]
    parts += [part for pattern in patterns for part in ("--include", pattern)]
    parts += ["--revision", config.hub_revision] if config.hub_revision else []
    return shlex.join([*parts, *(["--private"] if config.hub_private_repo else [])])


def _told(error: Exception) -> str:
    """Returns the error in one line, with the status and the message of the hub if it has answered."""
    response = getattr(error, "response", None)
    said = getattr(error, "server_message", None) or " ".join(str(error).split())
    return f"{response.status_code} {said}" if response is not None else said or type(error).__name__
