"""A run's samples in the terminal, and all of it as a page."""

import json
import re
from html.parser import HTMLParser

import pytest

from jspec import cli
from jspec.viewing import charts

VOID = {"meta", "br", "line", "circle", "path"}


def make_run(path, steps=5, several=False, **more):
    path.mkdir()
    records = [{"step": step, "reward": 0.1 * step, "reward_std": 0.05, "length": 7.0,
                "finished": 0.5, "acceptance_length": 1.5, "logprob_gap": 1e-6, "entropy": 1.0,
                "seconds/step": 2.0, "seconds/rollout": 1.5, "seconds/update": 0.5,
                "seconds/compile": 9.0 if step == 1 else 0.0, "time": "2026-11-28T00:00:00",
                **more} for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (path / "samples").mkdir()
    for step in (1, 5):
        rows = [{"step": step, "sample": i, "prompt": "say <b>&", "answer": "a",
                 "response": "</script><img src=x>\x1b[31mred\u202e", "reward": i - 1.0,
                 "rewards": {}, "length": 3, "finished": i > 0, "failed": i == 2, "cycles": 2,
                 "accepted": 1, **({"source": "ab"[i % 2]} if several else {})}
                for i in range(3)]
        (path / "samples" / f"{step:06d}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.yaml").write_text("name: <x>\n")
    return path


class Checked(HTMLParser):
    """What is open, and every tag and address that there was."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.addresses = [], set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_report_is_one_sound_page_that_asks_for_nothing(tmp_path, capsys):
    run = make_run(tmp_path / "run", **{"eval/pass@4": 0.25, "kl": None})
    assert cli.main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    page = Checked()
    page.feed(text)
    assert not page.open and not page.addresses
    assert not page.tags & {"script", "img", "link", "iframe", "b>"} and "http" not in text
    assert "&lt;/script&gt;&lt;img src=x&gt;\\x1b[31mred\\u202e" in text
    assert "pass@4" in text and "name: &lt;x&gt;" in text and "KL to the" not in text
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_of_several_sources_samples_and_charts_say_which(tmp_path, capsys):
    run = make_run(tmp_path / "run", several=True, **{
        "eval/pass@4": 0.25, "eval/a/pass@4": 0.5, "eval/b/pass@4": 0.0, "eval/reward/brief": 1.0,
        "source/a/reward": 0.5, "source/b/reward": 0.25, "source/a/length": 6.0,
        "source/b/length": None, "length_dropped": 9.0})
    assert cli.main(["report", str(run)]) == 0
    page, titles = (run / "report.html").read_text(), []
    for figure in page.split("<figure>")[1:]:
        title, names = re.match(r"<figcaption>(.*?)</figcaption>(.*?)<svg", figure).groups()
        titles.append((title, re.findall(r"</i>(.*?)</span>", names)))
    assert {("Evaluation", ("pass@4", "reward/brief")), ("Evaluation of a", ("pass@4",)),
            ("Evaluation of b", ("pass@4",)), ("Reward by source", ("a", "b")),
            ("Tokens an answer", ("length", "length_dropped")),
            ("Tokens an answer, by source", ("a",))} <= {(x, tuple(y)) for x, y in titles}
    assert "<th>source</th>" in page and "<tr><td>5</td><td>b</td>" in page
    assert "sample 1 from b: reward" in inspected(capsys, run)
    assert heads(inspected(capsys, run, "--source", "b")) == [("5", "1"), ("1", "1")]
    assert cli.main(["inspect", str(run), "--source", "c"]) == 2
    assert "no sample of" in capsys.readouterr().err


def test_a_report_says_what_was_changed(tmp_path):
    run = make_run(tmp_path / "run")
    for said, shown in (('{"step": 3, "changed": {"draft.path": [null, "<b>"]}}',
                         "<li>after step 3: draft.path from null to &#x27;&lt;b&gt;&#x27;</li>"),
                        ("[1]", "Samples")):
        (run / "changes.jsonl").write_text(said + "\n")
        assert cli.main(["report", str(run)]) == 0
        assert shown in (run / "report.html").read_text()


def test_a_run_without_a_step_is_one_line(tmp_path, capsys):
    for command in ("report", "inspect"):
        assert cli.main([command, str(tmp_path / "none")]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said and "is not the output_dir of a run" in said


def test_a_checkpoint_of_a_run_is_not_looked_at_alone(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for command in ("report", "inspect"):
        for which in ("best", "5"):
            assert cli.main([command, f"{run}@{which}"]) == 2
            said = capsys.readouterr().err.strip()
            assert said.endswith(f"of the whole run and not of one checkpoint; leave out @{which}")
    run.rename(tmp_path / "run@best")  # a folder may have such a name
    assert heads(inspected(capsys, tmp_path / "run@best", "--count", "1")) == [("5", "0")]


def inspected(capsys, *arguments):
    assert cli.main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def heads(text):
    return re.findall(r"step (\d+), sample (\d+)", text)


def test_samples_are_chosen_and_sorted(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    out = inspected(capsys, run)
    assert heads(out) == [(s, str(i)) for s in "51" for i in range(3)]
    assert "\x1b[31m" not in out and "\\x1b[31mred\\u202e" in out
    assert heads(inspected(capsys, run, "--step", "1", "--reward-below", "0.5"))[-1] == ("1", "1")
    assert heads(inspected(capsys, run, "--failed")) == [("5", "2"), ("1", "2")]
    assert heads(inspected(capsys, run, "--sort", "reward", "--count", "1")) == [("5", "0")]
    for arguments, said in ((("--step", "2-4"), "has samples of 2 step(s), 1 to 5"),
                            (("--reward-above", "9"), "no sample of"),
                            (("--step", "4-2"), "must be a step, such as 7")):
        assert cli.main(["inspect", str(run), *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("low, high", [(0, 0), (0.3, 0.3), (-2, -2), (0, 1), (1.2e-7, 9e-7),
                                       (-5, 1234567)])
def test_ticks_are_few_and_span_the_values(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8


def test_long_runs_are_thinned_and_keep_their_mean():
    points = [(i, float(i % 2)) for i in range(10_000)]
    few = charts.thinned(points)
    assert len(few) <= charts.MOST and all(abs(y - 0.5) <= 0.021 for _, y in few)
