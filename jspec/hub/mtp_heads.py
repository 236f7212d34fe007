"""Native multi-token-prediction heads of published checkpoints, and those of the speculators
library, read as `mtp` drafts and written back.

What a head is called and which conventions it was trained with is a row of
`mtp_layouts.MTP_LAYOUTS`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jspec import arguments
from jspec.drafts.base import Draft, unlike
from jspec.drafts.mtp import MtpConfig, mtp, specs
from jspec.errors import InputError
from jspec.hub.architectures import config_from_hf, config_to_hf, family_of
from jspec.hub.assemble import assemble, check_none_left, check_shapes
from jspec.hub.draft_configs import (
    BLOCKS,
    LAYER,
    block_family,
    completed,
    speculators_config,
    steps,
)
from jspec.hub.exporter import host_value, whole_directory
from jspec.hub.fields import section, texts, told_of
from jspec.hub.json_io import read_json, write_json
from jspec.hub.mtp_layouts import (
    MTP_LAYOUTS,
    MtpLayout,
    candidates,
    found,
    mtp_count,
    mtp_key,
    mtp_prefix,
    mtp_tensors,
)
from jspec.hub.safetensors_io import (
    INDEX,
    SafetensorsSource,
    open_directory,
    read_header,
    write_file,
)
from jspec.hub.tensors import stored_tensors
from jspec.model import ModelConfig, Policy
from jspec.sharding import spec_sharding

HEAD_FILE = "mtp.safetensors"


def read(path: str | Path, policy: Policy, *, depths: int | None = None) -> Draft:
    """An MTP head as an `mtp` draft: float32 masters, on the mesh of `jax.set_mesh` if any.

    Args:
      path: a directory with config.json and safetensors: the whole model's, or the head's own (see
        `write`).
      policy: that it drafts for, in any layout; embedding and output head are read from it.
      depths: how many are unrolled in training; None: as many as it was trained on, where its
        config says so, else 2.

    Raises InputError if the architecture has no known layout, or layers that are not supported
    (before any tensor is looked at), the config speaks of no head or of several, the head was made
    for another policy (hidden size, vocabulary or anything else that it shares), a file is cut
    short, or a tensor is missing, left over or of the wrong shape.
    """
    path = arguments.path("draft", path)
    hf = read_json(path / "config.json")
    with told_of(path):
        architecture = _check_head(hf)
        difference = unlike(_made_for(hf, policy.config), policy.config)
        if difference:
            raise InputError(f"this MTP head was made for another policy: {difference}; take the "
                             "head and the policy of one checkpoint")
        depths = steps(hf, 2) if depths is None else depths
    source = open_directory(path)
    layout = found(architecture, policy.config, source.shapes)
    tensors, prefix = mtp_tensors(layout, policy.config), mtp_prefix(layout, policy.config)
    left = set(check_shapes(source, tensors)) - {t.name for t in stored_tensors(policy.config)}
    check_none_left(source, sorted(left - {prefix + name for name in layout.copies}),
                    f"the MTP head of {layout.architecture}")
    config = MtpConfig(policy.config, depths, blocks=depths if layout.shared else 1,
                       dtype=_dtype(source, [t.name for t in tensors]), **_conventions(layout))
    return Draft(weights=_weights(source, tensors, config), state={}, config=config, drafter=mtp)


def _check_head(hf: dict) -> str:
    """The architecture of a checkpoint with one MTP head whose layout may be known."""
    name = (texts(hf, "architectures") or ["an unnamed architecture"])[0]
    if not any(layout.apart for layout in candidates(name)):
        try:
            family_of(hf)
        except InputError as error:
            what = ("no MTP head of" if mtp_count(hf) else "config.json names no kind of draft, "
                    "such as eagle3 or dflash, and no MTP head of")
            raise InputError(f"{what} {name} can be read: {error}") from None
    count = mtp_count(hf)
    if count != 1:
        what = "has no MTP head" if count == 0 else "has several MTP heads, and one is supported"
        key = mtp_key(hf)
        raise InputError(f"the checkpoint {what} ({key} in config.json is {hf.get(key)}); "
                         "take one with one head, or make a head with jspec.drafts.mtp(policy, "
                         "...)")
    return name


def _made_for(hf: dict, policy: ModelConfig) -> ModelConfig:
    """The policy's config as a head's config.json has it; of what is not in it, that of `policy`,
    which the head is read for."""
    if LAYER not in hf:
        return config_from_hf(hf)
    layer = section(hf, LAYER)
    family = block_family(layer, "qwen3")
    made = config_from_hf({**completed(layer, family), "architectures": [BLOCKS[family]],
                           "eos_token_id": None, "pad_token_id": None})
    return dataclasses.replace(made, num_layers=policy.num_layers,
                               tie_embeddings=policy.tie_embeddings)


def _conventions(row: MtpLayout | MtpConfig) -> dict:
    """The fields that a layout and a draft's config share."""
    return {name: getattr(row, name) for name in ("hidden_first", "normed_trunk", "first",
                                                  "shared")}


def _dtype(source: SafetensorsSource, names: list[str]) -> str:
    """In which the head can be stored without loss of what float32 masters hold: its own, if it has
    only one."""
    found = {source.locations[name].dtype.name for name in names}
    return found.pop() if len(found) == 1 and found <= {"bfloat16", "float16"} else "float32"


def _weights(source: SafetensorsSource, tensors: list, config: MtpConfig) -> dict:
    tree = specs(config)
    shardings = spec_sharding(tree, config.policy)
    by_key = {tensor.key: tensor for tensor in tensors}

    def assembled(path: tuple, spec: Any) -> jax.Array:
        tensor, sharding = (by_key[tuple(getattr(p, "key", getattr(p, "idx", None)) for p in path)],
                            shardings)
        for part in tensor.key:
            sharding = sharding[part]
        return assemble(source, [tensor], spec.shape, sharding)

    return jax.tree_util.tree_map_with_path(assembled, tree)


def write(draft: Draft, directory: str | Path, verifier: str | None = None) -> Path:
    """Write an `mtp` draft in the published layout that has its conventions.

    Into a new or empty directory: the head alone, its tensors in model.safetensors with the
    config.json of the model that it belongs to (in the speculators library's layout: with its own);
    `read` takes it. Into a directory that `jspec.export` wrote of its policy: the head joins the
    trunk (mtp.safetensors, the index, config.json), and the whole is a checkpoint of that
    architecture, from which `jspec.load` takes the policy and `read` the head. (The modelling code
    that publishers put beside their weights is not written.) Tensors are stored in the dtype that
    the head was read in. With several processes all call this and the first writes.

    verifier: the policy's hub id or path, which speculators' config may name.

    Raises InputError if no published layout is of such a head, or the directory has other files in
    it, another policy or a head already.
    """
    config, target = draft.config, arguments.path("directory", directory).absolute()
    layout = _written_as(config)
    joins = (target / "config.json").exists() and not layout.apart
    if joins:
        _check_trunk(target, config.policy)
    elif target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists and is neither empty nor a model's directory; choose "
                         "a new one")
    tensors = mtp_tensors(layout, config.policy)
    values = {tensor.name: host_value(draft.weights, tensor) for tensor in tensors}
    if jax.process_index() == 0:
        if joins:
            _join(target, layout, values, config.dtype)
        else:
            with whole_directory(target) as work:
                _write_tensors(work / "model.safetensors", values, config.dtype)
                write_json(work / "config.json", _config_json(config, layout, verifier))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jspec.hub.mtp_heads.write")
    return target


def _config_json(config: MtpConfig, layout: MtpLayout, verifier: str | None) -> dict:
    hf = {**config_to_hf(config.policy)[0], "torch_dtype": config.dtype}
    if not layout.apart:
        return _with_head(hf, layout)
    del hf["architectures"], hf["torch_dtype"]
    return {"dtype": config.dtype, "tie_word_embeddings": False, "num_nextn_predict_layers": 1,
            LAYER: hf, **speculators_config(layout.model_type, layout.architecture, config.depths,
                                            config.policy, verifier)}


def _written_as(config: MtpConfig) -> MtpLayout:
    for layout in MTP_LAYOUTS.values():
        blocks = config.depths if layout.shared else 1
        if config == dataclasses.replace(config, blocks=blocks, vocab_size=0,
                                         **_conventions(layout)):
            return layout
    raise InputError(f"no published mtp head has blocks={config.blocks}, "
                     f"vocab_size={config.vocab_size}, hidden_first={config.hidden_first}, "
                     f"normed_trunk={config.normed_trunk}, first={config.first}, "
                     f"shared={config.shared}; such a head cannot be written as one of "
                     f"{', '.join(MTP_LAYOUTS)}; an eagle3 draft can, of whatever size")


def _check_trunk(target: Path, policy: ModelConfig) -> None:
    hf = read_json(target / "config.json")
    if mtp_count(hf):
        raise InputError(f"{target} has an MTP head already; export the policy into a new "
                         "directory first")
    difference = unlike(config_from_hf(hf), policy)
    if difference:
        raise InputError(f"{target} is not of the policy that the head drafts for: {difference}; "
                         "export that one, or write the head into a new directory")


def _with_head(hf: dict, layout: MtpLayout) -> dict:
    own = {} if layout.anywhere else {"architectures": [layout.architecture],
                                      "model_type": layout.model_type}
    return {**hf, **own, "num_nextn_predict_layers": 1}


def _write_tensors(path: Path, values: dict[str, np.ndarray], dtype: str) -> None:
    write_file(path, {name: (value.shape, dtype) for name, value in values.items()},
               values.__getitem__)


def _join(target: Path, layout: MtpLayout, values: dict[str, np.ndarray], dtype: str) -> None:
    """Config before index: cut short between them, the directory still loads as the policy
    alone."""
    trunk = open_directory(target).locations
    _write_tensors(target / HEAD_FILE, values, dtype)
    write_json(target / "config.json", _with_head(read_json(target / "config.json"), layout))
    whole = {**trunk, **read_header(target / HEAD_FILE)}
    size = sum(int(np.prod(place.shape, dtype=np.int64)) * place.dtype.itemsize
               for place in whole.values())
    write_json(target / INDEX,
               {"metadata": {"total_size": size},
                "weight_map": {name: place.path.name for name, place in whole.items()}})
