"""The evaluation of kinds of gates: what it asks for, and what it shows."""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_effplugin.techniques.early_exit.questions import accuracy, read_questions

# The benchmarks are scripts beside the package, not part of it.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import dynamax


def rows() -> list[dynamax.Answers]:
    found = []
    for name in ("one", "two"):
        every = [("full model", "", 0.0), ("layer 4", "", 0.4)]
        every += [(gate, "0.5", 0.1 + place / 10) for place, gate in enumerate(dynamax.GATES)]
        found += [
            dynamax.Answers(gate, threshold, name, saved, 1 - saved, 0.25, 0.5, 10 * (1 - saved))
            for gate, threshold, saved in every
        ]
    return found


def test_fixed_exits_let_everyone_leave_there():
    asked = dynamax.settings([4, 6], fixed=True)
    assert asked[0].extra_args == {"exit": False}
    assert asked[2].extra_args == {"exit_threshold": 0.0, "exit_min_layer": 6}
    swept = dynamax.settings([4, 6], fixed=False)
    assert [item.name for item in swept[1:]] == [f"{each:g}" for each in dynamax.THRESHOLDS]


def test_a_row_per_setting_and_three_columns_per_data_set():
    table = dynamax.as_table(rows(), ["one", "two"])
    assert table.row_count == 2 + len(dynamax.GATES)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["full model", "layer 4", *dynamax.GATES]
    assert [column[1] for column in cells[2:]] == ["0.400", "0.600", "0.250"] * 2


def test_the_plot_is_a_png(tmp_path):
    dynamax.draw(tmp_path / "plot.png", rows(), ["one", "two"], "title")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_our_conversations_are_in_coqas_format():
    questions = read_questions(dynamax.CONVERSATIONS)
    assert len(questions) == 53
    assert accuracy(questions, [question.answers[0] for question in questions]) == 1.0
    # What was asked and answered before is part of the prompt.
    assert "Q: What did Marta buy?\nA: a lighthouse\n" in questions[1].prompt
