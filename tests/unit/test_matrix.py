"""README.md has the support matrix that the tests show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import matrix

TESTS = Path(__file__).parents[1]


def test_it_is_what_the_tests_say(request: pytest.FixtureRequest) -> None:
    """`make matrix` writes it."""
    items = request.session.items
    collected = {item.path for item in items}
    options = request.config.option
    if options.keyword or options.markexpr or not collected >= set(TESTS.rglob("test_*.py")):
        pytest.skip("needs all tests collected")
    assert matrix.in_readme() == matrix.table(matrix.cells(items))


class Item:
    """As much of one as the matrix reads."""

    nodeid = "here"

    def __init__(self, *marks: pytest.MarkDecorator, **parameters: object) -> None:
        self._marks = [mark.mark for mark in marks]
        if parameters:
            self.callspec = type("CallSpec", (), {"params": parameters})

    def iter_markers(self) -> list[pytest.Mark]:
        return self._marks


works, refuses = pytest.mark.works, pytest.mark.refuses


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (Item(works("edge", "LoRA at run time")), {("edge", "LoRA at run time"): {"works"}}),
        (
            Item(works("edge", "cloud")),
            {("edge", "cloud"): {"works"}, ("cloud", "edge"): {"works"}},
        ),
        (
            Item(works("multiplex", "compiled"), family="Bert"),
            {("multiplex", "compiled"): {"works"}, ("multiplex", "BERT"): {"works"}},
        ),
        (
            Item(refuses("multiplex"), options={"enable_lora": True}),
            {("multiplex", "LoRA at run time"): {"refused"}},
        ),
        (
            Item(refuses(), efficiency={"early_exit": {}}, options={"pipeline_parallel_size": 2}),
            {("early_exit", "pipeline parallelism"): {"refused"}},
        ),
        (
            Item(
                refuses(),
                efficiency={"edge_cloud": {"role": "cloud"}},
                options={"speculative_config": {"method": "ngram"}},
            ),
            {("cloud", "speculation (ngram)"): {"refused"}},
        ),
        (Item(refuses(), efficiency={"early_exit": {}}, options={"runner": "generate"}), {}),
        (
            Item(refuses(), technique="edge", feature="compiled"),
            {("edge", "compiled"): {"refused"}},
        ),
    ],
)
def test_what_a_test_says(item: pytest.Item, expected: dict[matrix.Cell, set[str]]) -> None:
    assert matrix.cells([item]) == expected


def test_names_are_known() -> None:
    with pytest.raises(AssertionError, match="tea"):
        matrix.cells([Item(works("edge", "tea"))])  # type: ignore[list-item]
    with pytest.raises(AssertionError, match="no technique"):
        matrix.cells([Item(works("compiled"))])  # type: ignore[list-item]


def test_a_cell_that_works_in_part() -> None:
    items = [Item(mark("edge", "compiled")) for mark in (works, refuses)]
    [line] = [line for line in matrix.table(matrix.cells(items)).splitlines() if "compiled" in line]
    assert line == "| compiled" + 4 * " | not tested" + " | yes, in part | not tested |"
