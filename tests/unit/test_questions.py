"""Question answering data and its scores."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.early_exit.questions import (
    Question,
    accuracy,
    normalised,
    read_questions,
    token_f1,
)

COQA = {
    "data": [
        {
            "story": "Ann has a red cat.",
            "questions": [{"input_text": "Who has a cat?"}, {"input_text": "Which colour?"}],
            "answers": [{"input_text": "Ann"}, {"input_text": "red"}],
            "additional_answers": {"0": [{"input_text": "She does"}, {"input_text": "It is red"}]},
        }
    ]
}


def test_normalisation_and_f1_follow_squad() -> None:
    assert normalised("The  Cat, a dog!") == "cat dog"
    assert token_f1("the red cat", "a red dog") == pytest.approx(0.5)
    assert token_f1("red red", "red") == pytest.approx(2 / 3)
    assert token_f1("", "red") == 0
    assert token_f1("the", "a") == 1


def test_a_reply_that_contains_an_answer_is_right() -> None:
    question = Question("", ("The Cotswolds",))
    assert question.score("It lies in the Cotswolds, I think.\nQ: more") == 1
    assert question.score("It lies in Cotswoldshire.\nThe Cotswolds") == 0


def test_a_reply_has_to_be_closer_to_right_than_to_wrong() -> None:
    question = Question("", ("Nothing happens",), ("You grow watermelons",))
    assert question.score("nothing happens to you") == 1
    assert question.score("you grow") == 0
    assert accuracy([question] * 2, ["nothing", "watermelons"]) == 0.5


def test_coqa_asks_behind_what_was_said(tmp_path: Path) -> None:
    path = tmp_path / "coqa.json"
    path.write_text(json.dumps(COQA))
    first, second = read_questions(path)
    assert first.prompt == "Ann has a red cat.\nQ: Who has a cat?\nA:"
    assert second.prompt == f"{first.prompt} Ann\nQ: Which colour?\nA:"
    assert first.answers == ("Ann", "She does")
    assert second.score(" it is red") == 1


@pytest.mark.parametrize("name", ["missing.jsonl", "bad.jsonl", "bad.json"])
def test_a_file_of_another_form_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 1}')
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=name):
        read_questions(tmp_path / name)


@pytest.mark.skipif("EFFPLUGIN_DATA" not in os.environ, reason="EFFPLUGIN_DATA is not set")
@pytest.mark.parametrize(("name", "count"), [("triviaqa", 600), ("truthfulqa", 490)])
def test_published_data(name: str, count: int) -> None:
    questions = read_questions(Path(os.environ["EFFPLUGIN_DATA"]) / name / "dev.jsonl")
    assert len(questions) == count
    assert all(bool(question.incorrect) == (name == "truthfulqa") for question in questions)
    assert accuracy(questions, [question.answers[0] for question in questions]) > 0.97
