"""Prompts and responses for models and judges of different tokenizers: each reads the text with its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from fastrlhf.config import EvalConfig
from fastrlhf.data.identity import difference, judge_tokenizer, own_tokenizer
from fastrlhf.data.reading import TextReader, Texts, judge_rows, open_reader
from fastrlhf.data.tokens import TextRules
from fastrlhf.runtime.inputs import Data, with_room, with_tokenizer
from fastrlhf.types import Example, TokenizedExample

log = logging.getLogger(__name__)

JUDGE = "reward_model_path"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The rows as one model reads them."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    rows: list[TokenizedExample] = field(repr=False)


def ask_all(
    config: EvalConfig, tokenizer: PreTrainedTokenizerBase, data: Data, fields: Sequence[str]
) -> dict[str, Asked]:
    """The rows for each of `config.models`, and for a column of responses as `opponent`: the same rows for all, those
    that leave every model room for a response.

    A model reads them with the tokenizer saved with it, unless `tokenizer_name_or_path` names one for all. `data` holds
    them as `tokenizer` writes them.
    """
    rows_of: dict[str, tuple[PreTrainedTokenizerBase, list[TokenizedExample]]] = {"": (tokenizer, data.eval)}
    for name in () if config.tokenizer_name_or_path else config.models:
        own = own_tokenizer(name, config)
        found = own and difference(tokenizer, own, conversations=data.conversations)
        if own and found:
            log.info("models: %s has another tokenizer than the first (%s): it reads its own", name, found.told)
            rows_of[name] = (own, with_tokenizer(config, data, fields, own).eval)
    roomy = {
        name: with_room(rows, "eval", config.max_length, config.response_length) for name, (_, rows) in rows_of.items()
    }
    everywhere = set.intersection(*({id(row.source) for row in rows} for rows in roomy.values()))
    asked = {
        name: Asked(tokenizer=rows_of[name][0], rows=[row for row in rows if id(row.source) in everywhere])
        for name, rows in roomy.items()
    }
    if not everywhere:
        raise ValueError("max_length: no row leaves room for a response under the tokenizers of all models")
    if fewer := max(map(len, roomy.values())) - len(everywhere):
        log.warning("eval: %d rows do not fit max_length under every tokenizer and are left out for all models", fewer)
    return {name: asked.get(name, asked[""]) for name in dict.fromkeys((*config.models, config.opponent))}


@dataclass(frozen=True, kw_only=True)
class JudgeTexts:
    """How the judge reads what models of any tokenizer wrote."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    differs: bool
    """Whether it is another one than that of the first model."""
    conversations: bool
    rules: TextRules

    @classmethod
    def open(cls, config: EvalConfig, tokenizer: PreTrainedTokenizerBase, data: Data) -> JudgeTexts:
        """Raises ValueError where the judge names no token that ends a text and does not know that of the models."""
        source = config.reward_model_path
        found = judge_tokenizer(JUDGE, source, tokenizer, config, conversations=data.conversations)
        if found:
            log.info("%s: another tokenizer than that of the models (%s): it reads the text", JUDGE, found[1].told)
        return cls(
            tokenizer=found[0] if found else tokenizer,
            differs=found is not None,
            conversations=data.conversations,
            rules=data.rules,
        )

    def reader(self, asked: Asked) -> TextReader | None:
        """None where the judge reads the ids of the model."""
        if difference(asked.tokenizer, self.tokenizer, conversations=self.conversations) is None:
            return None
        return open_reader(JUDGE, asked.tokenizer, self.tokenizer, asked.rows, self.rules)

    def column(self, rows: Sequence[TokenizedExample], name: str) -> Texts:
        """A column of responses in the ids of the judge."""
        sources = [row.source for row in rows if row.source is not None]
        examples = [_only(source, name) for source in sources]
        made = judge_rows(JUDGE, examples, self.tokenizer, ["reference"], self.rules)
        return [(row.prompt, row.reference) for row in made if row.reference is not None]


def _only(example: Example, name: str) -> Example:
    return replace(example, chosen=None, rejected=None, reference=getattr(example, name))
