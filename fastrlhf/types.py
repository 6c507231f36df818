"""The data types of a run, in the order in which they occur.

    row of a file -> Example -> TokenizedExample -> Prefix -> Rollout -> PackedBatch, Experience -> loss

Legend, the same in every file:
    T  tokens of a pack            V  vocabulary
    N  sequences of a pack         D  hidden size
    R  scored rows of a pack       B  preference pairs
Three policies are distinguished: `policy` (trained), `sampler` (the weights that generated), `reference` (frozen).

Log-probs, rewards, values and advantages are float32 for weights of every dtype; log-probs are in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

Message = dict[str, Any]
"""One turn of a conversation: `{"role": ..., "content": ...}`, and other keys that a chat template may read."""

EndIds = int | Sequence[int]
"""The token id, or the ids, that end a response."""

Text = str | list[Message]
"""Plain text, or the turns of a conversation that a chat template will render."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One usable row of a dataset, independent of the form in which it was stored.

    A conversation keeps its turns: `prompt` is then a list of messages, and so is every response, which begins and ends
    with a turn of the assistant.
    """

    prompt: Text
    chosen: Text | None = None
    """The preferred response of a pair."""
    rejected: Text | None = None
    reference: Text | None = None
    """A demonstration: the response that SFT learns and from which a reset may copy."""
    label: bool | None = None
    """Whether the reference is a desirable response (KTO)."""
    label_prob: float | None = None
    """Probability that the chosen response is the better one, in 0..1."""
    margin: float | None = None
    """How much better the chosen response is."""
    responses: list[Text] | None = None
    """K responses to the prompt, judged by `preferences` or `scores`."""
    preferences: list[list[float]] | None = None
    """[K][K]: the probability that response i is better than response j."""
    scores: list[float] | None = None
    """[K]: a reward or a rating of each response."""
    wins: int | None = None
    """Number of comparisons that chosen won, out of `num_labels`."""
    num_labels: int | None = None
    row: int = -1
    """Position in the source, counted from 0, which identifies this example in messages and in random draws. -1:
    unknown; trainers replace it by the position in their list of examples."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """Variables that the row passes to the chat template in addition to the turns: `tools`, `documents`,
    `chat_template_kwargs`."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """All columns of the row except the prompt, by their names in the file; reward functions may read them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedExample:
    """An Example as token ids. Prompt and responses are tokenised separately; a sequence is the prompt followed by a
    response. A response ends with an end token, which is added if the text has none, unless it was cut at `max_length`.
    """

    prompt: list[int]
    chosen: list[int] | None = None
    rejected: list[int] | None = None
    reference: list[int] | None = None
    label: bool | None = None
    label_prob: float | None = None
    margin: float | None = None
    responses: list[list[int]] | None = None
    preferences: list[list[float]] | None = None
    scores: list[float] | None = None
    wins: int | None = None
    num_labels: int | None = None
    trained: Mapping[str, list[int]] | None = None
    """Name of a response ("chosen", "responses[0]") -> indices of its trained tokens, in order. Only responses with
    untrained tokens (turns of tools and users between the assistant turns) have an entry."""
    row: int

    source: Example | None = field(default=None, compare=False, repr=False)
    """The example before tokenisation; kept only if reward functions, or a judge with another tokenizer, read its text.
    """

    def scored(self, name: str) -> list[int] | None:
        """Indices of the trained tokens of a response; None: all."""
        return (self.trained or {}).get(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Where an episode starts: after the prompt and the first `num_reset` tokens of a response.

    prompt [7, 8], response [1, 2, 3, 0], k = 1  ->  token_ids [7, 8, 1], num_reset 1
    """

    token_ids: list[int]
    num_reset: int
    """Number of reset tokens at the end of `token_ids`; 0: an ordinary episode, which starts after the prompt."""
    reset_depth: float = 0.0
    """`num_reset` divided by the length of the response that the reset was copied from, in 0..1."""
    row: int
    """Row number of the example."""
    episode: int
    """Number of the episode, unique in the run; the random draws of the episode are keyed by it."""
    temperature: float | None = None
    """Temperature at which this episode is sampled and scored; None: the temperature of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """The tokens that the sampler generated after a prefix."""

    prefix: Prefix
    completion: list[int]
    """Sampled tokens, including the EOS if it was sampled; never empty."""
    sampler_logprob: list[float]
    """Log-prob of each sampled token in nats, under the distribution from which it was drawn."""
    ended: bool
    """True if an end token was sampled (the last token, unless the engine samples past it) or a stop string was
    reached; False if the length limit was reached."""
    kept: Sequence[np.ndarray] | None = field(default=None, compare=False)
    """If the sampler truncates its distribution (top_k, top_p, min_p): for each sampled token, the ids of the tokens
    that could have been drawn in its place, itself included; int32. None: all tokens of the vocabulary."""


class KeptTokens(NamedTuple):
    """The tokens that truncated sampling kept at each row of a pack."""

    ids: Tensor
    """[K] int64, the ids of the kept tokens of all rows, row after row"""
    cu_rows: Tensor
    """(R+1,) int64: ids cu_rows[r] .. cu_rows[r+1] belong to row r"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive tokens that are computed once; a pack is a forest of segments.

    A root has no parent. A child continues the first `cut` tokens of an earlier segment `parent` of the same pack: it
    attends to these tokens, to the tokens that they attend to, and to itself. For example the prompt of a pair and its
    two responses:

        segments        Segment([7, 8])   Segment([1, 0], parent=0, cut=2)   Segment([2, 0], parent=0, cut=2)
        token_ids       7 8 | 1 0 | 2 0
        positions       0 1 | 2 3 | 2 3
    """

    token_ids: Sequence[int]
    num_scored: int = 0
    """The last `num_scored` tokens are scored: each gives one row of the pack."""
    scored: Sequence[int] | None = None
    """Indices of the scored tokens, in order; None: the last `num_scored` tokens are scored."""
    parent: int = -1
    """Index of the segment that this one continues; -1 for a root."""
    cut: int = 0
    """Number of first tokens of the parent that come before this segment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """The arguments of one variable-length attention call that computes a pack of S segments: which tokens attend to
    which others.

    The call is causal and aligned at the bottom right, as in FlashAttention. The queries of segment i are rows
    cu_seqlens[i] .. cu_seqlens[i+1] of the pack. Its keys are the rows of the pack that `key_index` lists at
    cu_seqlens_k[i] .. cu_seqlens_k[i+1]; without `key_index` they are these rows themselves.
    """

    cu_seqlens: Tensor
    """(S+1,) int32, limits of the queries of each segment"""
    cu_seqlens_k: Tensor
    """(S+1,) int32, limits of the keys of each segment"""
    key_index: Tensor | None
    """(K,) int64 rows of the pack whose keys and values are gathered; None if no segment has a parent."""
    query_lengths: tuple[int, ...]
    """Number of queries of each segment, for kernel launches and for backends without a variable-length kernel."""
    key_lengths: tuple[int, ...]
    """Number of keys of each segment, for the same uses as `query_lengths`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Flat tensors of several sequences; nothing is padded.

    A *sequence* is a leaf of the forest (without branches, every segment). A *row* is one scored token: `rows[r]` is
    the position in the pack that predicts it, that is the token before it; the shift by one happens only here.

        two sequences   [7 8 1 5 0] scoring the last 2, and [7 9 4] scoring the last 1
        token_ids       7 8 1 5 0 | 7 9 4
        positions       0 1 2 3 4 | 0 1 2
        rows            2 3 | 6                 (5 is predicted from the 1 before it)
        targets         5 0 | 4
        cu_rows         0 2 3
        last            4 7
    """

    token_ids: Tensor
    """[T] int64: ids of the tokens"""
    positions: Tensor
    """[T] int64: position of each token in its sequence"""
    rows: Tensor
    """[R] int64, indices into T"""
    targets: Tensor
    """[R] int64, the scored tokens"""
    cu_rows: Tensor
    """(N+1,) int32: rows cu_rows[i] .. cu_rows[i+1] belong to sequence i"""
    last: Tensor
    """[N] int64: position of the last token of each sequence, at which a reward model scores"""
    plan: AttentionPlan

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.last.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A batch of episodes, ready to train on. Flat over the R trained rows, episode after episode; float32, nats. All
    tensors except `reference_states` and `reference_rows` are equal on all ranks."""

    cu_rows: Tensor
    """(N+1,) int32: rows cu_rows[i] .. cu_rows[i+1] belong to episode i"""
    mask: Tensor
    """[R] bool: the token was sampled"""
    trained: Tensor
    """[R] bool: the token counts in the policy loss; a subset of `mask`"""
    sampler_logprob: Tensor
    """[R] log-probs under the policy that sampled, computed by the trainer's own forward pass"""
    reference_logprob: Tensor
    """[R] log-probs under the reference"""
    value: Tensor | None = None
    """[R] values of the critic at sampling time; None without a critic"""
    advantage: Tensor
    """[R] GAE, whitened over the batch, or the advantage within the group, not whitened"""
    returns: Tensor | None = None
    """[R] target of the critic: advantage before whitening + value"""
    kl_coef: float
    """Coefficient of the KL to the reference, in the reward or in the loss"""
    weight: Tensor | None = None
    """[R] truncated importance weights of the policy loss, trainer over engine; None: 1"""
    rewards: Mapping[str, Tensor] = field(default_factory=dict)
    """Name in the logs -> rewards [R], including their coefficient, before whitening; only for display"""
    scores: Tensor | None = None
    """[N] score of each whole response by the judge, or else the sum of the rewards of functions or of a DPO model"""
    reference_states: Tensor | None = None
    """[n, D] hidden states of the reference at the rows `reference_rows`, in the dtype of its weights, for an exact KL
    in the loss; otherwise None"""
    reference_rows: Tensor | None = None
    """[n] int64, the rows whose states this rank holds; each row has one holder"""
