"""Labelled texts from files and from the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from vllm_effplugin.errors import ConfigError, UnsupportedError
from vllm_effplugin.preparation.labelled import DataSettings, read_data
from vllm_effplugin.techniques.joint_exit.command import classify


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


def test_numbers_count_in_the_users_order(tmp_path: Path) -> None:
    """The model's may be another; names say which class is which."""
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": "neutral"}, {"text": "c", "label": 2}]
    train = jsonl(tmp_path / "a.jsonl", rows)
    own = ("contradiction", "neutral", "entailment")
    asked = DataSettings(train=train, dev=train, labels=("entailment", "neutral", "contradiction"))
    assert read_data(asked, own).train.labels.tolist() == [2, 1, 0]
    assert read_data(DataSettings(train=train, dev=train), own).train.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "classes", "indices"),
    [
        ([0, 1, 2], ("LABEL_0", "LABEL_1", "LABEL_2"), [0, 1, 2]),
        ([1, 3, 10], ("1", "3", "10"), [0, 1, 2]),
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([0, 1, -1], ("LABEL_0", "LABEL_1"), [0, 1]),
    ],
)
def test_classes_without_names(
    tmp_path: Path, labels: list[Any], classes: tuple[str, ...], indices: list[int]
) -> None:
    rows = [{"text": "t", "label": label} for label in labels]
    train = jsonl(tmp_path / "a.jsonl", rows)
    data = read_data(DataSettings(train=train, dev=train))
    assert data.classes == classes
    assert data.train.labels.tolist() == indices


def test_minus_one_may_be_a_class(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": label} for label in (-1, 1, 0)]
    train = jsonl(tmp_path / "a.jsonl", rows)
    data = read_data(DataSettings(train=train, dev=train, labels=("-1", "0", "1")))
    assert data.train.labels.tolist() == [0, 2, 1]


def test_held_out_texts_are_new(tmp_path: Path) -> None:
    rows = [*ROWS, *ROWS]
    settings = DataSettings(train=jsonl(tmp_path / "a.jsonl", rows), dev_share=0.5)
    data = read_data(settings)
    assert data.dev.texts
    assert not set(data.dev.texts) & set(data.train.texts)


def test_a_table_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\ngood,1\nbad,0\n", encoding="utf-8-sig")
    assert read_data(DataSettings(train=str(path), dev=str(path))).train.texts == ["good", "bad"]


@pytest.mark.parametrize("template", ["Review: {sentence}", "no place", "{text} {other}"])
def test_templates_that_lose_the_text(template: str) -> None:
    with pytest.raises(ValueError, match=r"needs \{text\} or \{text_pair\}"):
        DataSettings(train="a.jsonl", template=template)


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
    renamed = {**settings, "columns": {"label": "stars"}, "labels": ("bad", "good")}
    data = read_data(DataSettings.model_validate(renamed))
    assert data.train.texts == ["a", "b"], "the unlabelled row is left out"
    assert data.train.labels.tolist() == [1, 0]


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
        ([{"text": "a", "label": 1}, {"text": "", "label": 1}], "row 2: an empty text"),
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


def test_no_labels_at_all(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", [{"text": "a", "sentiment": 1}])
    with pytest.raises(ConfigError, match="no labels in column 'label'; columns are 'text', 'sent"):
        read_data(DataSettings(train=train))


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "x"}])
    with pytest.raises(ConfigError, match="--labels: at least two classes"):
        read_data(DataSettings(train=train, dev=train))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_loss", 1.0, "--max-loss: Input should be less than 1"),
        ("lora_rate", 0.0, "--lora-rate: Input should be greater than 0"),
        ("lora_epochs", 0.0, "--lora-epochs: Input should be greater than 0"),
        ("sweep", "-1,-2", "--sweep: Input should be greater than or equal to 0"),
        ("template", "nothing", "--template: needs {text}"),
        ("dev_share", 2.0, "--dev-share: Input should be less than 1"),
    ],
)
def test_wrong_values_are_named_as_they_were_given(
    tmp_path: Path, option: str, value: Any, message: str
) -> None:
    options = {"train": "a.jsonl", "lora": True, option: value}
    with pytest.raises(ConfigError) as caught:
        classify(tmp_path / "model", tmp_path / "out", **options)
    assert str(caught.value).startswith(message)
    named = message.partition(":")[0]
    assert all(part.startswith(named) for part in str(caught.value).split("; "))
