"""Holds tokenised rows in flat arrays, in memory or mapped from files, about 4 bytes per token. A `TokenSet` reads like
a list of `TokenizedExample`; parts of sets and several sets together share the arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, cast, overload

import numpy as np

from fastrlhf.data.forms import RESPONSES
from fastrlhf.data.labels import GROUP_LABELS, PAIR_LABELS
from fastrlhf.types import Example, TokenizedExample

PIECES = ("prompt", *RESPONSES)
"""The pieces of a row in the order in which their tokens are stored; the responses of a group follow."""

ARRAYS = ("tokens", "starts", "lengths", "rows", "places", "group_starts", "group_lengths", "run_starts", "runs")
"""Names of the arrays of a `Block`."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Arrays of N tokenised rows with T tokens. Arrays about groups or untrained tokens are empty if no row has any."""

    tokens: np.ndarray
    """[T] int32, row after row; within a row, in the order of PIECES and then of its group"""
    starts: np.ndarray
    """[N + 1] int64: row i has tokens[starts[i] : starts[i + 1]]"""
    lengths: np.ndarray
    """[N, 4] int32, number of tokens of each of PIECES; -1 for a response that the row does not have"""
    rows: np.ndarray
    """[N] int64, row numbers of the examples"""
    places: np.ndarray
    """[N] int32, position in the list of examples from which the rows were made"""
    group_starts: np.ndarray
    """[N + 1] int64: group_lengths[group_starts[i] : group_starts[i + 1]] are the lengths of the group of row i"""
    group_lengths: np.ndarray
    """[G] int32: numbers of tokens of the responses of all groups"""
    run_starts: np.ndarray
    """[N + 1] int64: runs[run_starts[i] : run_starts[i + 1]] belong to row i"""
    runs: np.ndarray
    """[M, 3] int32: (piece, first trained token, end) of each run of trained tokens in a response that also has
    untrained tokens; pieces 0..3 are PIECES, and piece 4 + j is response j of the group"""
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Name of a label -> its value in each row; labels that no row has are missing."""
    dataset: str = ""
    """Name of the dataset of the rows, if a run has several."""
    first_row: int = 0
    """Row number of the first row of this dataset."""

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample], places: Sequence[int] | None = None) -> Block:
        """Copies rows into arrays. `places`: see the array of this name; default: the order of the rows."""
        tokens, starts, lengths = np.empty(sum(map(_num_tokens, examples)), np.int32), [0], []
        group_starts, group_lengths, run_starts, runs = [0], list[int](), [0], list[tuple[int, int, int]]()
        for example in examples:
            group = example.responses or []
            pieces = [getattr(example, name) for name in PIECES]
            lengths.append([-1 if piece is None else len(piece) for piece in pieces])
            at = starts[-1]
            for piece in (*pieces, *group):
                if piece is not None:
                    tokens[at : at + len(piece)] = piece
                    at += len(piece)
            starts.append(at)
            group_lengths += map(len, group)
            group_starts.append(len(group_lengths))
            for name, trained in (example.trained or {}).items():
                runs += [(_piece(name), first, end) for first, end in _runs(trained)]
            run_starts.append(len(runs))
        named = {name: [getattr(example, name) for example in examples] for name in (*GROUP_LABELS, *PAIR_LABELS)}
        return cls(
            tokens=tokens,
            starts=np.array(starts, np.int64),
            lengths=np.array(lengths, np.int32).reshape(-1, len(PIECES)),
            rows=np.array([example.row for example in examples], np.int64),
            places=np.array(range(len(examples)) if places is None else places, np.int32),
            group_starts=np.array(group_starts if group_lengths else [], np.int64),
            group_lengths=np.array(group_lengths, np.int32),
            run_starts=np.array(run_starts if runs else [], np.int64),
            runs=np.array(runs, np.int32).reshape(-1, 3),
            labels={name: values for name, values in named.items() if any(value is not None for value in values)},
        )

    @classmethod
    def joined(cls, blocks: Sequence[Block]) -> Block:
        """Copies several blocks into one. The places of a block are counted from its own first example; add the number
        of earlier examples to them before."""
        names = {name for block in blocks for name in block.labels}
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(block, name) for block in blocks])
            for name in ARRAYS
            if not name.endswith("starts")
        }
        return cls(
            **arrays,
            starts=_joined_starts([(len(block), block.starts) for block in blocks]),
            group_starts=_joined_starts([(len(block), block.group_starts) for block in blocks]),
            run_starts=_joined_starts([(len(block), block.run_starts) for block in blocks]),
            labels={
                name: [value for block in blocks for value in block.labels.get(name, [None] * len(block))]
                for name in (*GROUP_LABELS, *PAIR_LABELS)
                if name in names
            },
        )

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int, source: Example | None, *, arrays: bool) -> TokenizedExample:
        """Returns row `index` with lists of ids, or, with `arrays`, with int32 views of `tokens`."""
        start, end = int(self.starts[index]), int(self.starts[index + 1])
        ids: Any = self.tokens[start:end] if arrays else self.tokens[start:end].tolist()
        found, at = dict[str, Any](), 0
        for name, length in zip(PIECES, self.lengths[index].tolist(), strict=True):
            if length >= 0:
                found[name] = ids[at : at + length]
                at += length
        if len(self.group_lengths):
            group = self.group_lengths[self.group_starts[index] : self.group_starts[index + 1]].tolist()
            responses = []
            for length in group:
                responses.append(ids[at : at + length])
                at += length
            found["responses"] = responses or None
        if len(self.runs):
            trained = dict[str, list[int]]()
            for piece, first, last in self.runs[self.run_starts[index] : self.run_starts[index + 1]].tolist():
                trained.setdefault(_name(piece), []).extend(range(first, last))
            found["trained"] = trained or None
        labels = {name: values[index] for name, values in self.labels.items()}
        return TokenizedExample(row=int(self.rows[index]), source=source, **found, **labels)


class TokenSet(Sequence[TokenizedExample]):
    """Tokenised rows in a given order. An item is a `TokenizedExample` whose ids are lists, made when it is read; two
    sets, or a set and a list, are equal if their items are."""

    def __init__(
        self,
        blocks: Sequence[Block] = (),
        order: np.ndarray | None = None,
        sources: Sequence[Sequence[Example] | None] = (),
        fingerprint: str = "",
    ) -> None:
        """`order` [N] int64: indices into the rows of all blocks, one block after the other; None: all rows. `sources`:
        for each block the examples from which it was made, or None. `fingerprint`: the fingerprint of the rows in this
        order, if it is known."""
        self._blocks = list(blocks)
        self._first = np.cumsum([0, *map(len, self._blocks)])
        self._order = order
        self._sources = list(sources) or [None] * len(self._blocks)
        self.known_fingerprint = fingerprint

    @classmethod
    def of(cls, rows: Sequence[TokenizedExample]) -> TokenSet:
        """Copies rows into arrays; a set is returned unchanged."""
        if isinstance(rows, TokenSet):
            return rows
        sources = [row.source for row in rows]
        kept = cast(list[Example], sources) if rows and all(source is not None for source in sources) else None
        return cls([Block.of(rows)] if rows else [], sources=[kept] if rows else [])

    @classmethod
    def joined(cls, *parts: Sequence[TokenizedExample]) -> TokenSet:
        """Returns all rows of several sets, one set after the other. Sets are not copied."""
        sets = [cls.of(part) for part in parts] or [cls()]
        firsts = np.cumsum([0, *(part._first[-1] for part in sets)])
        order = np.concatenate([part._places() + first for part, first in zip(sets, firsts, strict=False)])
        blocks = [block for part in sets for block in part._blocks]
        whole = all(part._order is None for part in sets)
        return cls(blocks, None if whole else order, [source for part in sets for source in part._sources])

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenSet:
        """Returns the rows at these indices, in their order, without a copy of their tokens."""
        return TokenSet(self._blocks, self._places()[np.asarray(indices, np.int64)], self._sources)

    def with_sources(self, examples: Sequence[Example]) -> TokenSet:
        """Returns the set with the examples from which it was made, which become the `source` of its rows."""
        return TokenSet(self._blocks, self._order, [examples] * len(self._blocks), self.known_fingerprint)

    def of_dataset(self, name: str, first_row: int) -> TokenSet:
        """Returns the set as rows of the dataset `name`, whose row numbers begin with `first_row`."""
        blocks = [
            replace(block, rows=block.rows + first_row, dataset=name, first_row=first_row) for block in self._blocks
        ]
        sources = [
            None if own is None else [replace(example, row=example.row + first_row) for example in own]
            for own in self._sources
        ]
        return TokenSet(blocks, self._order, sources, self.known_fingerprint)

    def datasets(self) -> tuple[list[str], np.ndarray]:
        """Returns the names of the datasets in order, and [N] int64, the index of the dataset of every row."""
        names = list(dict.fromkeys(block.dataset for block in self._blocks))
        numbers = np.array([names.index(block.dataset) for block in self._blocks], np.int64)
        every = np.repeat(numbers, np.array([len(block) for block in self._blocks], np.int64))
        return names, every if self._order is None else every[self._order]

    def first_rows(self) -> list[int]:
        """Returns the row number of the first row of each dataset."""
        return [*{block.dataset: block.first_row for block in self._blocks}.values()]

    def place(self, index: int) -> str:
        """Names a row in a message: its row number and, if there are several datasets, its place in its dataset."""
        number, own = self._find(index)
        block = self._blocks[number]
        row = int(block.rows[own])
        return f"row {row} (row {row - block.first_row} of {block.dataset})" if block.dataset else f"row {row}"

    @property
    def blocks(self) -> Sequence[Block]:
        return self._blocks

    def arrays(self, index: int) -> TokenizedExample:
        """Returns a row whose ids are int32 arrays, not lists: views of the stored tokens."""
        return self._example(index, arrays=True)

    def lengths(self, name: str) -> np.ndarray:
        """Returns [N] int64, the number of tokens of the piece `name` (prompt, chosen, rejected or reference) of every
        row; 0 for a row without it."""
        column = PIECES.index(name)
        parts = [np.maximum(block.lengths[:, column], 0) for block in self._blocks]
        every = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
        return every if self._order is None else every[self._order]

    def rows(self) -> list[int]:
        """Returns the row numbers."""
        every = np.concatenate([block.rows for block in self._blocks]) if self._blocks else np.zeros(0, np.int64)
        return (every if self._order is None else every[self._order]).tolist()

    def labels(self, name: str) -> list[Any]:
        """Returns the label `name` of every row; None for a row without it."""
        parts = (block.labels.get(name, [None] * len(block)) for block in self._blocks)
        every = [value for part in parts for value in part]
        return every if self._order is None else [every[i] for i in self._order]

    def __len__(self) -> int:
        return int(self._first[-1]) if self._order is None else len(self._order)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> TokenSet: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | TokenSet:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self._example(index, arrays=False)

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self._example(i, arrays=False) for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenSet | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"TokenSet of {len(self):,} rows"

    def _places(self) -> np.ndarray:
        return np.arange(self._first[-1]) if self._order is None else self._order

    def _find(self, index: int) -> tuple[int, int]:
        """Returns the number of the block that has the row at this index, and the index of the row in the block."""
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"row {index} of {length}")
        place = index % length if self._order is None else int(self._order[index])
        number = 0 if len(self._blocks) == 1 else int(np.searchsorted(self._first, place, "right")) - 1
        return number, place - int(self._first[number])

    def _example(self, index: int, *, arrays: bool) -> TokenizedExample:
        number, own = self._find(index)
        block, sources = self._blocks[number], self._sources[number]
        source = None if sources is None else sources[int(block.places[own])]
        return block.example(own, source, arrays=arrays)


def _num_tokens(example: TokenizedExample) -> int:
    pieces = (*(getattr(example, name) for name in PIECES), *(example.responses or ()))
    return sum(len(piece) for piece in pieces if piece is not None)


def _piece(name: str) -> int:
    if name in PIECES:
        return PIECES.index(name)
    return len(PIECES) + int(name.removeprefix("responses[").removesuffix("]"))


def _name(piece: int) -> str:
    return PIECES[piece] if piece < len(PIECES) else f"responses[{piece - len(PIECES)}]"


def _runs(indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yields (first, end) of each run of consecutive indices."""
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        places = [index for _, index in run]
        yield places[0], places[-1] + 1


def _joined_starts(parts: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """Joins offsets of several blocks, given as (number of rows, offsets); empty offsets stand for zeros."""
    if not any(len(starts) for _, starts in parts):
        return np.zeros(0, np.int64)
    joined, base = [np.zeros(1, np.int64)], 0
    for num, starts in parts:
        own = starts if len(starts) else np.zeros(num + 1, np.int64)
        joined.append(own[1:] + base)
        base += int(own[-1])
    return np.concatenate(joined)
