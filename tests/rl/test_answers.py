from types import SimpleNamespace

import numpy as np
import pytest

from jspec.hub.tokenizer import character_tokenizer
from jspec.rl.answers import answer_text, reward_inputs
from jspec.rl.prompts import Prompt
from jspec.rl.rewards import RewardInput

TOKENIZER = character_tokenizer("0123456789+=")


def rollout(*texts, ended=True):
    """A finished rollout on the host: the answers' token ids, ended with the end token or cut
    off."""
    ids = [TOKENIZER.encode(text) + [TOKENIZER.eos_token_id] * ended for text in texts]
    lengths = np.array([len(row) for row in ids])
    tokens = np.zeros((len(ids), lengths.max()), np.int32)
    for row, values in zip(tokens, ids, strict=True):
        row[: len(values)] = values
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    return SimpleNamespace(tokens=tokens, mask=mask, lengths=lengths,
                           finished=np.full(len(ids), ended))


def test_rewards_are_told_prompt_response_and_how_it_ended():
    prompts = [Prompt("a", (5,), "1", {"x": 1}), Prompt("b", (6,), "2", {})]
    assert (reward_inputs(TOKENIZER, prompts, rollout("1", "12", "", "3=")) == [
        RewardInput("a", "1", "1", {"x": 1}, True, 2),
        RewardInput("a", "12", "1", {"x": 1}, True, 3),
        RewardInput("b", "", "2", {}, True, 1), RewardInput("b", "3=", "2", {}, True, 3)])
    cut = reward_inputs(TOKENIZER, prompts, rollout("17+25=4", "1", "2", "3", ended=False),
                        rows=[0, 3])
    assert (cut == [RewardInput("a", "17+25=4", "1", {"x": 1}, False, 7),
                    RewardInput("b", "3", "2", {}, False, 1)])


def test_messages_go_along_where_they_are_asked_for():
    user = {"role": "user", "content": "a"}
    prompts = [Prompt("a", (5,), "", {}, messages=[user], is_chat=chat) for chat in (True, False)]

    def given(*wants):
        return [(item.messages, item.chat)
                for item in reward_inputs(TOKENIZER, prompts, rollout("1", "1"), None, wants)]

    whole = [user, {"role": "assistant", "content": "1"}]
    assert given() == [(None, None)] * 2
    assert given("messages") == [(whole, None)] * 2
    assert given("chat") == [(None, whole), (None, None)]  # the second came as a text


@pytest.mark.parametrize("middle, text",
                         [([0], "4<pad>2"), ([14], "4\ufffd2"), ([14, 99], "4\ufffd2"),
                          ([14, 0], "4\ufffd<pad>2"), ([1], "4<end>2"), ([], "42")])
def test_what_has_no_text_does_not_join_its_neighbours(middle, text):
    four, two = TOKENIZER.convert_tokens_to_ids(["4", "2"])
    out = rollout("00" + "0" * len(middle))
    out.tokens[0, :-1] = [four, *middle, two]
    assert answer_text(TOKENIZER, out, 0) == text
