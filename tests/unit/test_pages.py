"""What README.md and the other pages point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from vllm_effplugin.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "patches" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("vllm_effplugin/techniques/*/README.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_and_commands(page: Path) -> None:
    text = page.read_text()
    links = {link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link}
    assert [link for link in links if not (page.parent / link).exists()] == []
    scripts = set(re.findall(r"benchmarks/\w+\.py", text))
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_every_technique_has_a_page() -> None:
    folders = {path.parent for path in ROOT.glob("vllm_effplugin/techniques/*/config.py")}
    assert folders == {page.parent for page in PAGES if page.parent.parent.name == "techniques"}
    overview = (ROOT / "README.md").read_text()
    assert all(f"techniques/{folder.name}/README.md" in overview for folder in folders)


def test_options_in_use_exist() -> None:
    """Of the commands of `effplugin` in the pages' code blocks."""
    commands = {"eval": get_command(app).commands["eval"]}  # type: ignore[attr-defined]
    prepare = get_command(app).commands["prepare"]  # type: ignore[attr-defined]
    commands |= {f"prepare {name}": command for name, command in prepare.commands.items()}
    seen = 0
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                called = re.match(r"effplugin (prepare\s+\S+|eval) (.*?)(#|$)", line)
                if called is None:
                    continue
                command = commands[" ".join(called[1].split())]
                known = {option for parameter in command.params for option in parameter.opts}
                assert set(re.findall(r"--[\w-]+", called[2])) <= known, line
                seen += 1
    assert seen > 8
