import json
import re

import pytest

from jspec.rl import math_grading
from jspec.rl.math_grading import check_gold, math_verify
from jspec.rl.math_reading import Words
from jspec.rl.records import ARITHMETIC
from tests.rl.math_answers import ANSWERS

CASES = {
    # kind: (response, answer, is it right?)
"forms": [
    ("**73**", "73", 1), ("x = 42", "42", 1), ("17 + 25 = 42", "42", 1), ("Answer:42", "42", 1),
    ("`42`", "42", 1), ('"42"', "42", 1), ("The answer is 42.", "42", 1),
    ("<answer>42</answer>", "42", 1), ("(42)", "42", 1), ("So 17+25=42! Great.", "42", 1),
    ("**Answer:** 42", "42", 1), ("1. 42", "42", 1), ("- 42", "42", 1), ("42 or 43", "42", 0),
    ("42 or 43", "43", 0), ("It is 42 apples, or rather 43.", "42", 0), ("", "42", 0),
    ("4 and then 2", "42", 0), ("H2O", "2", 0), ("answer => 42", "42", 1),
    ("It is 42. Bye! :-)", "42", 1), ("That is 42 for him/her.", "42", 1),
],
"expressions": [
    ("17 + 25", "42", 0), ("17 + 25 is", "42", 0), ("84/2", "42", 0), ("2^{10}", "1024", 0),
    ("x = 17 + 25", "42", 0), (r"\boxed{17 + 25}", "42", 0), (r"\sqrt{4}", "2", 0),
    ("seventeen + 25", "25", 0), ("42 = 17 + 25", "42", 0), ("seventeen+25", "25", 0),
    ("tax*42", "42", 0), ("tax * 42", "42", 0), ("42*tax", "42", 0), ("$ab+1$", "1", 0),
    ("$ab+1$", "1 + ab", 1), ("The answer is $ba^2$.", "a^2b", 1), ("$ab/2$", r"\frac{ab}{2}", 1),
    (r"It is \frac{ab}{2}", "2", 0), (r"It is \frac{ab}{2}", r"\frac{ab}{2}", 1),
],
"boxes": [
    (r"\boxed{41} no wait \boxed{42}", "42", 1), (r"\boxed{41} no wait \boxed{42}", "41", 0),
    (r"\boxed{42", "42", 0),
    (r"$\boxed{42}$, as 17 + 26 = 43.", "42", 1), (r"\boxed{}", "42", 0), (r"\fbox{42}", "42", 1),
    (r"\boxed{\frac{1}{2}} <answer>3</answer>", "0.5", 1), (r"\boxed{\{1, 2\}}", r"\{1, 2\}", 1),
    ("<answer>42", "42", 0), (r"\boxed{17 + 25 = 42}", "42", 1), (r"\boxed{\boxed{42}}", "42", 1),
    (r"So $\boxed 42$.", "42", 1), ("<answer>4</answer> or <answer>5</answer>", "5", 1),
],
"numbers": [
    ("1,234", "1234", 1), ("1, 234", "1234", 0), ("1e3", "1000", 1), ("10^{3}", "1000", 1),
    ("1", "1e-7", 0), ("0.0000001", "1e-7", 1), ("2", "2e16", 0), ("20000000000000000", "2e16", 1),
    ("2.5 × 10³", "2500", 1), ("0.50", "0.5", 1), ("0.3333333", "1/3", 0), ("0,5", "0.5", 0),
    ("-0.0", "0", 1), ("−5", "-5", 1), ("5", "-5", 0),
    ("1000000000000000000001", "1000000000000000000000", 0), ("142", "42", 0), ("2/4", "1/2", 1),
    ("1 1/2", "1.5", 1), ("31/2", "3 1/2", 0), ("3 1/2", "31/2", 0), ("2 and a half", "2", 0),
    ("2 and three quarters", "2.75", 1), ("2 and a half hours", "2.5", 1), ("3 dozen eggs", "3", 0),
    ("3 dozen", "36", 1), (r"0.\overline{3}", "1/3", 1), ("0", r"0.\overline{3}", 0),
    (r"\frac{1}{6}", r"0.1\overline{6}", 1), ("0.6", r"0.1\overline{6}", 0),
    (r"\frac{1}{-2}", "-0.5", 1), (r"1\frac{1}{2}", "1.5", 1), (r"\frac{-1}{2}", "-0.5", 1),
    ("42 million", "42", 0), ("42 million", "42000000", 1),
],
"percent": [("50%", "0.5", 1), ("50%", "50", 0), ("50", r"50\%", 0), ("50 percent", "1/2", 1),
            ("0.5", r"50\%", 1)],
"units": [
    ("42 apples", "42", 1), ("x = 42 apples.", "42", 1), ("5", "5 cm", 1), ("5 m", "5 cm", 0),
    (r"5 \text{ cm}", "5 cm", 1), ("$5", "5", 1), (r"\$5", "5", 1), ("5 dollars", "$5", 1),
    ("5 euros", "$5", 0), ("45°", r"45^\circ", 1),
    ("45 degrees", "45", 1), ("2 x", "2", 0), ("3k", "3", 0), ("It costs $5 and not $6.", "6", 1),
    ("7 km/h * 2", "7", 0), ("It is 7 kg/m^3.", "7", 1),
    ("The speed is 90 km/h.", "90 km/h", 1), ("The speed is 90 km/h.", "90 m/h", 0),
],
"times": [("12:30", "12", 0), ("12:30", "30", 0), ("12:30", "12:30", 1), ("3/4", "3:4", 0),
          ("3 : 4", "3:4", 1), (r"\boxed{a/b}", "a:b", 0), (r"\boxed{a : b}", "a:b", 1)],
"several": [
    ("(7, 3)", "(2, 3)", 0), (r"\{3, 2\}", "(3, 2)", 0), ("(3, 2)", r"\{2, 3\}", 0),
    ("2 and 1", "1, 2", 1), ("x = 2 or x = 3", "2, 3", 1), (r"x \in \{1, 2\}", "1, 2", 1),
    (r"x = 1 \pm \sqrt2", r"1 \pm \sqrt{2}", 1),
    (r"(2, \infty) \cup (-\infty, 1)", r"(-\infty, 1) \cup (2, \infty)", 1),
    ("The answer is [2, 3).", "[2,3)", 1),
    ("3, 2", "x = 2, y = 3", 0), ("2, 3", "x = 2, y = 3", 1), ("y = 3, x = 2", "x = 2, y = 3", 1),
    ("1,234", "1, 234", 0), (r"\boxed{\{x : x > 1\}}", r"\{x : x > 0\}", 0),
],
"equations": [("3", "x = 3", 1), ("y = 3", "x = 3", 0), ("2y = 4x + 2", "y = 2x + 1", 1),
    (r"3 \le x", r"x \geq 3", 1)],
"words": [
    ("The answer is Tuesday.", r"\text{Tuesday}", 1), ("It is not Tuesday", "Tuesday", 0),
    ("seat", "east", 0), ("The answer is (B).", "B", 1), (r"\boxed{\text{(B)}}", "(B)", 1),
    ("no", "No", 1), ("forty-two", "42", 0), ("The answer is May 5.", r"\text{May 5}", 1),
    (r"\boxed{Yam 5}", r"\text{May 5}", 0), ("H2O", r"\text{H2O}", 1), ("OH2", r"\text{H2O}", 0),
    ("2020-01-02", r"\text{2020-01-02}", 1), ("2017", r"\text{2020-01-02}", 0),
    ("f'(x)", r"\text{f'(x)}", 1), ("f(x)", r"\text{f'(x)}", 0),
    ("10:05 a.m.", r"\text{10:05 a.m.}", 1), ("10:05", r"\text{10:05 a.m.}", 0),
],
"spellings": [
    ("3 / 4", "3/4", 1), ("It is 3 / 4 cup.", "3/4", 1), ("84 / 2", "42", 0), ("3 ÷ 4", "0.75", 0),
    ("3 / 4", "3", 0), ("2 ½", "5/2", 1), ("The answer is 2 ½.", "2", 0),
    ("{3, 2, 1}", r"\{1,2,3\}", 1), ("{1, 2}", "(1, 2)", 0), ("S = {1, 2, 4}", r"\{1,2,3\}", 0),
    (r"\text{42}", "42", 1), (r"\boxed{\mathbf{\frac{3}{4}}}", "3/4", 1),
    (r"\boxed{{42}}", "42", 1), (r"\text{17 + 25}", "42", 0), (r"\text{42, 43}", "42", 0),
    ("5 €", "5", 1), ("5 €", r"\$5", 0), ("The answer is minus 42.", "42", 0),
    ("negative 42", "-42", 1), ("x⁴", "x^4", 1), ("10⁻³", "0.001", 1), ("10¹²", "10", 0),
    ("6.02 x 10^23", "6.02e23", 1), ("x_1 = 1, x_2 = 2", "2", 0), ("x_{1} = 1, x_{2} = 2", "2", 0),
    ("log_2(3)", r"\log_{2} 3", 1), ("x**12 + 1", "1 + x^{12}", 1),
    ("2**10", "1024", 0), ("10**-3", "0.001", 1), ("x^-2", "x^{-2}", 1),
    ("x1 = 1 and x2 = 2", "1, 2", 1), ("The point is (2; 3).", "3", 0), ("ln(2)", r"\ln 2", 1),
    ("The correct option is (C).", "C", 1),
],
"formulas": [
    ("2", "2t", 0), ("2h", "2h", 1), ("3√13", r"3\sqrt{13}", 1), ("9i + 6", "6+9i", 1),
    ("6.283185", r"2\pi", 1), ("6.28", r"2\pi", 0), ("sqrt(2)", r"\sqrt{2}", 1),
    ("infinity", r"\infty", 1), ("x² + 1", "x^2+1", 1), ("0", "R - r", 0), ("2r", "R + r", 0),
    ("r + R", "R + r", 1), (r"\delta", r"\Delta", 0), ("r_1", "R_1", 0),
    (r"\sin 30", r"\sin 30^\circ", 0), (r"\boxed{1/2}", r"\sin 30^\circ", 1),
    ("90 - x", r"90^\circ - x", 1), (r"\boxed{f'(x)}", "f(x)", 0),
    (r"\boxed{\mathbb{N}}", r"\mathbb{Z}", 0), (r"\mathbb{Z}", r"\mathbb{Z}", 1),
],}


@pytest.mark.parametrize("kind", CASES)
def test_the_rules_of_the_docstring(kind):
    cases = CASES[kind]
    assert [(*case[:2], int(math_verify("p", *case[:2]))) for case in cases] == cases


def test_answers_as_mathematics_writes_them():
    """Each is right as it is, in a box, in a tag and in a sentence; what is near is not, boxed or
    bare."""
    assert len(ANSWERS) >= 66
    faults = []
    for answer, misses in ANSWERS.items():
        check_gold(answer)
        right = [answer, rf"$\boxed{{{answer}}}$", f"So <answer>{answer}</answer>",
                 f"The answer is ${answer}$."]
        if not isinstance(math_grading.read_gold(answer), Words):
            right.append(f"Therefore, ${answer}$ it is")
        faults += [("is right", answer, text) for text in right
                   if math_verify("p", text, answer) != 1]
        wrong = [*misses, *(rf"\boxed{{{miss}}}" for miss in misses)]
        faults += [("is wrong", answer, text) for text in wrong
                   if math_verify("p", text, answer) != 0]
    assert not faults


def test_the_shipped_task_is_not_solved_by_its_own_expressions():
    for line in ARITHMETIC.read_text().splitlines():
        record = json.loads(line)
        expression = re.search(r"\d+ \S+ \d+", record["prompt"])[0]
        rewards = [math_verify(record["prompt"], text, record["answer"])
                   for text in (expression, record["prompt"], f"{expression} = {record['answer']}",
                                record["answer"])]
        assert rewards == [0, 0, 1, 1], record


def test_what_is_copied_from_the_prompt_is_no_answer():
    assert math_verify("Expand $(x + 1)^2$.", "(x+1)^2", "x^2+2x+1") == 0
    assert math_verify("Expand $(x + 1)^2$.", "1 + 2x + x^2", "x^2+2x+1") == 1
    assert math_verify("What is 10/4 as a decimal?", "10/4", "2.5") == 0
    assert math_verify("What is 3 / 4?", "3 / 4", "0.75") == 0
    assert math_verify("Which is it, 1/2 or 1/3?", "1/2", "0.5") == 1


@pytest.mark.parametrize("response, reward", [
    ("42", 0), ("So x = 42", 0), (r"\boxed{42} because", 1), ("<answer>42</answer> as", 1),
    (r"\boxed{42} or \boxed{4", 0),
    (r"\boxed{4", 0), ("<answer>42", 0),
])
def test_of_a_cut_response_only_what_is_whole_counts(response, reward):
    assert math_verify("p", response, "42", finished=False) == reward


@pytest.mark.parametrize("answer, why", [
    ("", "empty"), ("   ", "empty"), ("?", "no formula"), (r"\frac{1}{", "no formula"),
    ("17 + 25", "to be worked out"), ("2024-05-01", "to be worked out"),
    (r"\sum_{k=1}^{9} k", r"\\sum is not known"), ("9^{9^{9}}", "too large"),
    ("(9!)!", "too large"), ("x" * 2000, "too long"), ("(" * 50 + "1" + ")" * 50, "too long"),
    ("1, \\frac{", "no formula"), ("1 000 000", "multiplied"), ("4\n2", "multiplied"),
    ("The answer is 42", "multiplied"), ("May 5", "multiplied"), ("f'(x)", "prime"),
    ("y'' + y = 0", "prime"),
])
def test_answers_that_are_refused(answer, why):
    with pytest.raises(ValueError, match=f"(?s)cannot read the answer .*{why}"):
        check_gold(answer)
    with pytest.raises(ValueError, match="of the prompt 'Which one"):
        math_verify("Which one?", "1", answer)


@pytest.mark.parametrize("said", [r"\emptyset", r"\varnothing", r"\{ \}", "∅"])
def test_the_empty_set_has_many_signs(said):
    assert (math_verify("p", rf"\boxed{{{said}}}", r"\varnothing")
            == math_verify("p", f"${said}$", r"\emptyset") == 1)


def test_a_refused_answer_is_shown_in_short():
    with pytest.raises(ValueError) as said:
        check_gold("9" * 2000)
    assert len(str(said.value)) < 300


def test_computer_algebra_is_not_asked_what_it_could_not_bound(monkeypatch):
    check_gold(r"\sqrt{2}")
    monkeypatch.setattr(math_grading, "verified", lambda *_: pytest.fail("was asked"))
    for response in ("9^{9^{9}}", "((10^{99})^{99})^{99}", "(9!)!", r"\binom{99999}{5000}",
                     "(a+b+c)^{99}", "x^" * 99):
        assert math_verify("p", rf"\boxed{{{response}}}", r"\sqrt{2}") == 0


def test_of_long_responses_the_end_is_read():
    assert math_verify("p", "word " * 20000 + "it is 42", "42") == 1
    assert math_verify("p", r"\boxed{42}" + " word 7" * 20000, "42") == 1
    for text in ("1" * 100_000, "(" * 100_000, r"\boxed{" * 20_000, "<answer>" * 20_000,
                 "x^" * 50_000, "1," * 50_000):
        assert math_verify("p", text, "42") == 0


@pytest.mark.parametrize(("response", "answer", "reward"), [
    (".1", "0.1", 1), (".1", "1", 0), ("It is .5", "5", 0), ("The answer is .5.", "0.5", 1),
    ("-.5", "-0.5", 1), ("wait...5", "5", 1), ("90 km/h", "90 km/h", 1), ("90 km/h", "90 m/h", 0)])
def test_a_leading_point_and_a_unit_with_signs_belong_to_the_number(response, answer, reward):
    assert math_verify("p", response, answer) == reward
