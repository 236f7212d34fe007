import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jspec.errors import InputError
from jspec.rl.rewards import FAILURES, RewardInput, RewardPool, check_reward, load_reward

ROOT = Path(__file__).parents[2]
BEHAVIOURS = '''
import os, signal, time
from fractions import Fraction

import numpy as np

class Mute(Exception):
    def __str__(self): raise OSError("no")

def behave(prompt, response, answer, finished, length, max_new_tokens, **meta):
    if response == "raise": raise ValueError("two\\nlines")
    if response == "loud": raise ValueError("\\ud800 \\x1b[31m" + 9999 * "x")
    if response == "print": print(prompt, flush=True); return 0.5
    if response == "mute": raise Mute
    if response == "hidden": return Mute()
    if response == "exit": raise SystemExit(2)
    if response == "die": os._exit(3)
    if response == "sleep": time.sleep(1000)
    if response == "hang":  # for ever, in C, deaf to a polite request
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        sum(range(10**14))
    values = {"nan": float("nan"), "inf": float("inf"), "string": "1.0", "none": None,
              "list": [1.0], "huge": 1e39, "long": 10**400, "true": True, "integer": -2,
              "float32": np.float32(0.25), "fraction": Fraction(1, 2), "numpy bool": np.bool_(True)}
    if response in values: return values[response]
    return float(len(prompt + response + answer) + 1000 * length - 0.5 * (not finished)
                 + sum(meta.values()))
'''
OK = dict.fromkeys(FAILURES, 0)


@pytest.fixture(scope="module")
def behave(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "behave.py"
    path.write_text(BEHAVIOURS)
    return f"{path}:behave"


@pytest.fixture(scope="module")
def pool(behave):
    # on a loaded machine a second may pass before the death of a process is seen: only what hangs
    # shall time out
    with RewardPool(behave, workers=2, timeout_s=60.0) as pool:
        yield pool


def items(*responses):
    return [RewardInput("", response, "") for response in responses]


def test_grades_come_in_order_and_see_everything(pool):
    inputs = [RewardInput("p" * i, "r", "a" * 2, {"x": 100, "y": i}, i % 2 == 0, i)
              for i in range(20)]
    result = pool.grade(inputs)
    np.testing.assert_array_equal(result.rewards,
                                  [103 + 1002 * i - 0.5 * (i % 2) for i in range(20)])
    assert result.rewards.dtype == np.float32
    assert result.failures == OK and result.messages == {}


def test_nothing_to_grade(pool):
    result = pool.grade([])
    assert result.rewards.shape == (0,) and result.failures == OK


def test_numbers_of_any_type_are_rewards(pool):
    result = pool.grade(items("true", "integer", "float32", "fraction", "numpy bool"))
    np.testing.assert_array_equal(result.rewards, [1, -2, 0.25, 0.5, 1])
    assert result.failures == OK


def test_what_is_no_finite_number_scores_zero(pool):
    result = pool.grade(items("abc", "nan", "inf", "string", "none", "list", "huge", "ab"))
    np.testing.assert_array_equal(result.rewards, [3, 0, 0, 0, 0, 0, 0, 2])
    assert result.failures == OK | {"invalid": 6}
    assert result.messages == {"invalid": "returned float 'nan', which is no finite float32"}


def test_what_raises_scores_zero(pool):
    result = pool.grade(items("abc", "raise", "exit", "long", "ab"))
    np.testing.assert_array_equal(result.rewards, [3, 0, 0, 0, 2])
    assert result.failures == OK | {"raised": 3}
    assert result.messages == {"raised": "ValueError: two lines"}


def test_what_it_says_is_a_line_that_every_terminal_shows(pool):
    said = pool.grade(items("loud")).messages["raised"]
    assert (said.startswith("ValueError: \\ud800 \\x1b[31mxxx") and len(said)
            < 300 and said.isprintable())
    assert (pool.grade(items("mute")).messages
            == {"raised": "Mute: what it says cannot be read (OSError)"})
    assert pool.grade(items("hidden")).messages == {"raised": "OSError: no"}


PRINTING = """
import os
from jspec.rl.rewards import RewardInput, RewardPool
if __name__ == "__main__":
    os.dup2(OUTPUT, 1)
    with RewardPool(FUNCTION, workers=1) as pool:
        result = pool.grade([RewardInput("caf\\u00e9 \\udcff", "print", "")])
    assert result.rewards == [0.5], result
"""


def test_what_it_prints_cannot_fail(behave, tmp_path):
    """Into a pipe that nobody reads, in letters that the terminal has not."""
    reading, writing = os.pipe()
    os.close(reading)
    script = tmp_path / "grade.py"
    script.write_text(PRINTING.replace("OUTPUT", str(writing)).replace("FUNCTION", repr(behave)))
    done = subprocess.run([sys.executable, script], pass_fds=[writing], stderr=subprocess.PIPE,
                          text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"})
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_ends_scores_zero_and_is_replaced(pool):
    result = pool.grade(items("a", "die", "ab", "die", "die", "abc"))
    np.testing.assert_array_equal(result.rewards, [1, 0, 2, 0, 0, 3])
    assert result.failures == OK | {"died": 3}
    assert result.messages == {"died": "its process ended with exit code 3"}
    assert pool.grade(items("abcd")).rewards == [4]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_dies_waiting_costs_nothing(behave, workers):
    """Whether the death is seen before or after the next responses come; and no process outlives
    its pool."""
    before = set(multiprocessing.active_children())
    with RewardPool(behave, workers=workers, timeout_s=60.0) as pool:
        for notice in (False, True):
            assert pool.grade(items("abc")).rewards == [3]
            process, *_ = set(multiprocessing.active_children()) - before
            process.kill()
            deadline = time.monotonic() + 30
            while notice and pool.pool.active and time.monotonic() < deadline:
                time.sleep(0.05)
            result = pool.grade(items("a", "ab", "abc", "abcd"))
            np.testing.assert_array_equal(result.rewards, [1, 2, 3, 4])
            assert result.failures == OK
            deadline = time.monotonic() + 30
            # one that ends is waited for
            while len(left := set(multiprocessing.active_children()) - before) > workers:
                assert time.monotonic() < deadline, left
    assert not set(multiprocessing.active_children()) - before


def test_what_hangs_is_killed_scores_zero_and_stops_nothing(behave):
    with RewardPool(behave, workers=2, timeout_s=4.0) as pool:
        result = pool.grade(items("a", "sleep", "ab", "hang", "abc", "abcd"))
        np.testing.assert_array_equal(result.rewards, [1, 0, 2, 0, 3, 4])
        assert result.failures == OK | {"timed_out": 2}
        assert (result.messages
                == {"timed_out": "took longer than reward.timeout_s=4 seconds and was killed"})
        assert pool.grade(items("abcd")).rewards == [4]


def test_every_kind_is_logged_once(behave, caplog):
    with RewardPool(behave, workers=1, timeout_s=60.0) as pool:
        for _ in range(2):
            assert (pool.grade(items("nan", "raise", "raise")).failures
                    == OK | {"invalid": 1, "raised": 2})
    logged = sorted(record.getMessage().partition("scored a response 0 ")[2]
                    for record in caplog.records)
    assert (logged == ["(invalid): returned float 'nan', which is no finite float32",
                       "(raised): ValueError: two lines"])


def test_submitting_does_not_wait(behave):
    with RewardPool(behave, workers=2, timeout_s=1000.0) as pool:
        begin = time.monotonic()
        pool.submit(items("sleep", "a"))
        assert pool.submit(items("ab"))().rewards == [2]
        assert time.monotonic() - begin < 500.0  # of the thousand that the first takes


def test_closing_kills_what_runs(behave):
    pool = RewardPool(behave, workers=1, timeout_s=100.0)
    assert pool.grade(items("a")).rewards == [1]
    pool.submit(items("sleep"))
    begin = time.monotonic()
    pool.close()
    assert time.monotonic() - begin < 50.0  # of a hundred


def test_a_reward_that_breaks_after_the_check_still_stops_nothing(tmp_path):
    path = tmp_path / "gone.py"
    path.write_text("def f(prompt, response, answer, **meta): return 1.0")
    check_reward(f"{path}:f")
    path.unlink()
    with RewardPool(f"{path}:f", workers=1) as pool:
        result = pool.grade(items("a", "b"))
    assert result.failures == OK | {"raised": 2} and not result.rewards.any()
    assert "there is no file" in result.messages["raised"]


def test_an_import_that_hangs_in_the_processes_ends(tmp_path):
    path = tmp_path / "late.py"
    path.write_text("import multiprocessing, time\n"
                    "if multiprocessing.parent_process(): time.sleep(1000)\n"
                    "def late(**everything): return 1.0\n")
    with RewardPool(f"{path}:late", workers=1, ready_s=0.1) as pool:
        result = pool.grade(items("a", "ab"))
    assert (result.failures == OK | {"timed_out": 2}
            and "none had imported the function" in result.messages["timed_out"])


def test_processes_of_a_killed_run_end(behave, tmp_path):
    script = f"""
import multiprocessing, os, time
from jspec.rl.rewards import RewardInput, RewardPool
if __name__ == "__main__":
    pool = RewardPool({behave!r}, workers=2, timeout_s=1.0)
    pool.grade([RewardInput("", "a", "")])
    pool.submit([RewardInput("", "sleep", "")])
    time.sleep(0.5)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), 9)
"""
    path = tmp_path / "run.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True,
                          env=environment) as run:
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert run.wait(timeout=30) == -signal.SIGKILL
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(running, pids)):
        time.sleep(0.2)
    assert not any(map(running, pids))


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_reward_processes_import_no_jax():
    code = ("import sys, jspec.rl.rewards; print('jax' in sys.modules, 'transformers' in "
            "sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=ROOT).stdout
    assert out.split() == ["False", "False"]


@pytest.mark.parametrize(
    "response, answer, right",
    [
        ("42", "42", True),
        ("The answer is 42.", "42", True),
        ("\\boxed{42}", "42", True),
        ("So it is $\\boxed{42}$, as 17 + 25 = 42.", "42", True),
        ("42.0", "42", True),
        ("**42**", "42", True),
        ("17 + 25 = 42", "42", True),
        ("x = 42", "42", True),
        ("1,234", "1234", True),
        ("-3", "-3", True),
        ("0.5", "\\frac{1}{2}", True),
        ("1/2", "$\\frac{1}{2}$", True),
        ("the result is $\\sqrt{2}$", "\\sqrt{2}", True),
        ("43", "42", False),
        ("3", "-3", False),
        ("142", "42", False),
        ("420", "42", False),
        ("It is 42 apples, or rather 43.", "42", False),
        ("forty-two", "42", False),
        ("", "42", False),
        ("   \n", "42", False),
        ("What is 42?\u0000", "41", False),
    ],
)
def test_math_verify(response, answer, right):
    assert (load_reward("math_verify")("What is 17 + 25?", response, answer, source="test")
            == float(right))


@pytest.mark.parametrize("answer", ["", "?", "17 + 25"])
def test_math_verify_says_when_the_answer_itself_cannot_be_read(answer):
    with pytest.raises(ValueError, match=f"cannot read the answer '{re.escape(answer)}' of the "
                       "prompt 'Which one"):
        load_reward("math_verify")("Which one?", answer, answer)


def test_math_verify_in_the_pool():
    with RewardPool("math_verify", workers=1, timeout_s=60.0) as pool:
        result = pool.grade([RewardInput("", text, "42")
                             for text in ("42", "41", "I do not know", "42.")])
    np.testing.assert_array_equal(result.rewards, [1, 0, 0, 1])
    assert result.failures == OK


@pytest.mark.parametrize(
    "content, name, message",
    [
        ("import nonsense_not_there", "f",
         "does not import: ModuleNotFoundError: No module named 'nonsense_not"),
        ("def f(:", "f", "does not import: SyntaxError"),
        ("1 / 0", "f", "does not import: ZeroDivisionError: division by zero"),
        ("def g(): pass\nfrom os.path import join", "f", "has no 'f'; its functions are: g$"),
        ("", "f", "has no 'f'$"),
        ("f = 3", "f", "'f' is not a function, but int"),
        ("def f(response): return 1.0", "f",
         r"must take \(prompt, response, answer, \*\*meta\) by name: "),
        ("def f(prompt, response, answer): return 1.0", "f",
         "must take .* by name: got an unexpected keyword"),
    ],
)
def test_a_function_that_cannot_work_is_refused_at_once(tmp_path, content, name, message):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        check_reward(f"{path}:{name}")
    assert (str(caught.value).startswith(f"reward.function='{path}:{name}'")
            and "\n" not in str(caught.value))


@pytest.mark.parametrize("function", ["exact", "mine.py", "mine:f", ":f", "mine.py:", ""])
def test_a_function_that_is_none(function):
    with pytest.raises(InputError, match="is none of 'math_verify', 'reasoning_gym', "
                       "'soft_overlong', 'path/to/file.py:function'"):
        check_reward(function)


def test_a_file_that_is_not_there():
    with pytest.raises(InputError, match=r"reward.function='no/such.py:f': there is no file "
                       r"no/such.py \(looked in /"):
        check_reward("no/such.py:f")


def test_a_file_with_dataclasses_and_a_callable_object(tmp_path):
    path = tmp_path / "objects.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Constant:\n    value: float\n"
        "    def __call__(self, prompt, response, answer, **meta): return self.value\n"
        "always = Constant(0.5)\n"
    )
    check_reward(f"{path}:always")
    with RewardPool(f"{path}:always", workers=1) as pool:
        assert pool.grade(items("a")).rewards == [0.5]


def test_reasoning_gyms_verifier_is_only_for_its_tasks():
    with pytest.raises(InputError, match="reasoning_gym grades only its own tasks, not "
                       "data.source='arithmetic'"):
        check_reward("reasoning_gym", "arithmetic")


def test_reasoning_gym_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"pip install 'jspec\[tasks\]'"):
        check_reward("reasoning_gym", "reasoning_gym:chain_sum")


def test_known_names_pass_the_check():
    check_reward("math_verify", "arithmetic")
    check_reward(f"{ROOT}/configs/rewards/count_up.py:count_up", "configs/data/count_up.jsonl")


@pytest.mark.parametrize(
    "prompt, response, reward",
    [
        ("5", "67890123", 1.0),
        ("345", "67890123", 1.0),
        ("9", "01234567", 1.0),
        ("5", "6789012345", 1.0),  # only the first eight count
        ("5", "6", 1 / 8),
        ("5", "", 0.0),
        ("5", "77890123", 6 / 8),  # a slip costs two places, not the rest
        ("5", "66666666", 1 / 8),
        ("5", "6x8", 1 / 8),
    ],
)
def test_counting_up(prompt, response, reward):
    assert (load_reward(f"{ROOT}/configs/rewards/count_up.py:count_up")(prompt, response,
                                                                        "12345678") == reward)


def test_counting_prompts_are_what_their_script_makes():
    script, data = ROOT / "configs/rewards/count_up.py", ROOT / "configs/data/count_up.jsonl"
    made = subprocess.run([sys.executable, script], capture_output=True, text=True,
                          check=True).stdout
    assert made == data.read_text()
    reward = load_reward(f"{script}:count_up")
    lines = [json.loads(line) for line in made.splitlines()]
    assert [reward(line["prompt"], line["answer"], line["answer"]) for line in lines] == [1.0] * 30
