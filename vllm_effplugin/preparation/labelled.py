"""Labelled texts: from jsonl, CSV, or a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from vllm_effplugin.errors import ConfigError, UnsupportedError
from vllm_effplugin.preparation.base import load_tokenizer

logger = logging.getLogger(__name__)

PAIR_TEMPLATE = "{text}\n{text_pair}"
UNLABELLED = "-1"
"""What data sets write where a row has no label."""


class Columns(BaseModel):
    """Names of the fields of a row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"


class DataSettings(BaseModel):
    """Which data, and how a row becomes a text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str = Field(
        description="A .jsonl or .csv file, or `OWNER/NAME[/CONFIG]@SPLIT` of the hub."
    )
    dev: str | None = Field(None, description="The same; else a share of the training rows.")
    dev_share: float = Field(0.15, gt=0, lt=1, description="That share.")
    columns: Columns = Field(default_factory=Columns)
    labels: tuple[str, ...] | None = Field(None, description="Names of the classes, in order.")
    template: str | None = Field(
        None, description="Of `{text}` and `{text_pair}`; what a client has to send."
    )
    max_length: int = Field(512, ge=1, description="Tokens at which a text is cut off.")
    seed: int = 0

    @field_validator("template")
    @classmethod
    def _has_places(cls, template: str | None) -> str | None:
        places = set(re.findall(r"\{(\w*)\}", template or "{text}"))
        if not places or places - {"text", "text_pair"}:
            raise ValueError("needs {text} or {text_pair}, and has no other {name}")
        return template


@dataclass(frozen=True)
class Examples:
    """Texts as a client would send them, and `[N]` class indices."""

    texts: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def at(self, rows: Tensor) -> Examples:
        """Some of them."""
        return Examples([self.texts[row] for row in rows.tolist()], self.labels[rows])


@dataclass(frozen=True)
class Data:
    """Training rows, held-out rows, and the names of the classes."""

    train: Examples
    dev: Examples
    classes: tuple[str, ...]


def read_data(settings: DataSettings, classes: Sequence[str] | None = None) -> Data:
    """Read what the settings name.

    Args:
        classes: names that the model has already; they win over those of the data, and a label
            that is a number counts in their order, or in that of `--labels` where it is given.

    Raises:
        ConfigError: a source that cannot be read, or rows that lack a field or have another label.
        UnsupportedError: a hub's name without the package `datasets`.
    """
    train = read_rows(settings.train, "--train", settings)
    dev = None if settings.dev is None else read_rows(settings.dev, "--dev", settings)
    if classes and settings.labels and set(settings.labels) != set(classes):
        raise ConfigError(
            f"--labels {','.join(settings.labels)}: the model's classes are {','.join(classes)}"
        )
    known = tuple(classes) if classes else settings.labels
    if known is None:
        known = _classes(train, settings.columns.label, f"--train {settings.train}")
    if len(known) < 2:
        raise ConfigError(f"--labels: at least two classes are needed, got {len(known)}")
    labelled = examples(train, settings, known, "--train")
    if dev is not None:
        return Data(labelled, examples(dev, settings, known, "--dev"), known)
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(settings.seed))
    held_out = int(len(labelled) * settings.dev_share)
    if held_out == 0:
        raise ConfigError(f"--train has {len(labelled)} rows, too few to hold some out: give --dev")
    return Data(
        labelled.at(order[held_out:]), _others(labelled, order[:held_out], order[held_out:]), known
    )


def _others(all_rows: Examples, held_out: Tensor, train: Tensor) -> Examples:
    """The held-out rows whose text is not among the training rows as well."""
    seen = {all_rows.texts[row] for row in train.tolist()}
    kept = [row for row in held_out.tolist() if all_rows.texts[row] not in seen]
    if not kept:
        raise ConfigError("every held-out row's text is among the training rows: give --dev")
    return all_rows.at(torch.tensor(kept))


def digest(data: Data) -> str:
    """Of the texts and labels, with which unfinished work has to be thrown away."""
    found = hashlib.sha256(json.dumps(data.classes).encode())
    for part in (data.train, data.dev):
        found.update(json.dumps([part.texts, part.labels.tolist()]).encode())
    return found.hexdigest()


def read_rows(source: str, option: str, settings: DataSettings) -> list[dict[str, Any]]:
    """The rows of a file, or of a hub's data set; those that say that they have no label are out.

    Args:
        settings: names of columns and classes.

    Raises:
        ConfigError: when it cannot be read.
        UnsupportedError: a hub's name without the package `datasets`.
    """
    rows = _rows(source, option, settings)
    if UNLABELLED in (settings.labels or ()):
        return rows
    labelled = [row for row in rows if str(row.get(settings.columns.label)) != UNLABELLED]
    if len(labelled) < len(rows):
        logger.warning(
            "%s: %d rows with label -1 (unlabelled) are left out; name it in --labels if it is one",
            option,
            len(rows) - len(labelled),
        )
    return labelled


def _rows(source: str, option: str, settings: DataSettings) -> list[dict[str, Any]]:
    path = Path(source)
    try:
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            return [
                _json_object(line, f"{option} {source}, line {number}")
                for number, line in enumerate(lines, start=1)
                if line.strip()
            ]
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{option} {source} cannot be read: {error}") from None
    name, _, split = source.partition("@")
    if not split:
        raise ConfigError(
            f"{option} {source}: neither a .jsonl or .csv file nor a data set's "
            "OWNER/NAME[/CONFIG]@SPLIT"
        )
    return _hub_rows(name, split, option, settings)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: not a JSON object")
    return row


def _hub_rows(name: str, split: str, option: str, settings: DataSettings) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise UnsupportedError(
            f"{option} {name}@{split} needs the package `datasets`: install it, or give a file"
        ) from None
    path, _, config = name.rpartition("/") if name.count("/") == 2 else (name, "", None)
    try:
        found = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # whatever the hub or a loader fails with
        raise ConfigError(f"{option} {name}@{split} cannot be loaded: {error}") from None
    label = settings.columns.label
    names = getattr(found.features.get(label), "names", None)
    rows = [dict(row) for row in found]
    # Other names for the same numbers are the user's choice.
    if names and set(settings.labels or names) == set(names):
        rows = [{**row, label: _named(row.get(label), names)} for row in rows]
    return rows


def _named(label: Any, names: Sequence[str]) -> Any:
    """A class's name; what is none, such as -1 for "unlabelled", stays as it is."""
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else label


def _classes(rows: Sequence[Mapping[str, Any]], column: str, source: str) -> tuple[str, ...]:
    """Names for the labels that occur: `LABEL_i` for 0, 1, ..., as Transformers has it."""
    found = {str(row[column]) for row in rows if row.get(column) not in (None, "")}
    if not found:
        there = ", ".join(map(repr, rows[0])) if rows else "none"
        raise ConfigError(f"{source}: no labels in column {column!r}; columns are {there}")
    if not all(name.isdecimal() for name in found):
        return tuple(sorted(found))
    numbers = sorted(int(name) for name in found)
    if numbers == list(range(len(numbers))):
        return tuple(f"LABEL_{i}" for i in numbers)
    return tuple(str(number) for number in numbers)


def examples(
    rows: Iterable[Mapping[str, Any]], settings: DataSettings, classes: Sequence[str], option: str
) -> Examples:
    """Rows as texts and class indices.

    Args:
        classes: names of the classes, in order.
        option: that named the rows, for messages.

    Raises:
        ConfigError: a row that lacks a field, has an empty text, or another label.
    """
    texts: list[str] = []
    labels: list[int] = []
    place = {name: index for index, name in enumerate(classes)}
    if not any(name.isdecimal() for name in classes):
        # Numbers count in the order that the user knows, names where they lie in the model.
        place |= {str(i): place[name] for i, name in enumerate(settings.labels or classes)}
    for number, row in enumerate(rows, start=1):
        where = f"{option}, row {number}"
        text = _text(row, settings, where)
        if not text:
            raise ConfigError(f"{where}: an empty text")
        texts.append(text)
        label = row.get(settings.columns.label)
        if str(label) in place:
            labels.append(place[str(label)])
        else:
            raise ConfigError(f"{where}: label {label!r} is none of {', '.join(classes)}")
    if not texts:
        raise ConfigError(f"{option} has no rows")
    return Examples(texts, torch.tensor(labels))


def _text(row: Mapping[str, Any], settings: DataSettings, where: str) -> str:
    columns = settings.columns
    fields = {"text": row.get(columns.text), "text_pair": row.get(columns.text_pair)}
    template = settings.template or (PAIR_TEMPLATE if fields["text_pair"] else "{text}")
    for name, value in fields.items():
        if f"{{{name}}}" in template and not isinstance(value, str):
            column = getattr(columns, name)
            raise ConfigError(f"{where}: no text in column {column!r}")
    return re.sub(r"\{(text|text_pair)\}", lambda found: fields[found[1]] or "", template)


def tokenized(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids as vLLM makes them of a request's text, cut off at `max_length`.

    Raises:
        ConfigError: a text without any.
    """
    found: list[list[int]] = tokenizer(
        list(texts), truncation=True, max_length=max_length, verbose=False
    )["input_ids"]
    for text, ids in zip(texts, found, strict=True):
        if not ids:
            raise ConfigError(f"the text {text!r} has no tokens")
    return found


def tokenized_data(model: Path, data: Data, max_length: int) -> dict[str, list[list[int]]]:
    """Token ids of the training texts (`train`) and of the held-out ones (`dev`).

    Raises:
        ConfigError: a text without any.
        CheckpointError: a model without a tokenizer.
    """
    tokenizer = load_tokenizer(model)
    return {
        name: tokenized(tokenizer, examples.texts, max_length)
        for name, examples in (("train", data.train), ("dev", data.dev))
    }
