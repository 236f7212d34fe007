"""The documents' tables are what the results say: a figure changed by hand, in either, fails."""

import re

import pytest

from benchmarks import tables


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_the_tables_of_a_document_are_those_of_the_results(name):
    text = (tables.ROOT / name).read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run `python -m benchmarks.tables`"


def test_every_table_stands_in_a_document():
    texts = [(tables.ROOT / name).read_text(encoding="utf-8") for name in tables.DOCUMENTS]
    assert ({found[1] for text in texts for found in tables.MARKED.findall(text)}
            == set(tables.TABLES))


def test_a_figure_that_was_changed_by_hand_is_noticed():
    right = tables.filled("a\n<!-- table tail -->\n<!-- end -->\nb\n")
    assert re.search(r"vLLM \(CPU build\): \d+\.\d tok/s \| \d\.\d\dx", right)
    assert tables.filled(right.replace("tok/s", "tok/h")) == right
    assert right.startswith("a\n") and right.endswith("<!-- end -->\nb\n")


@pytest.mark.parametrize(("command", "shown"), [
    ("versus.py /tmp/peers --json /a/b-c/cpu.json", "versus.py peers --json cpu.json"),
    ("bench drafts NAME --k 1,2 --json benchmarks/results/x.json",
     "bench drafts NAME --k 1,2 --json benchmarks/results/x.json"),
])
def test_commands_are_shown_without_the_folders_of_the_machine(command, shown):
    assert tables.without_folders(command) == shown
