"""How prompts become tokens: through the tokenizer's chat template where it has one, as plain text
otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jspec.errors import InputError
from jspec.rl.chat import has_template, render
from jspec.rl.messages import PromptText, plain, text_of


def encode_prompt(tokenizer: Any, prompt: PromptText, system_prompt: str | None = None,
                  chat_template: bool = True) -> list[int]:
    """Token ids of a prompt, as `encode_prompts` makes them.

    Raises:
        InputError: naming the prompt and what the tokenizer or its template does not take.
    """
    try:
        return encode_prompts(tokenizer, [prompt], system_prompt, chat_template)[0]
    except InputError:
        raise
    except Exception as error:  # tokenizers and templates raise anything
        reason = (outside_alphabet(tokenizer, plain(prompt, system_prompt))
                  or " ".join(str(error).split()))
        raise InputError(f"the tokenizer cannot encode the prompt {shown(text_of(prompt))!r}: "
                         f"{reason}") from error


def encode_prompts(tokenizer: Any, prompts: Sequence[PromptText], system_prompt: str | None = None,
                   chat_template: bool = True) -> list[list[int]]:
    """Token ids of prompts, many at once. Raises whatever the tokenizer does, and InputError as
    `render` does.

    A chat template writes all special tokens itself. Plain text has those that the tokenizer puts
    before it (its begin token, once), and none of those that it puts behind: the policy is not to
    go on after its own end token.
    """
    if chat_template and has_template(tokenizer):
        rendered = [render(tokenizer, prompt, system_prompt) for prompt in prompts]
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]
    texts = [plain(prompt, system_prompt) for prompt in prompts]
    bare = tokenizer(texts, add_special_tokens=False)["input_ids"]
    begin = before(tokenizer(texts[:1])["input_ids"][0], bare[0])
    return [ids if ids[: len(begin)] == begin else begin + ids for ids in bare]


def before(whole: list[int], part: list[int]) -> list[int]:
    """What stands in `whole` before `part`."""
    starts = range(len(whole) - len(part) + 1)
    return whole[: next((start for start in starts if whole[start : start + len(part)] == part), 0)]


def shown(text: str) -> str:
    """A prompt as errors name it."""
    return text if len(text) <= 60 else text[:57] + "..."


def outside_alphabet(tokenizer: Any, text: str) -> str | None:
    """Which character of a text a tokenizer of single characters does not have; None if that is not
    what is wrong."""
    vocabulary = tokenizer.get_vocab()
    alphabet = "".join(sorted((token for token in vocabulary if len(token) == 1),
                              key=vocabulary.get))
    strange = next((character for character in text if character not in vocabulary), None)
    if strange is None or len(alphabet) + len(tokenizer.all_special_tokens) != len(vocabulary):
        return None
    return f"{strange!r} is not in its alphabet {shown(alphabet)!r}"
