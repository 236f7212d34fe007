"""A draft that learns from the rollouts that it makes fast, while the policy stands still.

    python examples/online_draft.py

The rollout keeps the states that the verifier computed, and the draft learns from those, without a
further forward of the policy. In `jspec train` this is draft.features=rollout; there the policy
moves too, and the draft follows it.
"""

import jax

import jspec
from jspec.rl.batch import make_batch
from jspec.rl.state import init_state
from jspec.rl.update import update_draft
from jspec.rl.update_settings import OptimizerSettings, UpdateSettings, learned_from

CONFIG = jspec.ModelConfig(vocab_size=12, hidden_size=32, intermediate_size=64, num_layers=1,
                           num_heads=4, num_kv_heads=2, head_dim=8, initializer_range=0.3,
                           max_position_embeddings=64)


def main(steps: int = 40, rows: int = 32) -> list[float]:
    """Tokens a cycle, step by step."""
    policy = jspec.init_policy(CONFIG, 0)
    settings = UpdateSettings(draft_features="rollout",
                              draft_optimizer=OptimizerSettings(learning_rate=1e-2))
    state = init_state(policy, jspec.drafts.mtp(policy, 1), settings, seed=0)
    speculation = jspec.Speculation(k=2, depths=learned_from(state.draft, settings))
    weights = jspec.reshard(policy)

    @jax.jit
    def learn(state, batch, out):
        return update_draft(state, make_batch(batch, out, None), settings)

    lengths = []
    for step in range(steps):
        key = jax.random.fold_in(state.key, step)  # fresh noise at every step
        batch = jspec.PromptBatch.from_tokens([[2, 3, 4], [5, 6]], group_size=rows // 2, seed=key)
        out = jspec.rollout(weights, state.draft, batch, speculation=speculation,
                            sampling=jspec.Sampling(max_new_tokens=16))
        state, metrics = learn(state, batch, out)
        lengths.append(float(out.acceptance_length))
        if step % 10 in (0, 9):
            loss = float(metrics["draft/loss"])
            print(f"step {step:3}  {lengths[-1]:.2f} tokens a cycle  draft loss {loss:.3f}")
    return lengths


if __name__ == "__main__":
    main()
