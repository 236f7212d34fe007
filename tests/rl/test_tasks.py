"""reasoning_gym is an optional extra: the tests drive a stand-in with its interface, and the real
one where it is."""

import os
import signal
import sys

import pytest

from jspec.errors import InputError
from jspec.learning_sections import DataSection
from jspec.rl import rewards
from jspec.rl.records import load_records, task_seed
from jspec.rl.tasks import ReasoningGym, create, score

STAND_IN = '''
import dataclasses, random, types

@dataclasses.dataclass
class Task:
    seed: int
    size: int
    limit: int = 10

    def __post_init__(self):
        assert self.limit > 0, "limit must be positive"

    def __len__(self):
        return self.size

    def __getitem__(self, number):
        value = (self.seed * 31 + number) % self.limit
        return {"question": f"Say {value}", "answer": None if value == 0 else value,
                "metadata": {"value": value}}

    def score_answer(self, answer, entry):
        return 1.0 if answer == str(entry["metadata"]["value"]) else 0.25

class Careless(Task):
    """Decided by the hash seed and the global generators, and it prints."""
    def __getitem__(self, number):
        print("careless")
        if number == 3: raise ValueError("three")
        return {"question": "".join(set("abcdefghij")), "answer": random.random(), "metadata": {}}

class Composite:
    def __init__(self, seed, size, datasets):
        self.parts = [create_dataset(part.name, seed=seed, size=size, **part.config)
                      for part in datasets]
    def __len__(self):
        return len(self.parts[0])
    def __getitem__(self, number):
        return self.parts[number % len(self.parts)][number]
    def score_answer(self, answer, entry):
        return self.parts[0].score_answer(answer, entry)

@dataclasses.dataclass
class DatasetSpec:
    name: str
    weight: float
    config: dict

composite = types.SimpleNamespace(DatasetSpec=DatasetSpec)
DATASETS = {"say": Task, "chain_sum": Task, "careless": Careless, "codeio": Task,
            "composite": Composite}
factory = types.SimpleNamespace(DATASETS=DATASETS)

def create_dataset(name, **options):
    return DATASETS[name](**options)
'''


@pytest.fixture
def gym(monkeypatch, tmp_path):
    """A reasoning_gym that processes started from here import too."""
    (tmp_path / "reasoning_gym.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    yield
    sys.modules.pop("reasoning_gym", None)


def test_questions_and_their_verdict(gym):
    tasks = load_records(DataSection(source="reasoning_gym:say", options={"size": 5, "limit": 4}),
                         seed=9)
    assert len(tasks) == 5
    record = tasks[1]
    assert ((record["prompt"], record["answer"], tasks.where(1))
            == ("Say 0", "", "question 1 of reasoning_gym:say"))
    assert record["task"] == "say" and record["options"] == {"size": 5, "seed": 9, "limit": 4}
    verdict = {name: record[name] for name in ("task", "options", "entry")}
    assert score("I say <answer>1</answer> <answer> 0 </answer>", **verdict) == 1.0
    assert score("1", **verdict) == 0.25
    with pytest.raises(IndexError):
        tasks[5]


def test_nothing_but_the_seed_decides_a_question(gym):
    """Whatever process makes it, and whatever was made before it."""
    one, two = (ReasoningGym("careless", {"seed": 7}) for _ in range(2))
    assert [one[number] for number in (0, 1, 5)] == [two[number] for number in (5, 1, 0)][::-1]
    assert one[0]["answer"] != one[1]["answer"]
    with pytest.raises(InputError, match="question 3 of reasoning_gym:careless cannot be made: "
                       "ValueError: three"):
        one[3]
    os.kill(one.process.pid, signal.SIGKILL)
    one.process.wait()
    assert one[8] == two[8]  # of a new process
    assert one.digest([0, 1]) == two.digest([0, 1]) != two.digest([0, 2])


def test_a_composite_of_tasks(gym):
    options = {"seed": 1, "size": 4,
               "datasets": [{"name": "say", "config": {"limit": 3}}, {"name": "careless"}]}
    tasks = ReasoningGym("composite", options)
    assert ((tasks[0]["prompt"], tasks[2]["prompt"])
            == ("Say 1", "Say 0") and len(tasks[1]["prompt"]) == 10)
    assert score("1", "composite", options, tasks[0]["entry"]) == 1.0


def test_held_out_questions_are_none_of_trainings(gym):
    config = DataSection(source="reasoning_gym:say", options={"size": 5, "limit": 7}, held_out=4)
    trained, held_out = ([record["prompt"] for record in load_records(config, 0, held_out=side)]
                         for side in (0, 1))
    assert trained == [f"Say {n}" for n in range(5)] and held_out == ["Say 5", "Say 6"]


def test_a_wide_seed_is_used_whole():
    seeds = [task_seed(seed) for seed in (0, 5, 2**31 - 1, 5 + 2**32, 5 + 2**33, 2**64 - 1)]
    assert seeds[:3] == [0, 5, 2**31 - 1] and len(set(seeds)) == 6 and max(seeds) < 2**31


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("chainsum", {}, "reasoning_gym has no task 'chainsum'; did you mean 'chain_sum'?"),
        ("say", {"depth": 3}, "task 'say' refuses data.options=.*'depth'"),
        ("say", {"limit": 0}, "task 'say' refuses data.options=.*limit must be positive"),
        ("composite", {"datasets": [{"nome": "say"}]},
         "task 'composite' refuses data.options=.*'nome'"),
        *[("composite", {"datasets": given}, "refuses data.options=.*: datasets must be a list of "
           "{name") for given in (5, "say", {"a": 1}, [3], [{"weight": 1}], [{"name": ["say"]}],
                                  [{"name": "say", "config": 3}])],
        ("composite", {"datasets": [{"name": "composite", "config": {}}]},
         "'composite' cannot be a part of itself"),
    ],
)
def test_mistakes(gym, task, options, message):
    with pytest.raises(InputError, match=message):
        create(task, {"seed": 0, "size": 3} | options)


def test_mistakes_are_told_by_the_process(gym):
    with pytest.raises(InputError,
                       match="reasoning_gym has no task 'chainsum'; did you mean 'chain_sum'?"):
        ReasoningGym("chainsum", {"seed": 0})
    with pytest.raises(InputError, match="data.options.size=0 leaves 'say' without questions"):
        ReasoningGym("say", {"seed": 0, "size": 0})
    with pytest.raises(InputError, match="data.options.size=9223372036854775808 of 'say' must be "
                       "at most 100000000"):
        ReasoningGym("say", {"seed": 0, "size": 2**63})
    with pytest.raises(InputError, match="datasets must be a list of"):
        ReasoningGym("composite", {"seed": 0, "datasets": 5})
    for options in ({"size": 2.5}, {"size": None}, {"seed": "x"}, {"seed": True}):
        with pytest.raises(InputError, match=f"data.options.{next(iter(options))}=.* of 'say' must "
                           "be a whole number"):
            ReasoningGym("say", {"seed": 0} | options)


@pytest.mark.parametrize(
    "task, options, message",
    [("codeio", {}, "'codeio' asks other questions at every start: .* read the clock; save some"),
     ("composite", {"datasets": [{"name": "say"}, {"name": "codeio"}]},
      "'codeio' asks other questions"),
     ("say", {"seed": None},
      "the seed of 'say' is null, and it asks other questions at every start"),
     ("composite", {"datasets": [{"name": "say", "config": {"seed": None}}]},
      "the seed of 'say' is null"),
     ],
)
def test_what_no_seed_decides_is_refused(gym, task, options, message):
    with pytest.raises(InputError, match=message):
        ReasoningGym(task, {"seed": 0} | options)


def test_reasoning_gym_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError,
                       match=r"reasoning_gym is not installed .* pip install 'jspec\[tasks\]'"):
        ReasoningGym("chain_sum", {"seed": 0})


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_the_real_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    options = {"size": 20, "seed": 5}
    for task in ("word_ladder", "isomorphic_strings", "polynomial_multiplication", "ransom_note"):
        one, two = (ReasoningGym(task, options) for _ in range(2))
        assert [one[number] for number in range(4)] == [two[number] for number in range(4)], task
    record = ReasoningGym("chain_sum", {"max_terms": 3} | options)[0]
    meta = {name: record[name] for name in ("task", "options", "entry")}
    assert (rewards.reasoning_gym("", f"<answer>{record['answer']}</answer>", record["answer"],
                                  **meta) == 1.0)
    assert rewards.reasoning_gym("", "no idea", record["answer"], **meta) < 0.5
