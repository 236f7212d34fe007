"""Make the golden MTP head of this directory: a tiny random one of the speculators library, with
the logits that the library gives for it.

    pip install torch transformers safetensors numpy speculators
    python tests/golden/make_mtp.py

mtp_speculators is a directory as `save_pretrained` writes it, for the golden policy qwen3, plus
reference.npz: tokens int32 [1, S] and logits float32 [STEPS, S - STEPS - 1, V] of the library's
steps over the policy's float32 states before its final norm. Row t of step d predicts token
t + d + 2, having read the tokens up to t + d + 1.
"""

import json
import shutil

import numpy as np
import torch
from make_golden import HERE, QWEN3, SIZES, randomize
from speculators import SpeculatorsConfig
from speculators.config import VerifierConfig
from speculators.models.mtp import MTPDraftModel, MTPSpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig

POLICY, CASE = HERE / "qwen3", HERE / "mtp_speculators"
LENGTH, STEPS = 24, 3


def head():
    """The library's model with random weights, in float16's values, on the policy's embedding and
    output head."""
    layer = QWEN3[1].from_pretrained(POLICY)
    layer._attn_implementation = "eager"
    model = MTPDraftModel(MTPSpeculatorConfig(
        transformer_layer_config=layer, speculators_config=SpeculatorsConfig(
            algorithm="mtp", default_proposal_method="greedy",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
            verifier=VerifierConfig.from_pretrained(str(POLICY))))).eval()
    randomize(model, 0)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    model.load_verifier_weights()
    return model.float()


def save(model):
    shutil.rmtree(CASE, ignore_errors=True)
    model.half().save_pretrained(CASE)
    (CASE / "config.py").unlink(missing_ok=True)  # the library's own code, which nothing here runs
    config = json.loads((CASE / "config.json").read_text())
    for left_out in ("auto_map", "run_provenance"):
        config.pop(left_out, None)
    config["speculators_config"]["verifier"]["name_or_path"] = POLICY.name
    (CASE / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (CASE / "model.safetensors").chmod(0o644)


def main():
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (1, LENGTH), dtype=np.int32)
    policy = QWEN3[0].from_pretrained(POLICY, dtype=torch.float32, attn_implementation="eager")
    seen, model, ids = [], head(), torch.from_numpy(tokens).long()
    policy.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        policy(ids)
        logits, _, _ = model(ids, seen[0])
    logits = torch.cat(logits).numpy()
    save(model)
    np.savez(CASE / "reference.npz", tokens=tokens, logits=logits)
    print(f"{CASE.name}: logits in [{logits.min():.2f}, {logits.max():.2f}]")


if __name__ == "__main__":
    main()
