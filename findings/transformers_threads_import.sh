#!/usr/bin/env bash
# What:     Two threads of which each is the first to run `from transformers import NAME`: one of them gets ImportError: cannot
#           import name. transformers 5.24.0 puts a lazy module in its place (sys.modules) at the end of its own import, and
#           Python hands a thread that waited for that import the first module, which has no classes.
# Matters:  Servers and pools of threads that load their tokenizers when they start fail at random, and a program that takes
#           whatever fails at a load for a bad file blames the file.
# Instead:  Import transformers once before there are threads, or take the name from sys.modules["transformers"] after
#           `import transformers` (jspec/hub/tokenizer.py does).
# Output:   transformers 5.24.0, Python 3.11.7, of 20 processes each
#           both threads import the name for the first time: 20 failed
#               ImportError: cannot import name 'PreTrainedTokenizerFast' from 'transformers'
#           import transformers, then the name from sys.modules: 0 failed
#           as found
#           It exits with 1 if that has changed.
# Needs:    Python 3.11 or newer, pip, 300 MB in a temporary folder. Two minutes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3 2>"$work/pip.log" || { cat "$work/pip.log"; exit 1; }

cat >"$work/both.py" <<'PYTHON'
import sys
import threading
import time


def name():
    from transformers import PreTrainedTokenizerFast


def from_modules():
    import transformers

    sys.modules["transformers"].PreTrainedTokenizerFast


def run(take):
    try:
        take()
    except ImportError as error:
        print("ImportError:", str(error).split(" (")[0])


take = {"name": name, "modules": from_modules}[sys.argv[1]]
threads = [threading.Thread(target=run, args=(take,)) for _ in range(2)]
threads[0].start()
while "transformers" not in sys.modules:  # the second thread comes while the first one imports
    time.sleep(1e-4)
threads[1].start()
for thread in threads:
    thread.join()
PYTHON

export TRANSFORMERS_NO_ADVISORY_WARNINGS=1
"$work/venv/bin/python" - "$work/both.py" <<'PYTHON'
import platform
import subprocess
import sys
from importlib.metadata import version

TIMES = 20


def failures(way):
    return [said for said in (subprocess.run([sys.executable, sys.argv[1], way], text=True, capture_output=True,
                                             check=True).stdout for _ in range(TIMES)) if said]


print(f"transformers {version('transformers')}, Python {platform.python_version()}, of {TIMES} processes each")
names, modules = failures("name"), failures("modules")
print(f"both threads import the name for the first time: {len(names)} failed")
for said in sorted(set(names)):
    print("   ", said.strip())
print(f"import transformers, then the name from sys.modules: {len(modules)} failed")
found = len(names) == TIMES and not modules
print("as found" if found else "this has changed")
sys.exit(not found)
PYTHON
