"""Defines reward models, a scalar head on the backbone, for model families without a sequence-classification class in
transformers.

The folder of a saved model gets a copy of this file, so that `AutoModelForSequenceClassification.from_pretrained` of
plain transformers can load the model with `trust_remote_code=True`. The file imports only torch and transformers.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Linear
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


def scorer_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Returns the class of reward models for this backbone: transformers' sequence classifier if its head is one linear
    map `score`, otherwise a class made here.

    Raises ValueError if the configuration is not that of a causal language model.
    """
    found: Any = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    if found is not None and _has_linear_score(found, config):
        return found
    causal: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if causal is None:
        raise ValueError(f"{config.model_type}: transformers has no causal language model of this type")
    return _scorer_over(causal)


class RewardModel:
    """The class through which plain transformers loads a saved model: `auto_map` in the model's config.json names
    it."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, config: PretrainedConfig, **settings: Any) -> PreTrainedModel:
        return scorer_class(config).from_pretrained(*arguments, config=config, **settings)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Does nothing; transformers calls it before `from_pretrained`."""


def _has_linear_score(kind: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    try:
        with torch.device("meta"):
            head = getattr(kind(config), "score", None)
    except Exception:  # the code of a model family may raise any exception for an unusual configuration
        return False
    return isinstance(head, Linear) and head.bias is None


@cache
def _scorer_over(causal: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Returns a class derived from a causal language model, with a score head in place of the head over the
    vocabulary."""

    def __init__(self: Any, config: PretrainedConfig) -> None:
        cast(Any, causal).__init__(self, config)
        head = causal.get_output_embeddings(self)
        for parent in list(self.modules()):
            for name, module in list(parent.named_children()):
                if module is head:
                    setattr(parent, name, torch.nn.Identity())
        self.num_labels = num_labels = cast(int, config.num_labels)
        self.score = Linear(width(config, head), num_labels, bias=False)
        self._tied_weights_keys = self.all_tied_weights_keys = {}
        self._init_weights(self.score)

    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Any:
        if attention_mask is not None:
            others["attention_mask"] = attention_mask
        scores = self.score(_backbone(self)(input_ids=input_ids, **others).last_hidden_state)
        last = torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)
        padding = self.config.get_text_config().pad_token_id
        if padding is not None:
            at = torch.arange(input_ids.shape[1], device=input_ids.device)
            last = ((input_ids != padding).int() * at).argmax(1)
        return SequenceClassifierOutputWithPast(logits=scores[torch.arange(len(last), device=last.device), last])

    def save_pretrained(self: Any, save_directory: Any, **settings: Any) -> None:
        causal.save_pretrained(self, save_directory, **settings)
        here, path = Path(__file__), Path(save_directory) / "config.json"
        entry = {"AutoModelForSequenceClassification": f"{here.stem}.{RewardModel.__name__}"}
        config = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": entry}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copyfile(here, path.with_name(here.name))

    def get_output_embeddings(self: Any) -> None:
        return None

    def _init_weights(self: Any, module: torch.nn.Module) -> None:
        if module is not self:  # for the whole model, some families initialise the head, which is no longer there
            cast(Any, causal)._init_weights(self, module)

    body = {
        "__init__": __init__,
        "forward": forward,
        "save_pretrained": save_pretrained,
        "get_output_embeddings": get_output_embeddings,
        "_init_weights": _init_weights,
        # If this is True, transformers does not initialise buffers of modules that have no weights themselves.
        "is_custom_code": classmethod(lambda cls: False),
        "__module__": __name__,
        "_tied_weights_keys": {},
    }
    name = causal.__name__.replace("ForCausalLM", "").replace("ForConditionalGeneration", "").replace("LMHeadModel", "")
    scorer = cast("type[PreTrainedModel]", type(f"{name}ForSequenceClassification", (causal,), body))
    return scorer


def _backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the backbone. `base_model` is not enough: it is the whole model if the prefix that the class declares is
    not the name of the backbone."""
    if (base := model.base_model) is not model:
        return cast(PreTrainedModel, base)
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def width(config: PretrainedConfig, head: Any = None) -> int:
    """Returns the size of the backbone's last hidden states. If the configuration does not give it, it is the input
    size of the language-model head."""
    text = config.get_text_config()
    for source in (text, config):
        for name in ("hidden_size", "d_model", "n_embd", "dim"):
            if isinstance(size := getattr(source, name, None), int):
                return size
    if head is not None:
        return head.weight.shape[1]
    raise ValueError(f"{config.model_type}: the size of its hidden states is not known")
