"""Judges whether two answers to a prompt have the same meaning.

A judge is a function that gives the relation of the first answer to the second: entailment, contradiction or neither.
It is an NLI classifier, a comparison of the texts, or a user-defined function; the last two are symmetric.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastrlhf.config import require
from fastrlhf.config.functions import load_function
from fastrlhf.models.loading import DTYPES, resolve_device
from fastrlhf.models.quiet import quiet


class Relation(IntEnum):
    CONTRADICTION = 0
    NEUTRAL = 1
    ENTAILMENT = 2


class Comparison(NamedTuple):
    """The question whether `premise` entails `hypothesis`; both are answers to `prompt`."""

    prompt: str
    premise: str
    hypothesis: str


EquivalenceJudge = Callable[[Sequence[Comparison]], list[Relation]]
"""Comparisons -> the relation of each, in the same order."""

SameMeaning = Callable[[str, str, str], bool]
"""(prompt, answer, answer) -> whether the two answers have the same meaning."""


def open_judge(
    name: str, *, device: str = "auto", dtype: str = "float32", batch_tokens: int = 16384, side_tokens: int = 254
) -> EquivalenceJudge:
    """Opens the judge that `name` describes: `exact`, a function given as module:function or file.py:function, or the
    folder or hub name of an NLI model. Raises ValueError, naming `equivalence`, if it does not exist."""
    if name == "exact":
        return exact_match
    if ":" in name:
        return function_judge(cast(SameMeaning, load_function(name, "equivalence")))
    return NLIJudge(name, device=device, dtype=dtype, batch_tokens=batch_tokens, side_tokens=side_tokens)


def exact_match(comparisons: Sequence[Comparison]) -> list[Relation]:
    """A judge that gives entailment if two answers are equal except for case, punctuation and white space, and
    otherwise contradiction."""
    return [_symmetric(normalised(c.premise) == normalised(c.hypothesis)) for c in comparisons]


def normalised(text: str) -> str:
    kept = text.casefold().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", kept).strip()


def function_judge(same: SameMeaning) -> EquivalenceJudge:
    """Makes a judge from a function that returns whether two answers have the same meaning. The judge raises ValueError
    if the function does not return a bool."""

    def judge(comparisons: Sequence[Comparison]) -> list[Relation]:
        said = [same(*comparison) for comparison in comparisons]
        for value in said:
            require(isinstance(value, bool), "equivalence", value, "a function that returns True or False")
        return list(map(_symmetric, said))

    return judge


class NLIJudge:
    """A judge that uses an NLI model, a sequence classifier with the labels entailment, neutral and contradiction.

    Premise and hypothesis each consist of the prompt and one of the answers. Repeated comparisons are computed once.
    All different comparisons are sorted by length and divided into batches of at most `batch_tokens` tokens including
    padding, because these encoders do not run on packs. The label ids are read from the model's configuration, because
    checkpoints order them differently.
    """

    def __init__(self, source: str, *, device: str, dtype: str, batch_tokens: int, side_tokens: int) -> None:
        """Raises ValueError, naming `equivalence` or `nli_side_tokens`, if the model does not exist or does not fit."""
        try:
            config = AutoConfig.from_pretrained(source)
            self._relations = relations(cast(dict[int, str], config.id2label), source)
            self._tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source))
            with quiet():
                model, loaded = AutoModelForSequenceClassification.from_pretrained(
                    source, dtype=DTYPES[dtype], output_loading_info=True
                )
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"equivalence: {source!r} is not an NLI model in a folder or on the hub: {error}"
            ) from error
        require(not loaded["missing_keys"], "equivalence", source, f"trained; it lacks {loaded['missing_keys']}")
        self._model: PreTrainedModel = model.to(resolve_device(device)).eval()
        self._batch_tokens, self._side_tokens = batch_tokens, side_tokens
        self._longest = 2 * side_tokens + self._tokenizer.num_special_tokens_to_add(pair=True)
        positions = min(getattr(config, "max_position_embeddings", 0) or 1 << 30, self._tokenizer.model_max_length)
        require(
            self._longest <= min(positions, batch_tokens),
            "nli_side_tokens",
            side_tokens,
            f"such that a pair of {self._longest} tokens fits {positions} positions and nli_batch_tokens",
        )

    @torch.no_grad()
    def __call__(self, comparisons: Sequence[Comparison]) -> list[Relation]:
        asked = list(dict.fromkeys(comparisons))
        encoded = self._encode(asked)
        order = sorted(range(len(asked)), key=lambda i: len(encoded[i]["input_ids"]))
        batches = token_batches([len(encoded[i]["input_ids"]) for i in order], self._batch_tokens)
        labels = [self._label([encoded[order[k]] for k in batch]) for batch in batches]
        said = torch.cat(labels).tolist() if labels else []
        known = {asked[i]: self._relations[label] for i, label in zip(order, said, strict=True)}
        return [known[comparison] for comparison in comparisons]

    def _label(self, encoded: list[dict[str, list[int]]]) -> torch.Tensor:
        """Returns [n] int64 on the device, the labels with the highest logits."""
        inputs = self._tokenizer.pad(encoded, return_tensors="pt").to(self._model.device)
        return self._model(**inputs).logits.argmax(-1)

    def _encode(self, comparisons: Sequence[Comparison]) -> list[dict[str, list[int]]]:
        if not comparisons:
            return []
        answers = list(dict.fromkeys((c.prompt, text) for c in comparisons for text in c[1:]))
        sides = dict(zip(answers, self._sides(answers), strict=True))
        encoded = self._tokenizer(
            [sides[c.prompt, c.premise] for c in comparisons],
            [sides[c.prompt, c.hypothesis] for c in comparisons],
            truncation="longest_first",  # joining prompt and answer may have added a token
            max_length=self._longest,
        )
        return [{name: values[i] for name, values in encoded.items()} for i in range(len(comparisons))]

    def _sides(self, answers: Sequence[tuple[str, str]]) -> list[str]:
        """Joins prompt and answer into one text of at most `side_tokens` tokens. The beginning of the prompt is cut
        first, then the end of the answer."""
        prompts, texts = (self._offsets([part[i] for part in answers]) for i in (0, 1))
        sides = []
        for (prompt, answer), in_prompt, in_answer in zip(answers, prompts, texts, strict=True):
            room = self._side_tokens - len(in_answer)
            if room < len(in_prompt):
                prompt = prompt[in_prompt[-room][0] :] if room > 0 else ""
            if room < 0:
                answer = answer[: in_answer[self._side_tokens - 1][1]]
            sides.append(f"{prompt}\n{answer}" if prompt else answer)
        return sides

    def _offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Returns, for each text, the (start, end) of each token in characters."""
        distinct = list(dict.fromkeys(texts))
        offsets = self._tokenizer(distinct, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        known = dict(zip(distinct, cast(list[list[tuple[int, int]]], offsets), strict=True))
        return [known[text] for text in texts]


def relations(id2label: Mapping[int, str], source: str) -> list[Relation]:
    """Returns the relation of each label id, by the name of the label. Raises ValueError if the labels do not name the
    three relations."""
    found = [
        [relation for relation in Relation if label.upper().startswith(relation.name[:6])]
        for _, label in sorted((int(i), label) for i, label in id2label.items())
    ]
    ids = [kinds[0] for kinds in found if kinds]
    if sorted(ids) != list(Relation) or len(found) != len(ids):
        raise ValueError(
            f"equivalence: {source!r} names its labels {', '.join(id2label.values())}; id2label in its config must "
            "name contradiction, neutral and entailment"
        )
    return ids


def token_batches(lengths: Sequence[int], budget: int) -> list[range]:
    """Divides items of ascending lengths into consecutive batches whose padded size, number of items times longest
    item, is at most `budget`."""
    batches, start = [], 0
    for i, length in enumerate(lengths):
        if (i + 1 - start) * length > budget and i > start:
            batches.append(range(start, i))
            start = i
    return [*batches, range(start, len(lengths))] if lengths else []


def _symmetric(same: bool) -> Relation:
    return Relation.ENTAILMENT if same else Relation.CONTRADICTION
