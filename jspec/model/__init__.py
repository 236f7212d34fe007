"""One decoder-only transformer for Llama, Qwen2, Qwen3 and Qwen3-MoE."""

from jspec.model.config import Experts, Lora, ModelConfig, RopeConfig
from jspec.model.forward import (
    Trunk,
    embed,
    logits,
    prefill,
    prompt_forward,
    response_forward,
    train_forward,
    verify,
)
from jspec.model.params import (
    ParamSpec,
    Policy,
    abstract_policy,
    check_policy,
    check_weights,
    init_policy,
    init_weights,
    layer_specs,
    param_specs,
    place_on_mesh,
    policy_sharding,
    reshard,
    to_rollout,
)
from jspec.model.pool import Cache, KeyValues

__all__ = ["Cache", "Experts", "KeyValues", "Lora", "ModelConfig", "ParamSpec", "Policy",
           "RopeConfig", "Trunk", "abstract_policy", "check_policy", "check_weights", "embed",
           "init_policy", "init_weights", "layer_specs", "logits", "param_specs", "place_on_mesh",
           "policy_sharding", "prefill", "prompt_forward", "reshard", "response_forward",
           "to_rollout", "train_forward", "verify"]
