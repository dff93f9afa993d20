"""The README's Python is executed as it stands, block by block, its commands are those that exist, and what it and the
other pages link to is there."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from published import PublishedAgent
from support import ROOT

from dql import cli

README = (ROOT / "README.md").read_text()
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/**/*.md")))
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("i", range(len(BLOCKS)))
def test_python_runs_as_it_stands(i, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = PublishedAgent(17, 6)
    torch.save(published.actor.state_dict(), "actor_1000.pth")
    torch.save(published.critic.state_dict(), "critic_1000.pth")
    exec(compile(BLOCKS[i], f"README block {i}", "exec"), {})


def test_there_is_python_to_run():
    assert len(BLOCKS) == 5


def test_the_two_commands_are_there():
    assert "\npip install -e . && dql demo\n" in README
    assert '\npip install -e ".[test]" && pytest -n auto --dist loadfile\n' in README


def anchors(page: Path) -> set[str]:
    """What a link into the page may end in: its headings, lower case, blanks as hyphens."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", page.read_text())
    for link in (link for link in links if "://" not in link):
        path, _, anchor = link.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), link
        assert not anchor or anchor in anchors(to), link


def test_the_readmes_tables_are_the_pages():
    """Of what was measured; the pages have more of it, and the reports."""
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    rows = re.findall(r"^\| (?:sample|select|update|device time|\| published).*$", README, re.MULTILINE)
    assert len(rows) >= 12
    assert [row for row in rows if row not in pages] == []


def test_every_page_is_linked_to():
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == set(re.findall(r"docs/(\w+\.md)", README))


def test_every_command_exists(capsys):
    (block,) = re.findall(r"```\n(dql data .*?)```", README, re.DOTALL)
    lines = [re.sub(r"  +#.*", "", line).removeprefix("dql ") for line in block.splitlines()]
    assert len(lines) >= 6 and all(line.startswith("dql ") for line in block.splitlines())
    for line in lines:
        words = shlex.split(line)
        command = words[:2] if words[0] == "data" else words[:1]
        with pytest.raises(SystemExit) as ended:
            sys.exit(cli.main([*command, "--help"]))
        assert ended.value.code == 0, line
        told = capsys.readouterr().out
        for flag in (word for word in words if word.startswith("--")):
            assert flag in told, line
