"""What can be chosen by name, and bounds that more than one room asks about: each list stands here
and nowhere else. Free of JAX, for it is read before anything starts."""

import pkgutil
from pathlib import Path
from typing import Literal, get_args

# every other file in drafts/ is a drafter; listed without importing them, for they import JAX
_DRAFT_FILES = pkgutil.iter_modules([str(Path(__file__).parent / "drafts")])
DRAFTERS = tuple(sorted(file.name for file in _DRAFT_FILES
                        if file.name not in ("base", "types") and not file.ispkg))
"""The drafters that ship; `jspec.drafts` makes drafts with them."""
MIXED = "mixed"
"""The one that is made around a trained draft of another one."""

RULES = ("rejection", "block", "coupled")
"""How drafts are judged; `jspec.speculate.types.NOISE` has the noise of each."""

KERNELS = ("auto", "reference", "pallas")
"""Which kernels run: the chip's where it has one that takes the shapes, else the reference; the
reference everywhere; the kernel or an error (a CPU interprets the TPU's, slowly: for checks)."""

DTYPES = ("float32", "bfloat16")
"""What a policy may compute in."""

Remat = Literal["none", "full", "dots", "dots_no_batch"]
"""What the backward pass computes again; see `jspec.model.forward.rematerialised`."""

DRAFT_LOSSES = ("kl", "tv", "overlap", "ce", "ce_tv")
"""How far a draft's distribution is from the policy's; see `jspec.drafts.parts.losses`."""

OPTIMIZERS = {"adamw": ("b1", "b2", "eps"), "lion": ("b1", "b2"),
              "muon": ("b1", "b2", "eps", "momentum"), "sgd": ("momentum",)}
"""Update rules of optax, and what each is set by beside rate and weight decay."""
SCHEDULES = ("constant", "cosine", "linear")
"""What a learning rate does after its warm-up; see `jspec.rl.optimizers`."""

AdvantageForm = Literal["group", "dr_grpo", "leave_one_out", "whitened", "whitened_baseline"]
ADVANTAGES = get_args(AdvantageForm)
"""From rewards to advantages; see `jspec.rl.advantages`."""

Aggregation = Literal["token_mean", "sequence_mean", "prompt_mean", "constant_length"]
AGGREGATIONS = get_args(Aggregation)
"""From losses of tokens to the loss of a batch; see `jspec.rl.aggregation`."""

OBJECTIVES: dict[str, tuple[AdvantageForm, Aggregation]] = {
    "grpo": ("group", "token_mean"),
    "dr_grpo": ("dr_grpo", "constant_length"),
    "dapo": ("group", "token_mean"),
    "gspo": ("group", "sequence_mean"),
    "gspo_token": ("group", "sequence_mean"),
    "cispo": ("group", "token_mean"),
    "rloo": ("leave_one_out", "sequence_mean"),
    "reinforce_plus_plus": ("whitened", "token_mean"),
    "reinforce_plus_plus_baseline": ("whitened_baseline", "token_mean"),
    "sapo": ("group", "sequence_mean"),
}
"""What a policy minimises (`jspec.rl.objectives`), and the advantages and the aggregation that each
goes with; one of a user's own goes with GRPO's."""

UNCLIPPED = ("cispo", "sapo")
"""Those whose loss is not the smaller one of a token's and a clipped one."""

KL_ESTIMATES = ("k1", "k2", "k3")
"""Of the KL of one token; see `jspec.rl.losses.kl_estimate`."""

CORRECTIONS = {"none": (0.0, 0.0), "tis": (0.0, 2.0), "icepop": (0.5, 5.0),
               "sequence_mask": (0.999, 1.002)}
"""For the gap between the update's own log-probabilities and the verifier's, each with its bounds
where none are set; see `jspec.rl.corrections`."""

LORA_TARGETS = {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",), "o_proj": ("o",),
                "gate_proj": ("gate", "expert_gate_up"), "up_proj": ("up", "expert_gate_up"),
                "down_proj": ("down", "expert_down")}
"""What can have adapters, as PEFT names it, and whose parameters those are. Routers have none."""

BASE_DTYPES = ("bfloat16", "float32", "int8", "int4")
"""What a policy is kept in that is not trained itself, but its adapters."""

PRECISIONS = ("bfloat16", "int8", "fp8")
ENGINES = ("jspec", "server")
"""Of `jspec project`: what the rollout's weights are in; and what decodes. jspec: every token goes
to every shard of experts, and loops are compiled for a few numbers of rows. A server, as other
systems have one: a token goes to the shards of its own experts, and a cycle has live rows alone."""

LOGGERS = {"tensorboard": ("tensorboardX", ""), "wandb": ("wandb", "wandb"),
           "mlflow": ("mlflow", "mlflow"), "trackio": ("trackio", "trackio")}
"""Where a run can be looked at: the package that each needs, and the extra that installs it."""

LOG_LEVELS = ("debug", "info", "warning", "error")

MOST_SAMPLES = 2**20
"""Answers of one prompt at most."""
MAX_NEW_TOKENS = 128
"""Of an answer, where nothing is said; the one default of runs, commands and `jspec.Sampling`."""
SEED_HIGH = 2**64 - 1

OTHERS_NAMES = {
    "steps": ("max_steps", "total_training_steps", "max_num_steps"),
    "data.source": ("train_files", "data_files", "dataset_name", "datasets", "weights", "mixture",
                    "mixing_weights"),
    "data.max_prompt_tokens": ("max_prompt_length",),
    "data.too_long": ("filter_overlong_prompts", "truncation"),
    "data.prompt_column": ("prompt_key", "input_key"),
    "data.answer_column": ("output_key", "label_key"),
    "data.prompts_per_step": ("train_batch_size", "num_prompts_per_step"),
    "data.group_size": ("num_generations", "num_generations_per_prompt", "n"),
    "data.dynamic_sampling": ("use_dynamic_sampling", "filter_groups", "max_num_gen_batches"),
    "data.over_sampling": ("over_sampling_batch_size", "over_sample_rate"),
    "sampling.max_new_tokens": ("max_completion_length", "max_response_length", "max_tokens"),
    "grpo.objective": ("loss_type", "loss_mode", "adv_estimator", "use_dapo"),
    "grpo.aggregation": ("loss_agg_mode", "token_level_loss"),
    "grpo.advantage": ("scale_rewards", "norm_adv_by_std_in_grpo", "normalize_rewards"),
    "grpo.clip_low": ("epsilon", "clip_ratio", "ratio_clip_min"),
    "grpo.clip_high": ("epsilon_high", "ratio_clip_max"),
    "grpo.dual_clip": ("clip_ratio_c", "ratio_clip_c"),
    "grpo.kl_weight": ("beta", "kl_coef", "kl_loss_coef", "reference_policy_kl_penalty"),
    "grpo.kl_estimate": ("kl_loss_type", "reference_policy_kl_type"),
    "grpo.kl_in_reward": ("use_kl_in_reward",),
    "grpo.kl_reference_every": ("sync_ref_model", "ref_model_sync_steps"),
    "grpo.kl_reference_mix": ("ref_model_mixup_alpha",),
    "grpo.correction": ("rollout_is", "use_importance_sampling_correction",
                        "vllm_importance_sampling_correction", "tis_imp_ratio_cap"),
    "grpo.mask_truncated": ("mask_truncated_completions", "overlong_filtering"),
    "grpo.updates_per_rollout": ("num_iterations", "ppo_epochs"),
    "grpo.mini_batches": ("ppo_mini_batch_size", "steps_per_generation"),
    "grpo.micro_batch": ("gradient_accumulation_steps", "per_device_train_batch_size"),
    "grpo.clip": ("max_grad_norm", "grad_clip"),
    "grpo.state_memory": ("optimizer_offload", "offload_optimizer", "optimizer_cpu_offload",
                          "optimizer_memory"),
    "grpo.schedule": ("lr_scheduler", "lr_scheduler_type"),
    "lora.rank": ("r", "lora_rank"),
    "lora.targets": ("target_modules",),
    "model.remat": ("gradient_checkpointing", "activation_checkpointing"),
    "checkpoint.every": ("save_steps", "save_freq", "save_period"),
    "evaluation.every": ("eval_steps", "test_freq", "val_period"),
    "logging.loggers": ("report_to", "logger"),
}
"""What TRL, verl, NeMo RL and PEFT call some of our keys, for those who come from there."""
