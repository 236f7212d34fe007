"""What MTP heads are stored as, and which conventions they were trained with: a row for each
published layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from jspec.errors import InputError
from jspec.hub.fields import agreed, texts, whole
from jspec.hub.tensors import StoredTensor, layer_tensor
from jspec.model.config import ModelConfig
from jspec.model.params import layer_specs


@dataclasses.dataclass(frozen=True)
class MtpLayout:
    """A native multi-token-prediction head: what its tensors are called, and which conventions it
    was trained with. Embedding and output head are the trunk's in all of them.

    Attributes:
      architecture, model_type: of its config.json.
      prefix: of the head's tensors; {index} is the head's number from 0, {layer} that number after
        the trunk's layers.
      embed_norm, hidden_norm: the norms of the two inputs. proj: from both, concatenated, to one.
      block: what goes before the names that a decoder layer's tensors have in the trunk.
      final_norm: before the output head, and before the next depth.
      hidden_first, normed_trunk, first, shared: see `jspec.drafts.mtp.MtpConfig`.
      copies: of the trunk's tensors, which some publishers store with the head once more.
      anywhere: whether trunks of other architectures may have such a head.
      apart: its config.json is the head's own, as the speculators library writes one.
    """

    architecture: str
    model_type: str
    prefix: str
    embed_norm: str
    hidden_norm: str
    proj: str
    block: str
    final_norm: str
    hidden_first: bool = False
    normed_trunk: bool = True
    first: int = 1
    shared: bool = False
    copies: tuple[str, ...] = ()
    anywhere: bool = False
    apart: bool = False


# MiMo (https://arxiv.org/abs/2505.07608): its modelling code has the block, its authors' serving
# code (in vLLM, mimo.py and mimo_mtp.py) what the block is given: the trunk's state before the
# final norm, and pairs of a state with the token after it, so that position 0 has none ("not needed
# by MTP" is said where its embedding is masked).
# DeepSeek-V3 (https://arxiv.org/abs/2412.19437), whose layout GLM-4.5 has too, and Qwen3-Next: vLLM
# and SGLang give the head the trunk's state after the final norm.
# The speculators library trains one head on several steps (https://arxiv.org/abs/2509.18362), each
# of which sees itself alone, on the trunk's state before the final norm.
_MTP = (
    MtpLayout("MiMoForCausalLM", "mimo", prefix="model.mtp_layers.{index}.",
              embed_norm="token_layernorm.weight",
              hidden_norm="hidden_layernorm.weight", proj="input_proj.weight", block="",
              final_norm="final_layernorm.weight", hidden_first=True, normed_trunk=False),
    MtpLayout("DeepseekV3ForCausalLM", "deepseek_v3", prefix="model.layers.{layer}.",
              embed_norm="enorm.weight", hidden_norm="hnorm.weight", proj="eh_proj.weight",
              block="", final_norm="shared_head.norm.weight", anywhere=True,
              copies=("embed_tokens.weight", "shared_head.head.weight")),
    MtpLayout("Qwen3NextForCausalLM", "qwen3_next", prefix="mtp.",
              embed_norm="pre_fc_norm_embedding.weight", hidden_norm="pre_fc_norm_hidden.weight",
              proj="fc.weight", block="layers.{index}.", final_norm="norm.weight", anywhere=True),
    MtpLayout("MTPDraftModel", "mtp", prefix="mtp_layers.{index}.",
              embed_norm="token_layernorm.weight", hidden_norm="hidden_layernorm.weight",
              proj="input_proj.weight", block="", final_norm="final_layernorm.weight",
              normed_trunk=False, shared=True, apart=True),
)
MTP_LAYOUTS = {layout.architecture: layout for layout in _MTP}
MOST_MTP_HEADS = 64  # published models have one or a few
_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def mtp_prefix(layout: MtpLayout, config: ModelConfig, index: int = 0) -> str:
    """How the names of a head's tensors begin."""
    return layout.prefix.format(index=index, layer=config.num_layers + index)


def candidates(architecture: str) -> list[MtpLayout]:
    """The layouts that a head of this architecture may have."""
    own = MTP_LAYOUTS.get(architecture)
    return [row for row in MTP_LAYOUTS.values() if row.anywhere] if own is None else [own]


def mtp_prefixes(hf: dict, config: ModelConfig) -> tuple[str, ...]:
    """How the tensors of the MTP heads begin that a config.json speaks of; they are no part of the
    policy."""
    return tuple(mtp_prefix(layout, config, i) for layout in candidates(*texts(hf, "architectures"))
                 for i in range(mtp_count(hf)))


def mtp_key(hf: dict) -> str:
    """What the number of MTP heads is called in a config.json. Raises InputError where it has two
    that differ."""
    return agreed(hf, *_COUNTS)


def mtp_count(hf: dict) -> int:
    """How many MTP heads a config.json speaks of. Raises InputError if that is no number, beyond
    reason, or said twice and differently."""
    key = mtp_key(hf)
    count = whole(hf, key, 0, least=0)
    if count > MOST_MTP_HEADS:
        raise InputError(f"config.json has {count} as {key}; expected at most {MOST_MTP_HEADS}")
    return count


def mtp_tensors(layout: MtpLayout, config: ModelConfig) -> list[StoredTensor]:
    """Every tensor of a layout's one head; `key` is the path in an mtp draft's weights."""
    d, prefix = config.hidden_size, mtp_prefix(layout, config)
    block = prefix + layout.block.format(index=0)
    own = {"embed_norm": (layout.embed_norm, (d,)), "hidden_norm": (layout.hidden_norm, (d,)),
           "proj": (layout.proj, (d, 2 * d)), "final_norm": (layout.final_norm, (d,))}
    out = [StoredTensor(prefix + name, "", ("blocks", 0, key), (), shape)
           for key, (name, shape) in own.items()]
    return out + [StoredTensor(block + layer_tensor(key), "", ("blocks", 0, "layer", key), (),
                               spec.shape)
                  for key, spec in layer_specs(config).items()]


def found(architecture: str, config: ModelConfig, names: Collection[str]) -> MtpLayout:
    """The layout that the tensors of these names have. Raises InputError if there is no head among
    them."""
    rows = candidates(architecture)
    wanted = [mtp_prefix(row, config) + row.proj for row in rows]
    for row, name in zip(rows, wanted, strict=True):
        if name in names or len(rows) == 1:
            return row
    raise InputError(f"no MTP head of a known layout is there: of {architecture}, tensor "
                     f"{' or '.join(wanted)} is looked for")
