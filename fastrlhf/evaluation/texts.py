"""Encodes prompts and responses for evaluations in which models and judge have different tokenizers."""

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
    """The prompts as one model reads them, encoded by its tokenizer."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    rows: list[TokenizedExample] = field(repr=False)


def ask_all(
    config: EvalConfig, tokenizer: PreTrainedTokenizerBase, data: Data, fields: Sequence[str]
) -> dict[str, Asked]:
    """Returns, by name, the encoded rows for each of `config.models` and for the opponent. All get the same rows: those
    that leave every model room for a response.

    Rows are encoded by the tokenizer saved with each model or, if `tokenizer_name_or_path` is set, by that tokenizer
    for all models. `data` holds the rows encoded by `tokenizer`.
    """
    rows_of: dict[str, tuple[PreTrainedTokenizerBase, Sequence[TokenizedExample]]] = {"": (tokenizer, data.eval)}
    for name in () if config.tokenizer_name_or_path else config.models:
        own = own_tokenizer(name, config)
        found = own and difference(tokenizer, own, conversations=data.conversations)
        if own and found:
            log.info("models: %s has another tokenizer than the first model (%s); it uses its own", name, found.told)
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
    """Encodes the prompts and responses of models for the judge, which may have a different tokenizer."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    differs: bool
    """Whether the judge's tokenizer differs from the tokenizer of the first model."""
    conversations: bool
    rules: TextRules

    @classmethod
    def open(cls, config: EvalConfig, tokenizer: PreTrainedTokenizerBase, data: Data) -> JudgeTexts:
        """Opens the judge's tokenizer. Raises ValueError if it has no EOS and does not know the EOS of the models
        either."""
        source = config.reward_model_path
        found = judge_tokenizer(JUDGE, source, tokenizer, config, conversations=data.conversations)
        if found:
            log.info(
                "%s: its tokenizer differs from that of the models (%s); texts are re-encoded", JUDGE, found[1].told
            )
        return cls(
            tokenizer=found[0] if found else tokenizer,
            differs=found is not None,
            conversations=data.conversations,
            rules=data.rules,
        )

    def reader(self, asked: Asked) -> TextReader | None:
        """Returns the reader that re-encodes the texts of a model; None if the judge can read the model's token ids."""
        if difference(asked.tokenizer, self.tokenizer, conversations=self.conversations) is None:
            return None
        return open_reader(JUDGE, asked.tokenizer, self.tokenizer, asked.rows, self.rules)

    def column(self, rows: Sequence[TokenizedExample], name: str) -> Texts:
        """Returns the prompts, and the responses in the column `name`, as ids of the judge's tokenizer."""
        sources = [row.source for row in rows if row.source is not None]
        examples = [_only(source, name) for source in sources]
        made = judge_rows(JUDGE, examples, self.tokenizer, ["reference"], self.rules)
        return [(row.prompt, row.reference) for row in made if row.reference is not None]


def _only(example: Example, name: str) -> Example:
    return replace(example, chosen=None, rejected=None, reference=getattr(example, name))
