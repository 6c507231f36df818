"""Writes the text of a model card: README.md, whose YAML header the hub reads.

The text depends only on the configuration, the data and the metrics of a run, and on the versions of the libraries, so
a resumed run has the card of an uninterrupted one. Paths of the machine are shortened to the name of the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache

from fastrlhf import __version__
from fastrlhf.config import CONFIGS, RewardConfig, TrainConfig
from fastrlhf.config.compare import SAME_MODEL
from fastrlhf.config.paths import FUNCTIONS, as_given
from fastrlhf.config.sources import weighted
from fastrlhf.data.rows import is_local
from fastrlhf.publish.methods import methods_of
from fastrlhf.publish.papers import PAPERS

MARK = "<!-- fastrlhf wrote this card. Delete this line before you edit the text. -->"
"""Line by which fastrlhf recognises its own cards."""

ALWAYS = (
    *("model_name_or_path", "dataset_name", "train_batch_size", "learning_rate", "num_train_epochs"),
    *("max_steps", "lr_scheduler_type", "max_length", "dtype", "seed"),
)
"""Keys that a card shows even if they have their defaults."""

LAST = (
    *("loss", "accuracy", "margin", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
    *("objective/scores", "objective/rewards", "objective/kl", "objective/entropy", "num_tokens"),
)
"""The metrics of the last training step that a card shows."""

BESIDE = {
    "value_model": ("Critic", "critic", "critic_model_path"),
    "dpo_model": ("Token reward model", "token-reward", "dpo_model_path"),
}
"""Folder beside the policy -> the kind of model that it holds, a tag, and the key that can name it in a later run."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """The model card of a run, and the values that its text depends on."""

    config: TrainConfig
    datasets: tuple[str, ...]
    """Hub names, files and folders of the training rows; empty for rows given in Python."""
    num_train: int
    num_eval: int
    """Number of evaluation rows after tokenisation; `num_train` is the number of training rows."""
    final: Mapping[str, float]
    """Metrics of the last evaluation, or of the best evaluation if the model has the weights of that step; empty
    without held-out rows."""
    last: Mapping[str, float]
    """Metrics of the last step."""
    steps: int
    """Number of optimiser steps (on-policy: updates) of the run; fewer than configured if the run stopped early."""
    best_step: int | None = None
    """Step of the best evaluation if the model has the weights of this step; None if it has the last weights."""
    beside: str = ""
    """Key of BESIDE, for the card of a model that was trained beside the policy."""

    def text(self) -> str:
        """Returns the card of the trained model."""
        if self.beside:
            return self._beside_text("The folder above this one holds the policy; its card describes the run.")
        name, base = self._title(), self.config.model_name_or_path
        scores = isinstance(self.config, RewardConfig)
        data = self._metadata("transformers", "text-classification" if scores else "text-generation")
        data.model_name, data.eval_results = name, self._results(data.pipeline_tag) or None
        kind = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
        code = [
            f"from transformers import {kind}, AutoTokenizer\n",
            f"model = {kind}.from_pretrained({self._place()})",
            f"tokenizer = AutoTokenizer.from_pretrained({self._place()})",
        ]
        start = _link(base) if base else self._start()
        names = "; ".join(method.name for method in methods_of(self.config))
        trained = f"This model is {start} after training with `fastrlhf {_command(self.config)}`: {names}."
        if scores:
            trained += " Its only logit is the score of a prompt with a response."
        return self._page(data, name, trained, code)

    def adapter_text(self) -> str:
        """Returns the card of the adapter of the trained model."""
        if self.beside:
            return self._beside_text("This adapter is merged into the model in the folder above this one.")
        base = self.config.model_name_or_path
        data = self._metadata("peft", None)
        kind = "AutoModelForSequenceClassification" if isinstance(self.config, RewardConfig) else "AutoModelForCausalLM"
        shown = shown_path(base) if base else FOLDER
        arguments = ", num_labels=1" if isinstance(self.config, RewardConfig) else ""
        code = [
            f"from peft import PeftModel\nfrom transformers import {kind}\n",
            f'base = {kind}.from_pretrained("{shown}"{arguments})',
            f"model = PeftModel.from_pretrained(base, {self._place('adapter')})",
        ]
        told = f"This low-rank adapter was trained by fastrlhf over {_link(base) if base else self._start()}."
        told += " The folder above this one holds the model with the adapter merged into its weights."
        return self._page(data, f"{self._title()}, adapter", told, code)

    def _beside_text(self, where: str) -> str:
        what, tag, key = BESIDE[self.beside]
        told = f"{what} that a run of fastrlhf {__version__} trained together with a policy. {where}"
        told += f" The key `{key}` of a later run can name the folder `{self.beside}`."
        return _joined(
            ModelCardData(library_name="transformers", tags=["fastrlhf", tag]), f"# {what} of {self._title()}", told
        )

    def _page(self, data: ModelCardData, title: str, told: str, code: list[str]) -> str:
        use = "\n".join(["```python", *code, "```"])
        parts = [f"# {title}", told, "## Use", use, "## Data", self._data(), "## Method", self._method()]
        parts += ["## Settings", self._settings(), "## Results", self._shown_results(), "## Versions", _versions()]
        return _joined(data, *parts, *self._citation())

    def _place(self, folder: str = "") -> str:
        """Returns the arguments of `from_pretrained` that load the model: the repository if it is uploaded, otherwise a
        placeholder for its folder."""
        named, branch = self.config.hub_model_id, self.config.hub_revision
        arguments = [f'"{named or FOLDER}"']
        arguments += [f'subfolder="{folder}"'] if named and folder else []
        return ", ".join([*arguments, *([f'revision="{branch}"'] if named and branch else [])])

    def _title(self) -> str:
        if self.config.hub_model_id:
            return self.config.hub_model_id.rpartition("/")[2]
        start = shown_path(self.config.model_name_or_path).rpartition("/")[2] or "model"
        return f"{start}-{_command(self.config)}"

    def _start(self) -> str:
        return "a model with random weights" if self.config.model_config else "a model given in Python"

    def _metadata(self, library: str, task: str | None) -> ModelCardData:
        base = self.config.model_name_or_path
        known = _front_matter(base)
        ancestor = known.get("base_model") if known.get(OURS) else None
        licence: dict[str, Any] = _license(known)
        return ModelCardData(
            base_model=base if base and not is_local(base) else ancestor,
            datasets=[name for name in self.datasets if not is_local(name)] or None,
            library_name=library,
            pipeline_tag=task,
            tags=["fastrlhf", _command(self.config), *(method.tag for method in methods_of(self.config))],
            **licence,
        )

    def _results(self, task: str | None) -> list[EvalResult]:
        held_out = self.config.dataset_test_split or self.config.dataset_train_split
        hub = [name for name in self.datasets if not is_local(name)]
        shown = ", ".join(map(shown_path, self.datasets)) or IN_PYTHON
        return [
            EvalResult(
                task_type=task or "text-generation",
                dataset_type=hub[0] if len(hub) == 1 == len(self.datasets) else "local",
                dataset_name=f"{shown}, {self.num_eval} held-out rows",
                dataset_split=held_out if self.datasets else None,
                metric_type=name.removeprefix("eval_"),
                metric_name=name,
                metric_value=float(f"{value:.6g}"),
            )
            for name, value in self.final.items()
            if math.isfinite(value)
        ]

    def _data(self) -> str:
        config = self.config
        named = [_link(name, "datasets/") for name in self.datasets] or [IN_PYTHON]
        if self.datasets:
            entries = weighted(config.dataset_name) or [None] * len(named)
            splits = [entry.split if entry and entry.split else config.dataset_train_split for entry in entries]
            named = [f"{name}, split `{split}`" for name, split in zip(named, splits, strict=True)]
        held_out = f", evaluated on {self.num_eval} held-out rows" if self.num_eval else ", without an evaluation"
        return "\n".join([*(f"- {name}" for name in named), "", f"Trained on {self.num_train} rows{held_out}."])

    def _method(self) -> str:
        lines = []
        for method in methods_of(self.config):
            cited = [PAPERS[key].link for key in method.papers]
            source = (
                ", ".join([", ".join(part for part in (cited[0], method.source) if part), *cited[1:]]) if cited else ""
            )
            equation = f": `{method.equation}`" if method.equation else ""
            lines.append(f"- {method.name}{f' ({source})' if source else ''}{equation}")
        return "\n".join(lines)

    def _settings(self) -> str:
        dumped = yaml.safe_dump(shown_settings(self.config), sort_keys=False, allow_unicode=True)
        told = f"`fastrlhf {_command(self.config)} --config FILE` with these keys; all other keys have the defaults of"
        return f"{told} fastrlhf {__version__}.\n\n```yaml\n{dumped}```"

    def _shown_results(self) -> str:
        lines = []
        if self.final:
            best = f"Best evaluation, after step {self.best_step}, whose weights the model has"
            which = "Last evaluation" if self.best_step is None else best
            lines += [f"{which}, on {self.num_eval} held-out rows; losses and log-probs in nats:", ""]
            lines += [*_table(self.final), ""]
        shown = {name: self.last[name] for name in LAST if name in self.last}
        return "\n".join([*lines, f"Last training step ({self.steps}):", "", *_table(shown)])

    def _citation(self) -> list[str]:
        keys = dict.fromkeys(key for method in methods_of(self.config) for key in method.papers)
        entries = [PAPERS[key].bibtex(key) for key in keys]
        return ["## Citation", "\n".join(["```bibtex", "\n\n".join(entries), "```"])] if entries else []


FOLDER = "path/to/this/folder"
IN_PYTHON = "rows given in Python"
OURS = "written by fastrlhf"
"""Key that `_front_matter` adds to the header of a card that fastrlhf wrote."""


def shown_settings(config: TrainConfig) -> dict[str, Any]:
    """Returns the keys that a card shows, with the paths of the machine shortened to names, and with the batch of a
    step over all processes."""
    defaults = {field.name: field.default for field in fields(config)} | dict.fromkeys(ALWAYS)
    left_out = (*SAME_MODEL, "per_device_train_batch_size", "gradient_accumulation_steps")
    values = {
        key: _shown(key, value)
        for key, value in (as_given(config) | {"train_batch_size": config.batch_size}).items()
        if key not in left_out and getattr(config, key) != defaults[key]
    }
    return {key: value for key, value in values.items() if value != "" and value != []}


def shown_path(text: str) -> str:
    """Returns a hub name unchanged, and only the last part of a path."""
    return Path(text).name if text.startswith(("$", "~", "/", ".")) or is_local(text) else text


def _shown(key: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_shown(key, item) for item in value]
    if isinstance(value, Mapping):
        return {name: _shown(key, item) for name, item in value.items() if item is not None}
    if not isinstance(value, str):
        return value
    if key == "chat_template":
        return Path(value).name if len(value) < 1000 and os.path.exists(os.path.expanduser(value)) else value
    if key in FUNCTIONS:
        path, colon, function = value.rpartition(":")
        return f"{shown_path(path)}{colon}{function}" if colon else value
    named = key.endswith("_path") or key == "dataset_name"
    return shown_path(value) if named or os.path.isabs(value) else value


def _front_matter(model: str) -> dict[str, Any]:
    """Returns the header of the card of a model, from its folder or from the hub's cache; empty if there is none."""
    if not model:
        return {}
    local = Path(model).expanduser() / "README.md"
    file = local if is_local(model) else try_to_load_from_cache(model, "README.md")
    try:
        if not isinstance(file, (str, Path)) or not os.path.exists(file):
            return {}
        found = metadata_load(file) or {}
        return found | {OURS: True} if is_ours(Path(file)) else found
    except (OSError, ValueError, yaml.YAMLError):  # a card of another program may be damaged
        return {}


def is_ours(card: Path) -> bool:
    """Returns whether fastrlhf wrote the card and the card still has its mark."""
    return MARK in card.read_text(encoding="utf-8", errors="replace")


def _license(known: Mapping[str, Any]) -> dict[str, str]:
    """Returns the licence of the model that a run starts from, if the model's card names a licence; empty if the card
    only refers to a file in the model's folder."""
    found = {key: known.get(key) for key in ("license", "license_name", "license_link")}
    named = {key: value for key, value in found.items() if isinstance(value, str)}
    if "license" not in named or (named["license"] == "other" and "http" not in named.get("license_link", "")):
        return {}
    return named


def _command(config: TrainConfig) -> str:
    return next(command for command, kind in CONFIGS.items() if kind is type(config))


def _link(name: str, kind: str = "") -> str:
    return f"`{shown_path(name)}`" if is_local(name) else f"[{name}](https://huggingface.co/{kind}{name})"


def _table(metrics: Mapping[str, float]) -> list[str]:
    return ["| metric | value |", "|---|---|", *(f"| `{name}` | {value:.4g} |" for name, value in metrics.items())]


def _versions() -> str:
    found = {name: version(name) for name in ("torch", "transformers", "tokenizers", "datasets", "peft")}
    return "\n".join(f"- {name} {number}" for name, number in ({"fastrlhf": __version__} | found).items())


def _joined(data: ModelCardData, *parts: str) -> str:
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", MARK, *parts]) + "\n"
