"""The README and docs/: what they link to is there, and their code is that of the examples."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md",
             *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^( {4}[^\n]*|```.*?^```)$", re.M | re.S)


def prose(path: Path) -> str:
    """A document without its code."""
    return CODE.sub("", path.read_text())


def links(path: Path) -> list[str]:
    """What a document links to or shows, but for other sites."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    return [target for target in targets if not target.startswith(("http", "mailto"))]


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing(path: Path) -> list[str]:
    """The links of a document that lead nowhere."""
    found = []
    for target in links(path):
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        if not to.exists() or (anchor and anchor not in anchors(to)):
            found.append(target)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    assert not missing(path)


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_no_merge_was_left_half_done(path):
    assert not re.findall(r"^(?:<{7}|={7}|>{7})(?: .*)?$", path.read_text(), re.M)


def test_a_link_to_nowhere_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title, here\n[a](b.md) [c](#a-title-here) [d](#else)\n"
                    "\n    [code](x.md)\n")
    assert missing(page) == ["b.md", "#else"]


def test_every_document_and_example_is_linked_from_the_readme():
    here = {(ROOT / target.partition("#")[0]).resolve() for target in links(ROOT / "README.md")}
    assert set((ROOT / "docs").glob("*.md")) | {ROOT / "examples"} <= here
    told = "".join(path.read_text() for path in DOCUMENTS)
    examples = [path.name for path in (ROOT / "examples").iterdir() if path.is_file()]
    assert examples and all(f"examples/{name}" in told for name in examples)


def code_of(heading: str) -> list[str]:
    """The lines of the README's code under a heading, without blank ones."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [line[4:] for line in section.splitlines() if line.startswith("    ")]


def test_the_code_of_the_readme_is_that_of_the_examples():
    _, *call = code_of("In Python")  # below the imports
    assert call and set(call) <= set((ROOT / "examples" / "own_jit.py").read_text().splitlines())
    line, *reward = code_of("Your own task")[:4]
    assert line in (ROOT / "examples" / "own_reward.jsonl").read_text().splitlines()
    assert "\n".join(reward) in (ROOT / "examples" / "own_reward.py").read_text()
