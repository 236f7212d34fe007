"""Parquet files and saved data sets, made here as `datasets` 5.2.0 makes them."""

import json
import re
import sys

import pytest

from jspec.errors import InputError
from jspec.learning_sections import DataSection, EvaluationSection
from jspec.rl.records import load_records

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = {"question": ["1 + 1", "2 + 2", "3 + 3"], "solution": ["2", "4", "6"],
        "level": [1, None, 3]}
NAMES = {"prompt_column": "question", "answer_column": "solution"}


def table(first=0, last=3, **more):
    return pa.table({name: values[first:last] for name, values in (ROWS | more).items()})


def stream(path, content):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as out:
        out.write_table(content)


def save(folder, *shards):
    """As `save_to_disk` writes a Dataset; state.json says the order of its files, here the last one
    first."""
    folder.mkdir(parents=True)
    for number, shard in enumerate(shards):
        stream(folder / f"data-{number}.arrow", shard)
    files = [{"filename": f"data-{number}.arrow"} for number in range(len(shards))]
    (folder / "state.json").write_text(json.dumps({"_data_files": files[::-1]}))
    (folder / "dataset_info.json").write_text("{}")


def save_all(folder, **splits):
    """As it writes a DatasetDict."""
    for split, content in splits.items():
        save(folder / split, content)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def load(source, **settings):
    return load_records(DataSection(**({"source": str(source)} | NAMES | settings)), seed=0)


def refused(source, message, **settings):
    with pytest.raises(InputError, match=message) as caught:
        load(source, **settings)
    assert "\n" not in str(caught.value)


def test_a_parquet_file(tmp_path):
    parquet.write_table(table(), tmp_path / "a.parquet")
    records = load(tmp_path / "a.parquet")
    assert list(records) == [
        {"prompt": "1 + 1", "answer": "2", "level": 1},
        {"prompt": "2 + 2", "answer": "4", "level": None},
        {"prompt": "3 + 3", "answer": "6", "level": 3}]
    assert records.where(2) == f"{tmp_path}/a.parquet: row 3"
    assert len(load(tmp_path / "a.parquet", held_out=1)) == 2


def test_the_same_rows_have_the_same_digest_however_they_are_stored(tmp_path):
    parquet.write_table(table(), tmp_path / "a.parquet")
    save(tmp_path / "saved", table(1, 3), table(0, 1))
    whole, saved = load(tmp_path / "a.parquet"), load(tmp_path / "saved")
    assert list(whole) == list(saved) and saved.where(1) == f"{tmp_path}/saved/data-0.arrow: row 1"
    assert whole.digest([0, 2]) == saved.digest([0, 2]) != saved.digest([0, 1])


def test_splits(tmp_path):
    save_all(tmp_path / "both", train=table(0, 2), test=table(2, 3))
    save_all(tmp_path / "odd", a=table(0, 2), b=table(2, 3))
    save_all(tmp_path / "one", only=table())
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for name, part in {"train-00000-of-00002": (0, 1), "train-00001-of-00002": (1, 2),
                       "test-00000-of-00001": (2, 3)}.items():
        parquet.write_table(table(*part), folder / f"{name}.parquet")
    assert [len(load(tmp_path / name)) for name in ("both", "one", "hub", "both/test")] == [
        2, 3, 2, 1]
    assert load(tmp_path / "hub", split="test")[0] == load(tmp_path / "both", split="test")[0]
    refused(tmp_path / "both", "both has the splits 'train', 'test', and no 'tset'", split="tset")
    refused(tmp_path / "odd", r"odd has the splits 'a', 'b'; choose one \(data.split\)")
    refused(tmp_path / "both/test", "has no splits, and so no 'test'; leave data.split out",
            split="test")
    refused("arithmetic", "data.split='test' is for folders; data.source='arithmetic' has no",
            split="test")
    (folder / "train-00000-of-00002.parquet").unlink()
    refused(tmp_path / "hub", "the split 'train' is of 2 files, and 1 are there")
    parquet.write_table(table(), folder / "more.parquet")
    refused(tmp_path / "hub", "names a split and more.parquet names none")


def test_values_that_are_json_are_decoded(tmp_path):
    values = pa.array(['{"a":1}', '"007"', None])
    calls = pa.StructArray.from_arrays([pa.array(['{"x":[1]}']).cast(pa.json_())], ["arguments"])
    nested = pa.ListArray.from_arrays(pa.array([0, 1, None, 1], pa.int32()), calls)
    save(tmp_path / "saved", table(0, 3, any=values.cast(pa.json_()), calls=nested))
    records = load(tmp_path / "saved")
    assert [record["any"] for record in records] == [{"a": 1}, "007", None]
    assert [record["calls"] for record in records] == [[{"arguments": {"x": [1]}}], [], None]


def test_messages_without_what_tables_fill_them_up_with(tmp_path):
    asked = [{"role": "user", "content": "q", "tool_calls": None, "name": "me"},
             {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "name": None},
             {"role": "tool", "content": "8", "tool_calls": None, "name": None}]
    parquet.write_table(pa.table({"messages": [asked], "answer": [8]}), tmp_path / "a.parquet")
    (record,) = load_records(DataSection(source=str(tmp_path / "a.parquet")), seed=0)
    assert record == {"answer": "8", "prompt": [
        {"role": "user", "content": "q", "name": "me"},
        {"role": "assistant", "tool_calls": [{"id": "1"}]}, {"role": "tool", "content": "8"}]}


def test_a_column_that_is_not_there(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(table(), path)
    refused(path, r"a.parquet: row 1: no 'quesiton' \(it has 'question', 'solution', 'level'\); "
            "did you mean 'question'\\? data.prompt_column names it", prompt_column="quesiton")
    refused(path, r"no 'gold' \(it has .*\); data.answer_column names another",
            answer_column="gold")
    refused(path, "row 1: 'level' is not a string, but int", prompt_column="level")


def test_a_column_inside_another(tmp_path):
    more = {"reward_model": [{"ground_truth": "2", "style": "rule"}] * 3}
    parquet.write_table(table(**more), tmp_path / "a.parquet")
    record = load(tmp_path / "a.parquet", answer_column="reward_model.ground_truth")[0]
    assert record["answer"] == "2" and record["reward_model"] == more["reward_model"][0]
    refused(tmp_path / "a.parquet", "row 1: in 'reward_model': no 'truth'",
            answer_column="reward_model.truth")


def test_what_is_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "data.source=.*empty is a folder without a data set")
    (tmp_path / "bad.parquet").write_text("no parquet")
    refused(tmp_path / "bad.parquet",
            "cannot read the prompts .*bad.parquet: .*; check data.source")
    refused(tmp_path / "gone.parquet", "cannot read the prompts .*gone.parquet: No such file")
    save(tmp_path / "saved", table())
    (tmp_path / "saved/data-0.arrow").unlink()
    refused(tmp_path / "saved", "cannot read the prompts .*data-0.arrow: No such file")
    parquet.write_table(table(0, 0), tmp_path / "none.parquet")
    refused(tmp_path / "none.parquet", "none.parquet holds no prompts; it needs rows")


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path / "a.parquet", re.escape("run: pip install -e '.[data]'"))


def test_what_evaluations_call_their_sources():
    sources = ("a/math.jsonl", "a/b.parquet", "data/gsm8k", "reasoning_gym:chain_sum")
    assert EvaluationSection(sources=sources).labels == ("math", "b", "gsm8k", "chain_sum")
