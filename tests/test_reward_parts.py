import pytest

from jspec.config import load_config
from jspec.errors import InputError
from jspec.reward_parts import RewardPart, reward_parts


def test_one_function_or_several_by_name():
    assert reward_parts("math_verify") == (RewardPart("math_verify", "math_verify"),)
    assert reward_parts("~/a:b/mine.py:f") == (RewardPart("f", "~/a:b/mine.py:f"),)
    config = load_config(None, [
        "reward.function={math: math_verify, brief: {function: soft_overlong, weight: -1}}",
        "reward.function.brief.options={buffer: 8}", "reward.function.math=~/mine.py:f"])
    math, brief = reward_parts(config.reward.function)
    assert math.name == "math" and math.function.startswith("/") and math.weight == 1.0
    assert brief == RewardPart("brief", "soft_overlong", -1.0, {"buffer": 8},
                               key="reward.function.brief")


@pytest.mark.parametrize("value, message", [
    ("{a: {function: math_verify, weight: 0}, b: {function: mine.py:f, weight: 0.0}}",
     "reward.function: the weights are all 0, and nothing would be learned"),
    ("{a: {function: math_verify, weight: heavy}}",
     "reward.function.a.weight must be a number that float32 holds, not 'heavy'"),
    ("{a: {function: math_verify, weight: 1e39}}", "a.weight must be a number that float32 holds"),
    ("{a: {function: math_verify, weight: [1, 2]}}",
     r"reward.function.a.weight must be a number that float32 holds, not \[1, 2\]"),
    ("{a: {function: math_verify, timeout_s: 0}}",
     "reward.function.a.timeout_s must be a number of seconds above 0"),
    ("{a: {function: math_verify, wieght: 2}}",
     "reward.function.a has no 'wieght'; its keys are function, weight, options, timeout_s"),
    ("{a: {function: math_verify, options: 3}}", "reward.function.a.options must be a mapping"),
    ("{a: {weight: 2}}", "reward.function.a must be a function's name, or a mapping such as"),
    ("{a: 3}", "reward.function.a must be a function's name"),
    ("{pass@1: math_verify}", "has the name 'pass@1'; it names metrics, so it takes letters"),
    ("{a: math_verify, a: mine.py:f}", "duplicate key a"),
    ("[a, b]", "'reward.function' must be text or a mapping"),
    ("{}", "'reward.function' must be"),
])
def test_what_names_no_rewards(value, message):
    with pytest.raises(InputError, match=message) as caught:
        load_config(None, [f"reward.function={value}"])
    assert "\n" not in str(caught.value)
