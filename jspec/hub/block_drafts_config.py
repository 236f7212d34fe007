"""The config.json of published DFlash and DSpark drafts, in the layouts that
`jspec.hub.block_drafts` reads and writes, and what vLLM makes of it.

The speculators library has the layers' config inside `transformer_layer_config`, and counts the
auxiliary layers by their input: id i is depth i. SpecForge and DeepSpec have the layers' config at
the top, what is the draft's own there or in `dflash_config`, and count by the layer's output: id i
is depth i + 1.

A window is counted from the anchor here and in the speculators library, and from each slot in
SpecForge and vLLM: of its oldest positions a slot sees fewer there, by its place in the draft.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jspec.drafts.dflash import DFlashConfig
from jspec.drafts.dspark import DSparkConfig
from jspec.drafts.parts.one_pass import OnePassConfig
from jspec.errors import InputError
from jspec.hub.architectures import config_to_hf
from jspec.hub.draft_configs import (
    BLOCKS,
    FULL,
    LAYER,
    SLIDING,
    block_family,
    check_kind,
    completed,
    layers_of,
    speculators_config,
    windows_of,
)
from jspec.hub.fields import agreed, flag, merged, section, short, texts, told_of, whole
from jspec.model import ModelConfig

# what is the draft's own and no layer's
_OWN = ("block_size", "mask_token_id", "target_layer_ids", "aux_hidden_state_layer_ids",
        "num_target_layers", "sample_from_anchor", "shift_label", "is_causal", "causal", "use_swa",
        "sliding_window_non_causal", "projector_type", "markov_rank", "markov_head_type",
        "enable_confidence_head", "confidence_head_with_markov")
_KINDS = {"dflash": DFlashConfig, "dspark": DSparkConfig}
# what an architecture is called in lower case, by its draft
_NAMES = {"dflashdraftmodel": "dflash", "dflashspeculator": "dflash", "dsparkdraftmodel": "dspark",
          "dsparkspeculator": "dspark", "qwen3dsparkmodel": "dspark"}


def is_block_draft(hf: dict[str, Any]) -> bool:
    """Whether a config.json speaks of a draft of one pass, a supported one or not."""
    named = [*texts(hf, "architectures"), str(hf.get("speculators_model_type", ""))]
    return "dflash_config" in hf or any("dflash" in x.lower() or "dspark" in x.lower()
                                        for x in named)


def read_config(path: Path, hf: dict[str, Any], policy: ModelConfig) -> OnePassConfig:
    """What config.json says of a draft in the directory `path`; of the tensors' dtype, vocabulary
    and output head it says nothing. Raises InputError for a draft of another policy, and for what
    is not supported."""
    with told_of(path):
        own = section(hf, LAYER)
        check_kind(hf)
        said = merged(hf, "dflash_config", _OWN)
        kind = _kind(hf, said)
        block, windows = _block(kind, {**hf, **said}, own, policy)
        if flag(said, "use_swa"):
            raise InputError("dflash_config.use_swa is not supported; supported: layer_types with "
                             "sliding_window")
        causal = _causal(said, bool(own), windows)
        agreed(said, "sample_from_anchor", "shift_label")
        options: dict[str, Any] = {}
        if kind == "dspark":
            options = {"markov_rank": whole(said, "markov_rank", 256, least=0),
                       "markov_head": said.get("markov_head_type", "vanilla"),
                       "confidence": flag(said, "enable_confidence_head", True),
                       "confidence_with_markov": flag(said, "confidence_head_with_markov", True)}
        return _KINDS[kind](
            policy, block, _depths(said, bool(own)), whole(said, "mask_token_id", least=0),
            block_size=whole(said, "block_size"), windows=windows, windows_causal=causal,
            sample_from_anchor=flag(said, "sample_from_anchor",
                                    kind == "dspark" or flag(said, "shift_label")), **options)


def _kind(hf: dict[str, Any], said: dict[str, Any]) -> str:
    """Which drafter's it is."""
    names = texts(hf, "architectures")
    found = {_NAMES.get(name.lower()) for name in names}
    made = hf.get("speculators_model_type")
    if made is not None:
        found = {made if isinstance(made, str) and made in _KINDS else None}
    projector = said.get("projector_type")
    known = f"of drafts of one pass these are: {', '.join(_KINDS)}"
    if projector not in (None, *_KINDS):
        raise InputError(f"projector_type {short(projector)} is not supported; {known}")
    if made is None and not names:
        raise InputError(f"config.json has no architectures, which name the kind of draft; {known}")
    if len(found) != 1 or None in found:
        raise InputError(f"{short(made or ', '.join(names))} is not supported; {known}")
    # some call every draft of this family DFlash's
    return "dspark" if projector == "dspark" or said.get("markov_rank") else found.pop()


def _block(kind: str, hf: dict[str, Any], own: dict[str, Any],
           policy: ModelConfig) -> tuple[ModelConfig, tuple[int, ...]]:
    """The layers as a model of their own: Qwen3's, whatever family the config is called by; and the
    window of each one's attention, () where none has one."""
    family = block_family(own or hf, "qwen3")
    layer = completed(own, family) if own else hf
    block = layers_of({"dflash": "DFlash", "dspark": "DSpark"}[kind], layer, BLOCKS["qwen3"], hf,
                      policy)
    windows = windows_of(layer, block.num_layers)
    return block, windows if any(windows) else ()


def _causal(said: dict[str, Any], speculators: bool, windows: tuple[int, ...]) -> bool:
    """Whether a slot sees no later one in the layers with a window."""
    if speculators:
        return not windows or not flag(said, "sliding_window_non_causal")
    name = agreed(said, "is_causal", "causal")
    causal = flag(said, name, any(windows))
    if causal and not (windows and all(windows)) and name in said:
        raise InputError("causal layers without a window are not supported: in them all slots see "
                         "all")
    return not windows or causal


def _depths(said: dict[str, Any], speculators: bool) -> tuple[int, ...]:
    key = "aux_hidden_state_layer_ids" if speculators else "target_layer_ids"
    ids = said.get(key)
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise InputError(f"{key} in config.json must be a list of integers, not {short(ids)}")
    return tuple(i if speculators else i + 1 for i in ids)


def config_json(config: OnePassConfig, dtype: str, layout: str,
                verifier: str | None = None) -> dict[str, Any]:
    """The config.json of a layout; see `jspec.hub.block_drafts.write`. Raises InputError for layers
    that have no name there."""
    policy, windows = config.policy, set(config.windows) - {0}
    if len(windows) > 1:
        raise InputError(f"windows of {sorted(windows)} positions in one draft have no name in "
                         "published drafts; they have one length")
    if config.block.family != "qwen3":
        raise InputError(f"layers of the kind {config.block.family} have no name in published "
                         "drafts of one pass; known: qwen3")
    layer, _ = config_to_hf(dataclasses.replace(config.block, stop_tokens=policy.stop_tokens,
                                                pad_token=policy.pad_token))
    del layer["architectures"], layer["torch_dtype"]
    layer["layer_types"] = [SLIDING if w else FULL for w in config.windows
                            or (0,) * config.block.num_layers]
    if windows:
        layer |= {"sliding_window": min(windows), "use_sliding_window": True,
                  "max_window_layers": 0}
    own = {"mask_token_id": config.mask_token, "block_size": config.block_size,
           "sample_from_anchor": config.sample_from_anchor, **_heads(config)}
    vocab = config.vocab_size or policy.vocab_size
    name = {"dflash": "DFlashDraftModel", "dspark": "DSparkDraftModel"}[config.kind]
    if layout == "speculators":
        return {**own, "draft_vocab_size": vocab, "target_hidden_size": policy.hidden_size,
                "aux_hidden_state_layer_ids": list(config.aux_depths), "dtype": dtype,
                # of layers without a window it changes nothing but what vLLM runs
                "sliding_window_non_causal": not windows or not config.windows_causal,
                "tie_word_embeddings": False, LAYER: layer,
                **speculators_config(config.kind, name, config.predicted, policy, verifier)}
    own["target_layer_ids"] = [depth - 1 for depth in config.aux_depths]
    if windows and not config.windows_causal:
        own |= {"is_causal": False, "causal": False}
    if config.kind == "dspark":
        # DeepSpec's name for the same, which servers know
        name, own = "Qwen3DSparkModel", {**own, "projector_type": "dspark"}
    return {**layer, **own, "architectures": [name], "dtype": dtype,
            "draft_vocab_size": vocab, "target_hidden_size": policy.hidden_size,
            "num_target_layers": policy.num_layers, "dflash_config": own}


def _heads(config: OnePassConfig) -> dict[str, Any]:
    if not isinstance(config, DSparkConfig):
        return {}
    return {"markov_rank": config.markov_rank, "markov_head_type": config.markov_head,
            "enable_confidence_head": config.confidence,
            "confidence_head_with_markov": config.confidence_with_markov
            and bool(config.markov_rank)}


def not_served(config: OnePassConfig, layout: str) -> list[str]:
    """What vLLM would not run, or not as the draft was trained, of one that is exported in this
    layout. (Checked with 0.32.)"""
    out, windows = [], config.windows
    if any(windows) and not all(windows):
        out.append("layers with and without a window in one draft")
    if isinstance(config, DSparkConfig):
        out.append("DSpark on a CPU")
        if not config.markov_rank:
            out.append("DSpark without a Markov head")
        elif config.markov_head != "vanilla":
            out.append(f"a Markov head that is {config.markov_head}")
        if windows and not config.windows_causal and layout == "speculators":
            out.append("a window that is not causal, of DSpark in this layout")
        return out
    if config.sample_from_anchor:
        out.append("sample_from_anchor of DFlash, which its CPU build ignores without a word")
    if config.block.num_layers > 1:
        out.append("the context's key norms of DFlash's layers behind the first, in whose place "
                   "its CPU build takes the first one's")
    return out
