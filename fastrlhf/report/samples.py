"""Samples of an on-policy run with the reward of each token, as rows of samples.jsonl and as coloured text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fastrlhf.report.charts import format_number
from fastrlhf.report.page import token_markup
from fastrlhf.types import Experience, Rollout

OF_THE_RESPONSE = ("score", "missing_eos")
"""Rewards for the whole response, which are given to its last token. The colours leave them out, because all other
rewards would look faint beside them."""

STRONGEST = 60
"""Opacity, in per cent, of the colour behind the tokens with the largest rewards; text stays readable on it in both
themes."""

QUANTILE = 0.95
"""Quantile of the absolute token rewards at which the colour reaches full strength; the largest value is not used,
because a single outlier would make all other tokens look faint."""


def sample_rows(
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Sequence[Rollout],
    experience: Experience,
    count: int,
    extra: Mapping[str, Sequence[Any]] | None = None,
) -> list[dict[str, Any]]:
    """Returns the rows of samples.jsonl for the first `count` episodes: row, prompt, reset, response, score, the
    `tokens` of the response as text, and the `rewards` of each token by name, those of `Experience.rewards` rounded to
    five digits. `extra`: further columns, with one value per episode; a value that JSON cannot hold is written as
    text."""
    assert experience.scores is not None
    names = list(experience.rewards)
    paid = torch.stack(list(experience.rewards.values())).tolist() if names else []
    ends = experience.cu_rows.tolist()[1:]
    found = []
    scores = experience.scores[:count].tolist()
    for i, (rollout, score, end) in enumerate(zip(rollouts[:count], scores, ends, strict=False)):
        ids, num = rollout.prefix.token_ids, len(rollout.completion)
        cut = len(ids) - rollout.prefix.num_reset
        found.append(
            {
                "row": rollout.prefix.row,
                "prompt": tokenizer.decode(ids[:cut]),
                "reset": tokenizer.decode(ids[cut:]),
                "response": tokenizer.decode(rollout.completion),
                "score": score,
                "tokens": token_texts(tokenizer, rollout.completion),
                "rewards": {
                    name: [float(f"{value:.5g}") for value in values[end - num : end]]
                    for name, values in zip(names, paid, strict=True)
                },
            }
            | {name: _plain(values[i]) for name, values in (extra or {}).items() if i < len(values)}
        )
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def has_token_rewards(row: Mapping[str, Any]) -> bool:
    """Returns whether a row of samples.jsonl has token rewards in the form that `sample_rows` writes."""
    tokens, rewards = row.get("tokens"), row.get("rewards")
    return (
        isinstance(tokens, list)
        and isinstance(rewards, dict)
        and all(isinstance(token, str) for token in tokens)
        and all(isinstance(values, list) and len(values) == len(tokens) for values in rewards.values())
        and all(isinstance(value, int | float) for values in rewards.values() for value in values)
    )


def token_samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """Renders a legend and every sample as text in which each token is coloured by its reward; a tooltip shows the
    rewards by name. All `rows` must satisfy `has_token_rewards`."""
    earned = [_of_tokens(row) for row in rows]
    sizes = np.abs(np.concatenate([np.zeros(1), *earned]))
    scale = float(np.quantile(sizes[sizes > 0], QUANTILE)) if sizes.any() else 0.0
    return _legend(scale) + "".join(_sample(row, values, scale) for row, values in zip(rows, earned, strict=True))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Returns the text of each token within the decoded sequence. A character that consists of several tokens belongs
    to the last of them."""
    texts, start, shown = [], 0, ""
    for i in range(len(ids)):
        text = _decode(tokenizer, ids[start : i + 1])
        whole = not text.endswith("\ufffd") or i + 1 == len(ids)
        texts.append(text.removeprefix(shown) if whole else "")
        if whole:
            start, shown = i, _decode(tokenizer, ids[i : i + 1])
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _of_tokens(row: Mapping[str, Any]) -> np.ndarray:
    """Returns [tokens], the sum of the rewards of each token, without the rewards for the whole response."""
    own = [values for name, values in row["rewards"].items() if name not in OF_THE_RESPONSE]
    return np.array(own, dtype=np.float64).reshape(len(own), len(row["tokens"])).sum(axis=0)


def _legend(scale: float) -> str:
    shares = (-1, -0.5, 0, 0.5, 1)
    shades = " ".join(_colored(f"{x * scale:+.2g}" if x else "0", x * scale, scale) for x in shares)
    told = (
        f"The colour behind a token shows its reward, including coefficients: {shades} "
        "and beyond. The score and the penalty for a missing EOS belong to the whole response and do not change the "
        "colour. Rest the mouse on a token to see its rewards by name."
    )
    given = (
        'Grey text was not sampled: the <span class="given">prompt</span> and the tokens of a '
        '<span class="prompt">reset</span>.'
    )
    return f'<p class="legend tokens">{told} {given}</p>'


def _sample(row: Mapping[str, Any], earned: np.ndarray, scale: float) -> str:
    facts = [f"{name} {_short(row[name])}" for name in ("step", "row", "score") if name in row]
    facts.append(f"reward {format_number(sum(map(sum, row['rewards'].values())))}")
    given = f'<span class="given">{escape(str(row.get("prompt", "")))}</span>'
    if row.get("reset"):
        given += f'<span class="prompt">{escape(str(row["reset"]))}</span>'
    tokens = "".join(
        _colored(token_markup(text), value, scale, _named(row["rewards"], i))
        for i, (text, value) in enumerate(zip(row["tokens"], earned, strict=True))
    )
    return f'<article><h3>{escape(", ".join(facts))}</h3><p class="tokens">{given}{tokens}</p></article>\n'


def _named(rewards: Mapping[str, Sequence[float]], i: int) -> str:
    """Formats the rewards of token i that are not 0, for example "dpo +0.12, kl -0.01"."""
    return ", ".join(f"{name} {values[i]:+.3g}" for name, values in rewards.items() if values[i]) or "0"


def _colored(markup: str, value: float, scale: float, hover: str = "") -> str:
    share = round(STRONGEST * min(abs(value) / scale, 1.0)) if scale else 0
    shade = f' class="{"gain" if value > 0 else "loss"}" style="--w:{share}%"' if share else ""
    title = f' title="{escape(hover)}"' if hover else ""
    return f"<span{shade}{title}>{markup}</span>"


def _short(value: Any) -> str:
    return format_number(value) if isinstance(value, float) else str(value)
