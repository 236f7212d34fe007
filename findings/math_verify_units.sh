#!/usr/bin/env bash
# What:     math-verify 0.9.0 strips units from the end of a formula by default, and takes the letters t, h, c, s, l, g, m, d
#           and o behind a digit, a brace or a blank for such: 2h is read as 2, x + 3t as x + 3, \pi r^2 h as \pi r^2.
#           So 2 is right where the answer is 2h, and the area of a circle where it is the volume of a cylinder.
# Matters:  As a reward it pays for answers that lack a variable, and nothing says so: both sides parse and verify.
# Instead:  Give it a LatexExtractionConfig whose NormalizationConfig has units=False, and strip units yourself
#           (jspec/rl/math_grading.py does).
# Output:   math-verify 0.9.0, latex2sympy2_extended 1.11.0
#           2h is read as 2, for 2 as the response: True; without units: 2*h, False
#           x + 3t is read as x + 3, for x + 3 as the response: True; without units: 3*t + x, False
#           \pi r^2 h is read as pi*r**2, for \pi r^2 as the response: True; without units: pi*h*r**2, False
#           as found
#           It exits with 1 if that has changed.
# Needs:    Python 3.11 or newer, pip, 100 MB in a temporary folder. About a minute.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "math-verify[antlr4_13_2]==0.9.0" latex2sympy2_extended==1.11.0 sympy==1.14.0 \
    2>"$work/pip.log" || { cat "$work/pip.log"; exit 1; }
"$work/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

print(f"math-verify {version('math-verify')}, latex2sympy2_extended {version('latex2sympy2_extended')}")
plain = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
without, results = [LatexExtractionConfig(normalization_config=plain)], []
for answer, response in (("2h", "2"), ("x + 3t", "x + 3"), (r"\pi r^2 h", r"\pi r^2")):
    gold, said = parse(f"${answer}$"), parse(f"${response}$")
    exact, said_exact = parse(f"${answer}$", without), parse(f"${response}$", without)
    results.append((verify(gold, said), verify(exact, said_exact)))
    print(f"{answer} is read as {gold[0]}, for {response} as the response: {results[-1][0]}; "
          f"without units: {exact[0]}, {results[-1][1]}")
found = results == [(True, False)] * 3
print("as found" if found else "this has changed")
sys.exit(not found)
PYTHON
