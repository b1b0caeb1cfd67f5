"""What README and the files that install the project promise."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, train


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [re.sub(r"\s*#.*", "", line) for line in lines if not line.startswith("-r")]


def test_pyproject_lists_what_the_requirements_list():
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dependencies"] == requirements("requirements.txt")
    assert project["dependency-groups"]["dev"] == requirements("requirements-dev.txt")


def test_the_lines_for_a_notebook_print_a_text(text_dataset, tmp_path, capsys):
    train(f"--dataset={text_dataset}", f"--out_dir={tmp_path}", "--max_iters=4")
    code, = re.findall(r"```python\n(.*?)```", Path(ROOT / "README.md").read_text("utf-8"), re.S)
    for old, new in (("out-fast-stdlib-char", str(tmp_path)), ("def ", "to be")):
        assert old in code
        code = code.replace(old, new)
    exec(code, {})
    text = capsys.readouterr().out
    assert text.startswith("to be") and len(text) == len("to be") + 200 + 1
