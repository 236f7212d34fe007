"""Prompts as their sources have them: a text, or the messages of a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jspec.errors import InputError, shortened

Message = Mapping[str, Any]
"""{role, content}, and what else a chat template knows, such as tool_calls."""
PromptText = str | Sequence[Message]
ANSWERING = ("assistant", "tool")
"""Roles whose messages mean nothing without a chat template."""


def conversation(prompt: PromptText, system_prompt: str | None) -> list[Message]:
    """The messages of a prompt, after the system prompt if there is one and they have none of their
    own."""
    messages: list[Message] = ([{"role": "user", "content": prompt}] if isinstance(prompt, str)
                               else list(prompt))
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def text_of(prompt: PromptText) -> str:
    """The prompt as one text: of messages the last one's."""
    return prompt if isinstance(prompt, str) else prompt[-1].get("content", "")


def identity(prompt: PromptText) -> str:
    """Equal for equal prompts only, those of one source."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def plain(prompt: PromptText, system_prompt: str | None) -> str:
    """A prompt where there is no chat template. Raises InputError for messages that need one."""
    messages = conversation(prompt, system_prompt)
    for message in messages:
        if message["role"] in ANSWERING:
            raise InputError(f"the prompt has messages of the role {message['role']!r}, and "
                             "without a chat template nothing tells them from the user's; name a "
                             "tokenizer that has one, or set data.chat_template=true")
    return "\n\n".join(message["content"] for message in messages)


def read_prompt(value: Any, label: str) -> PromptText:
    """A prompt as it came: messages without what is None in them, for tables fill up with that what
    a message does not have.

    Raises InputError, which begins with `label`, for what is no prompt.
    """
    if isinstance(value, str):
        messages = [{"role": "user", "content": value}]
    elif isinstance(value, list):
        messages = [_message(said, number, label) for number, said in enumerate(value, 1)]
    else:
        raise InputError(f"{label} is not a string, but {type(value).__name__}")
    if not messages or not messages[-1].get("content", "").strip():
        raise InputError(f"{label.rpartition(': ')[0]}: the prompt is empty; "
                         "write one, or leave it out")
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{label} ends with a message of the assistant, and the policy is to "
                         "write the next one; leave that message out")
    return value if isinstance(value, str) else messages


def _message(said: Any, number: int, label: str) -> dict[str, Any]:
    message = ({key: value for key, value in said.items() if value is not None}
               if isinstance(said, Mapping) else {})
    # a call of a tool has no text
    texts = ("role",) if "tool_calls" in message else ("role", "content")
    if not all(isinstance(message.get(key), str) for key in texts) or not isinstance(
            message.get("content", ""), str):
        raise InputError(f"{label} is not a string, but list, and its number {number} is no "
                         "message, {role, content} of two texts: "
                         f"{shortened(repr(said), 60)}")
    return message
