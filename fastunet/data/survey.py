"""All that can be said of a data set before a training: what it holds, what is odd about it, and what is wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastunet.checks import DataError, some_of
from fastunet.data import yolo
from fastunet.data.images import entries_of, suffix_of
from fastunet.data.labels import IGNORED, labels_of
from fastunet.data.layout import DataOptions
from fastunet.data.pairing import Pair, find_pairs, split
from fastunet.data.summary import (
    MAX_CLASSES,
    SKIPPED,
    DataSummary,
    Facts,
    check_classes,
    check_foreground,
    in_threads,
    read_facts,
    sum_up,
)


@dataclass(frozen=True)
class Share:
    """One class, or what is ignored, in all masks."""

    name: str
    share: float  # of the pixels
    images: int  # that hold it


@dataclass(frozen=True)
class Survey:
    """What a data set holds."""

    facts: list[Facts]  # of the pairs that can be read
    summary: DataSummary | None  # None where they do not fit together
    problems: list[str]  # that a training refuses
    notes: list[str]  # that a training goes on with
    train: list[Pair]
    val: list[Pair]

    def checked(self) -> DataSummary:
        """Return the summary. Raises DataError with the first problem where there is one."""
        if self.summary is None or self.problems:
            raise DataError(self.problems[0])
        return self.summary

    @property
    def shares(self) -> list[Share]:
        """The share of each class, and of what is ignored, if the masks fit."""
        if self.summary is None:
            return []
        counts = np.array([_label_counts(fact, self.summary) for fact in self.facts])
        pixels, images = counts.sum(0), (counts > 0).sum(0)
        names = [(IGNORED, "ignored")] if self.summary.ignored else []
        names = [*((label, self.summary.class_text(label)) for label in range(max(self.summary.classes, 2))), *names]
        return [Share(name, float(pixels[label] / pixels.sum()), int(images[label])) for label, name in names]


def _label_counts(fact: Facts, summary: DataSummary) -> np.ndarray:
    """Turn counts of codes into counts of the labels 0 to 255."""
    codes = np.array(list(fact.counts), np.int64)
    threshold, ignore = summary.threshold, summary.ignore
    if threshold is not None:  # which has made 0 and 1 of them already
        threshold, ignore = 1.0, (SKIPPED,)
    labels = labels_of(codes, summary.classes, values=summary.labels, ignore=ignore, threshold=threshold)
    return np.bincount(labels, list(fact.counts.values()), MAX_CLASSES)


def survey(
    root: str | Path,
    options: DataOptions | None = None,
    classes: int | None = None,
    *,
    val_fraction: float = 0.15,
    on_pair: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Find the pairs of a data folder, and survey them as `survey_pairs`.

    Raises:
        ConfigError: options that contradict each other.
    """
    options = options or DataOptions()
    try:
        pairs = find_pairs(root, options)
    except DataError as error:
        return Survey([], None, [str(error)], [], [], [])
    found = survey_pairs(pairs, options, classes, val_fraction=val_fraction, on_pair=on_pair)
    return replace(found, notes=[*found.notes, *_notes_on_others(pairs)])


def survey_pairs(
    pairs: Sequence[Pair],
    options: DataOptions,
    classes: int | None = None,
    *,
    val_fraction: float = 0.15,
    seed: int | None = None,
    fold: tuple[int, int] | None = None,
    on_pair: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Read every file once, and collect all that is wrong or odd; see `inspect`, which raises the first.

    Args:
        val_fraction, seed, fold: of the split, as in `split`.
        on_pair: is called with the number of pairs that are read, and of all.

    Raises:
        ConfigError: as `inspect`.
    """
    check_classes(classes, options)
    done = iter(range(1, len(pairs) + 1))

    def read(pair: Pair) -> Facts | str:
        try:
            return read_facts(pair, options)
        except DataError as error:
            return str(error)
        finally:
            on_pair(next(done), len(pairs))

    read_pairs = in_threads(read, pairs)
    facts = [each for each in read_pairs if isinstance(each, Facts)]
    problems = [each for each in read_pairs if isinstance(each, str)]
    summary = None
    train, val = list(pairs), list[Pair]()
    try:
        if facts:
            summary = sum_up(facts, classes, options)
            check_foreground(pairs, summary)
    except DataError as error:
        problems.append(str(error))
    try:
        train, val = split(pairs, val_fraction, seed, fold)
        if summary is not None and summary.ignored:
            for name, part in (("to train on", train), ("kept out", val)):
                _check_counted(name, part, facts, summary)
    except DataError as error:
        problems.append(str(error))
    notes = _notes_on_channels(facts) + _notes_on_duplicates(facts, {pair.stem for pair in val})
    return Survey(facts, summary, problems, notes, train, val)


def _check_counted(name: str, pairs: Sequence[Pair], facts: Sequence[Facts], summary: DataSummary) -> None:
    """Raise DataError where all pixels of these pairs are ignored: there is nothing to learn, or to score."""
    stems = {pair.stem for pair in pairs}
    found = [_label_counts(fact, summary) for fact in facts if fact.pair.stem in stems]
    if found and not np.sum(found, 0)[:IGNORED].any():
        raise DataError(
            f"{pairs[0].mask.parent}: expected pixels that count in at least one of the {len(pairs)} masks of the "
            f"images {name}, got only ignored ones: another split has others"
        )


def _notes_on_channels(facts: Sequence[Facts]) -> list[str]:
    grey = [fact.pair.image.name for fact in facts if fact.shape[2] == 1]
    if not grey or {fact.shape[2] for fact in facts} != {1, 3}:
        return []
    return [f"{len(grey)} grey images beside RGB are taken as RGB: {some_of(grey)}"]


def _notes_on_duplicates(facts: Sequence[Facts], val: set[str]) -> list[str]:
    """Name images of equal pixels, above all those on both sides of the split: they are scored on what was learnt."""
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for fact in facts:
        groups[fact.digest, fact.shape, fact.dtype].append(fact.pair.stem)
    equal = [stems for stems in groups.values() if len(stems) > 1]
    across = [stems for stems in equal if 0 < len(val.intersection(stems)) < len(stems)]
    within = [stems for stems in equal if stems not in across]
    texts = {"on both sides of the split, which flatters the scores": across, "on one side of the split": within}
    return [f"equal images {text}: {some_of(map(' = '.join, found))}" for text, found in texts.items() if found]


def _notes_on_others(pairs: Sequence[Pair]) -> list[str]:
    files = {file for pair in pairs for file in (pair.image, pair.mask)}
    folders = {file.parent for file in files}
    there = {file for folder in folders for file in entries_of(folder) if file.is_file() and not suffix_of(file)}
    known = files | {folder / yolo.LIST for folder in folders}
    others = sorted(file.name for file in there - known)
    return [f"{len(others)} other files are passed over: {some_of(others)}"] if others else []
