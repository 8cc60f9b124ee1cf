"""Commands and settings that the documents show are ones that exist; tests/recipes runs the verbs themselves."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_r3.config import load
from slurm.launch import job_arrays, parser

sys.path.append(str(Path(__file__).parent))

import families

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return [
        block
        for file in DOCUMENTS
        for block in re.findall(rf"```{language}\n(.*?)```", file.read_text(), flags=re.DOTALL)
    ]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_documents_show_commands() -> None:
    assert len(commands()) >= 6


@pytest.mark.parametrize("words", [words for words in commands() if "-m" in words], ids=" ".join)
def test_a_verb_exists_and_its_settings_load(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    place = words.index("-m") + 1
    assert importlib.util.find_spec(words[place]) is not None
    if words[place] != "slurm.launch":
        load(words[place + 1 :])
    elif words[place + 1] not in ("status", "cancel"):
        assert job_arrays(parser().parse_args(words[place + 1 :]))


@pytest.mark.parametrize("words", [words for words in commands() if "slurm/train.sh" in words], ids=" ".join)
def test_settings_of_a_job_load(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if arguments := [word for word in words[words.index("slurm/train.sh") + 1 :] if word != "--print"]:
        load(arguments)


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "make"], ids=" ".join)
def test_a_make_target_exists(words: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("text", [block for block in blocks("yaml") if block.startswith("#")])
def test_a_config_loads(text: str, tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(text)
    load([str(tmp_path / "shown.yaml")])


def anchors(file: Path) -> set[str]:
    """Those that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for file in DOCUMENTS:
        for path, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", file.read_text()):
            target = file.parent / path if path else file
            assert target.exists(), f"{file.name} links to {path}"
            assert not anchor or anchor in anchors(target), f"{file.name} links to {path}#{anchor}"


def test_the_families_table_is_the_tested_families() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme == families.rewritten(readme), "python tests/families.py rewrites it"


def test_code_shown_from_a_file_is_in_it() -> None:
    shown = [block.split("\n", 1) for block in blocks("python") if re.match(r"# (nemo_r3|tests)/\S+\.py\n", block)]
    assert shown
    for name, code in shown:
        file = ROOT / name.removeprefix("# ")
        assert code in file.read_text(), f"{name}: the document shows another state of it"
