"""Make objectives.npz of this directory: losses and gradients that TRL's own trainers give, in
float64, and the advantages of its RLOO.

    pip install trl==1.16.0 torch
    python tests/golden/make_objectives.py

A trainer's `_compute_loss` is called as it stands, on an object that has what it reads, with the
log-probabilities in the place of a model's. The micro-batch is the whole batch: 6 prompts of 2
answers, one of no tokens among them. The file has the inputs (old, logprobs, anchored, entropy
float64 [N, T]; mask; advantages [N]) and for each case NAME/loss and NAME/grad [N, T], by
log-probabilities.
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from trl import GRPOTrainer, RLOOTrainer

N, T, LOW, HIGH, BETA, LENGTH = 12, 6, 0.2, 0.3, 0.1, 7
# name: what of TRL's settings differs from those of `trainer`
CASES = {
    "grpo": dict(loss_type="grpo"),
    "dr_grpo": dict(loss_type="dr_grpo"),
    "dapo": dict(loss_type="dapo"),
    "bnpo": dict(loss_type="bnpo"),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence"),
    "gspo_token_mean": dict(loss_type="dapo", importance_sampling_level="sequence"),
    "cispo": dict(loss_type="cispo", epsilon_high=1 + HIGH),  # there it is the cap itself
    "sapo": dict(loss_type="sapo"),
    "dual_clip": dict(loss_type="dapo", delta=1.5),
    "entropy": dict(loss_type="dapo", entropy_coef=0.02),
    "kl": dict(loss_type="dapo", beta=BETA),
    "rloo": dict(),
}


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, N)
    lengths[5] = 0
    made = {"old": rng.normal(-2, 0.4, (N, T)), "advantages": rng.normal(0, 1, N),
            "mask": np.arange(T) < lengths[:, None]}
    made["logprobs"] = made["old"] + rng.normal(0, 0.6, (N, T))
    made["anchored"] = made["logprobs"] + rng.normal(0, 0.3, (N, T))
    made["entropy"] = rng.uniform(0, 3, (N, T))
    # what float32 holds, so that jspec is given the same numbers
    return {key: x if x.dtype == bool else x.astype(np.float32).astype(np.float64)
            for key, x in made.items()}


def trainer(kind: type, logprobs: torch.Tensor, entropy: torch.Tensor, *, loss_type: str = "",
            delta: float | None = None, beta: float = 0.0,
            importance_sampling_level: str = "token", epsilon_high: float = HIGH,
            entropy_coef: float = 0.0) -> object:
    """A trainer of which nothing was made but what its loss reads."""
    made = kind.__new__(kind)
    accelerator = SimpleNamespace(num_processes=1, sync_gradients=True, gather=lambda x: x,
                                  reduce=lambda x, reduction: x)
    args = SimpleNamespace(delta=delta, use_bias_correction_kl=False,
                           sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
                           steps_per_generation=1)
    vars(made).update(
        model=SimpleNamespace(training=True), args=args, accelerator=accelerator,
        _metrics={"train": defaultdict(list)}, loss_type=loss_type, beta=beta, epsilon_low=LOW,
        epsilon_high=epsilon_high, importance_sampling_level=importance_sampling_level,
        max_completion_length=LENGTH, current_gradient_accumulation_steps=1, use_vllm=False,
        off_policy_mask_threshold=None, top_entropy_quantile=1.0, aux_loss_enabled=False,
        _entropy_bonus_enabled=bool(entropy_coef), use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None))
    return made


def main() -> None:
    given = data()
    found = dict(given)
    tensors = {key: torch.tensor(x) for key, x in given.items()}
    mask = tensors["mask"].to(torch.float64)
    ids = torch.zeros(N, 1, dtype=torch.int64)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids.expand(N, T),
              "completion_mask": mask, "advantages": tensors["advantages"],
              "old_per_token_logps": tensors["old"], "num_items_in_batch": mask.sum(),
              "ref_per_token_logps": tensors["anchored"],
              "old_logps": (tensors["old"] * mask).sum(1)}
    for name, options in CASES.items():
        logprobs = tensors["logprobs"].clone().requires_grad_()
        kind = RLOOTrainer if name == "rloo" else GRPOTrainer
        made = trainer(kind, logprobs, tensors["entropy"], **options)
        loss = made._compute_loss(made.model, inputs)
        loss.backward()
        found[f"{name}/loss"], found[f"{name}/grad"] = loss.detach().numpy(), logprobs.grad.numpy()
        metrics = made._metrics["train"]
        for side in ("low", "high"):
            if f"clip_ratio/{side}_mean" in metrics:
                found[f"{name}/{side}"] = np.array(metrics[f"clip_ratio/{side}_mean"][0])
    np.savez(Path(__file__).parent / "objectives.npz", **found)
    print({key: float(x) for key, x in found.items() if key.endswith("loss")})


if __name__ == "__main__":
    main()
