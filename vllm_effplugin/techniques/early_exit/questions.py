"""Question answering data in its published formats, and how answers are scored.

- `.jsonl` with `question` and `answers` (TriviaQA), and `incorrect_answers` (TruthfulQA);
- `.json` as CoQA publishes it: `data[].story`, `questions[].input_text`, `answers[].input_text`.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_effplugin.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: what the model continues.
        answers: any of them is right.
        incorrect: answers that are wrong, where the data set has them.
    """

    prompt: str
    answers: tuple[str, ...]
    incorrect: tuple[str, ...] = ()

    def score(self, reply: str) -> float:
        """How right a reply is, from 0 to 1.

        With wrong answers given: whether the reply is closer to a right one (token F1). Otherwise
        the better of containing a right answer word for word, and token F1 (SQuAD's).
        """
        reply = reply.strip().split("\n")[0]
        best = max(token_f1(reply, answer) for answer in self.answers)
        if self.incorrect:
            return float(best > max(token_f1(reply, answer) for answer in self.incorrect))
        said = f" {normalised(reply)} "
        contains = any(f" {normalised(answer)} " in said for answer in self.answers)
        return max(best, float(contains))


def read_questions(path: Path) -> list[Question]:
    """All questions of a file.

    Raises:
        ConfigError: for a file that is missing or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return list(_coqa(json.loads(text)["data"]))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [
            Question(
                f"Q: {row['question']}\nA:",
                tuple(row["answers"]),
                tuple(row.get("incorrect_answers", ())),
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--questions {path}: neither jsonl with `question` and `answers` nor CoQA's json "
            f"({type(error).__name__}: {error})"
        ) from None


def _coqa(stories: Iterable[dict[str, Any]]) -> Iterator[Question]:
    """Every question of every story, behind the story and what was asked and answered before."""
    for story in stories:
        others = story.get("additional_answers", {}).values()
        said = [story["story"]]
        for turn, question in enumerate(story["questions"]):
            answers = [story["answers"][turn]["input_text"]]
            answers += [other[turn]["input_text"] for other in others]
            said.append(f"Q: {question['input_text']}\nA:")
            yield Question("\n".join(said), tuple(answers))
            said[-1] += f" {answers[0]}"


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words (SQuAD's rule)."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(reply: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words, with multiplicity."""
    ours, theirs = normalised(reply).split(), normalised(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def accuracy(questions: Sequence[Question], replies: Sequence[str]) -> float:
    """Mean score."""
    pairs = zip(questions, replies, strict=True)
    return sum(question.score(reply) for question, reply in pairs) / len(questions)
