"""The README's Python is executed as it stands, block by block, and its commands are those that exist."""

import re
import shlex
import sys

import pytest
import torch
from published import PublishedAgent
from support import ROOT

from dql import cli

README = (ROOT / "README.md").read_text()
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


def test_every_command_exists(capsys):
    lines = re.findall(r"^dql (.*?)(?:  +#.*)?$", README, re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line)
        command = words[:2] if words[0] == "data" else words[:1]
        with pytest.raises(SystemExit) as ended:
            sys.exit(cli.main([*command, "--help"]))
        assert ended.value.code == 0, line
        told = capsys.readouterr().out
        for flag in (word for word in words if word.startswith("--")):
            assert flag in told, line
