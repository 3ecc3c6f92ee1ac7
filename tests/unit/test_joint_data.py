"""Labelled texts from files and from the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from vllm_effplugin.errors import ConfigError, UnsupportedError
from vllm_effplugin.techniques.joint_exit.data import DataSettings, read_data


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(20)]


def test_a_share_of_the_training_rows_is_held_out(tmp_path: Path) -> None:
    data = read_data(DataSettings(train=jsonl(tmp_path / "a.jsonl", ROWS), dev_share=0.25))
    assert (len(data.train), len(data.dev)) == (15, 5)
    assert sorted(data.train.texts + data.dev.texts) == sorted(row["text"] for row in ROWS)
    for examples in (data.train, data.dev):
        for text, label in zip(examples.texts, examples.labels.tolist(), strict=True):
            assert int(text.split()[1]) % 2 == label
    assert data.classes == ("LABEL_0", "LABEL_1")


def test_a_file_of_held_out_rows(tmp_path: Path) -> None:
    settings = DataSettings(
        train=jsonl(tmp_path / "a.jsonl", ROWS),
        dev=jsonl(tmp_path / "b.jsonl", ROWS[:3]),
        labels=("no", "yes"),
    )
    data = read_data(settings)
    assert (len(data.train), data.dev.labels.tolist()) == (20, [0, 1, 0])
    assert data.classes == ("no", "yes")


def test_pairs_and_templates(tmp_path: Path) -> None:
    rows = [
        {"text": "a {text_pair}", "text_pair": "b", "label": "x"},
        {"text": "c", "text_pair": "d", "label": "y"},
    ]
    train = jsonl(tmp_path / "a.jsonl", rows)
    found = read_data(DataSettings(train=train, dev=train))
    assert found.train.texts == ["a {text_pair}\nb", "c\nd"]
    assert found.classes == ("x", "y")
    found = read_data(DataSettings(train=train, dev=train, template="{text_pair}|{text}"))
    assert found.train.texts == ["b|a {text_pair}", "d|c"]


def test_csv_with_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('review,stars\n"good, really",good\nno,bad\n', encoding="utf-8")
    settings = DataSettings.model_validate(
        {
            "train": str(path),
            "dev": str(path),
            "columns": {"text": "review", "label": "stars"},
            "labels": ("bad", "good"),
        }
    )
    data = read_data(settings)
    assert data.train.texts == ["good, really", "no"]
    assert data.train.labels.tolist() == [1, 0]


def test_the_models_own_classes_count(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", [{"text": "t", "label": "pos"}])
    data = read_data(DataSettings(train=train, dev=train), classes=("neg", "neutral", "pos"))
    assert data.train.labels.tolist() == [2]
    mixed = DataSettings(train=train, dev=train, labels=("pos", "neg", "neutral"))
    assert read_data(mixed, classes=("neg", "neutral", "pos")).train.labels.tolist() == [2]
    other = DataSettings(train=train, dev=train, labels=("pos", "neg"))
    with pytest.raises(ConfigError, match=r"--labels pos,neg: the model's classes are neg,neutral"):
        read_data(other, classes=("neg", "neutral", "pos"))


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found(list[dict[str, Any]]):
        features: ClassVar = {"stars": SimpleNamespace(names=["no", "yes"])}

    asked = []
    unlabelled: list[dict[str, Any]] = []

    def load_dataset(path: str, config: str | None, *, split: str) -> Found:
        asked.append((path, config, split))
        return Found([{"text": "a", "stars": 1}, {"text": "b", "stars": 0}, *unlabelled])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    settings = {"train": "some/reviews@train", "dev": "some/reviews/small@test"}
    data = read_data(DataSettings.model_validate({**settings, "columns": {"label": "stars"}}))
    assert asked == [("some/reviews", None, "train"), ("some/reviews", "small", "test")]
    assert data.classes == ("no", "yes")
    assert data.train.labels.tolist() == [1, 0]
    unlabelled.append({"text": "c", "stars": -1})
    with pytest.raises(ConfigError, match="row 3: label -1 is none of no, yes"):
        read_data(
            DataSettings.model_validate(
                {**settings, "columns": {"label": "stars"}, "labels": ("no", "yes")}
            )
        )


def test_the_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r"--train some/reviews@train needs.*`datasets`"):
        read_data(DataSettings(train="some/reviews@train"))


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"label": 1}], "--train, row 1: no text in column 'text'"),
        ([{"text": "a", "label": 0}, {"text": "a", "label": 7}], "row 2: label 7 is none of a, b"),
        ([{"text": "a"}], "label None is none of"),
        ([{"text": "a\u2028b", "label": 1}], "too few to hold some out: give --dev"),
        ([], "--train has no rows"),
        (["nonsense"], "line 1: not a JSON object"),
        ([{"text": "a", "label": 1}], "too few to hold some out: give --dev"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, rows: list[Any], named: str) -> None:
    train = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConfigError, match=named):
        read_data(DataSettings(train=train, labels=("a", "b")))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("missing.jsonl", "--train missing.jsonl cannot be read"),
        ("reviews", "neither a .jsonl or .csv file nor a data set's OWNER/NAME"),
    ],
)
def test_sources_that_cannot_be_read(source: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_data(DataSettings(train=source))


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "x"}])
    with pytest.raises(ConfigError, match="--labels: at least two classes"):
        read_data(DataSettings(train=train, dev=train))
