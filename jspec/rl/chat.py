"""Chat templates: programs that come with a model, rendered here only after they have shown that
they end.

`python -m jspec.rl.chat` renders one, within bounds of processor time, memory and output.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import sys
from typing import Any

from jspec.errors import InputError
from jspec.rl.messages import PromptText, conversation
from jspec.rl.processes import run_module

SECONDS, MEMORY, CHARACTERS = 10, 1 << 30, 1 << 20
"""What rendering one short message may take: of processor time and of memory, and how long its text
may be."""
TOO_MUCH = b"too much"


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, prompt: PromptText, system_prompt: str | None = None,
           add_generation_prompt: bool = True) -> str:
    """A prompt's messages, after the system prompt if there is one, as the tokenizer's chat
    template writes them.

    Raises:
        InputError: the template does not end, or writes without end.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # templates by name
        template = template.get("default", "")
    if (not ends(template, json.dumps(getattr(tokenizer, "special_tokens_map", {}), default=str),
                 system_prompt)):
        raise InputError("the tokenizer's chat template does not end: a short message took more "
                         f"than {SECONDS} s, {MEMORY >> 20} MiB or {CHARACTERS} characters; mend "
                         "the template, or go without it (data.chat_template=false, --raw)")
    return tokenizer.apply_chat_template(conversation(prompt, system_prompt), tokenize=False,
                                         add_generation_prompt=add_generation_prompt)


@functools.lru_cache(maxsize=16)
def ends(template: str, special_tokens: str, system_prompt: str | None) -> bool:
    """Whether a template writes a short message within the bounds: in a process of its own, which
    the system kills."""
    child = run_module(__name__)
    said, _ = child.communicate(json.dumps([template, special_tokens, system_prompt,
                                            SECONDS]).encode())
    return child.returncode >= 0 and said != TOO_MUCH


def main() -> None:
    """Renders what standard input says, within the bounds, and says so if it writes too much."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template, special_tokens, system_prompt, seconds = json.load(sys.stdin)
    limit(seconds)
    try:
        rendered = render_jinja_template([conversation("Hello", system_prompt)],
                                         chat_template=template,
                                         add_generation_prompt=True, **json.loads(special_tokens))
    except MemoryError:
        return too_much()
    except Exception:  # whatever a template raises will be said when it is used
        return
    if len(rendered[0][0]) > CHARACTERS:
        too_much()


def too_much() -> None:
    sys.stdout.buffer.write(TOO_MUCH)


def limit(seconds: int) -> None:
    """From here on so many seconds of processor time, and MEMORY bytes."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    bound = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (bound, bound))
    with contextlib.suppress(ValueError, OSError):  # not every system bounds memory
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        memory = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


if __name__ == "__main__":
    main()
