"""A policy's adapters as PEFT reads them: `adapter_config.json` and `adapter_model.safetensors`.

Every expert has a pair of its own under the name that its matrix has in a checkpoint; PEFT fuses
them where transformers keeps experts in one tensor (peft 0.21). PEFT drops what it does not know
without a word, so what counts is that logits are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jspec.errors import InputError
from jspec.hub.exporter import host_value, new_directory, whole_directory
from jspec.hub.json_io import write_json
from jspec.hub.safetensors_io import write_tensors
from jspec.hub.tensors import StoredTensor, stored_tensors
from jspec.model.params import Policy

PREFIX = "base_model.model."
HALVES = {"a": "lora_A.weight", "b": "lora_B.weight"}


def export_adapter(policy: Policy, directory: str | Path, base: str) -> Path:
    """Write the adapters of `policy` (training layout) as a directory that PEFT loads onto the
    model that `base` names. It appears whole or not at all. With several processes all call this
    and the first writes.

    Raises InputError if the policy has none, or the directory has files in it.
    """
    if policy.adapters is None:
        raise InputError("this policy has no adapters to export (lora.rank=0): export all of its "
                         "weights, without --adapter")
    target = new_directory(directory)
    tensors = dict(stored_adapters(policy))  # gathered by all processes
    if jax.process_index() == 0:
        with whole_directory(target) as work:
            write_json(work / "adapter_config.json", adapter_config(policy, base))
            write_tensors(work / "adapter_model.safetensors", tensors)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jspec.export_adapter")
    return target


def stored_adapters(policy: Policy) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32) of every matrix of every adapter, layer by layer and expert by expert."""
    for tensor in stored_tensors(policy.config):
        name = tensor.key[-1]
        if tensor.key[0] == "layers" and name in policy.adapters:
            for half, ending in HALVES.items():
                place = StoredTensor(tensor.name, "", (name, half), tensor.place, ())
                yield (PREFIX + tensor.name.removesuffix("weight") + ending,
                       host_value(policy.adapters, place))


def adapter_config(policy: Policy, base: str) -> dict[str, Any]:
    """What PEFT has to be told: what is left out it fills in with values of its own."""
    lora = policy.lora
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": lora.rank, "lora_alpha": lora.alpha, "target_modules": sorted(lora.targets),
            "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "use_rslora": False, "use_dora": False, "inference_mode": True}
