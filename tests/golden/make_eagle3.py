"""Make the golden EAGLE-3 drafts of this directory: tiny random checkpoints in the three published
layouts, with the logits that the speculators library gives for them.

    pip install torch transformers safetensors numpy speculators
    python tests/golden/make_eagle3.py [CASE ...]

eagle3_target is their policy, as `save_pretrained` writes it. Each case becomes a directory with
config.json and model.safetensors in its layout, plus reference.npz: tokens int32 [1, S] and logits
float32 [3, S, Vd] of three unrolled steps over the policy's float32 hidden states. Row s of step d
predicts the token at s + 1, and d of the tokens before it are drafts; the rows before d + 1 are not
there and hold nan.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from make_golden import randomize
from safetensors.torch import load_file, save_file
from speculators import SpeculatorsConfig
from speculators.config import VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

HERE = Path(__file__).parent
TARGET = HERE / "eagle3_target"
LAYERS, HIDDEN, VOCAB, LENGTH, STEPS = 7, 16, 32, 24, 3
AUX = "eagle_aux_hidden_state_layer_ids"
BLOCK = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=20, num_hidden_layers=1,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
             rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)

# name: what differs from BLOCK, the library's flags, the depths that are fused (None: the default
# ones)
CASES = {
    "eagle3_specforge": (LlamaConfig,
                         dict(rope_parameters=dict(rope_type="default", rope_theta=300.0)),
                         dict(draft_vocab_size=20), (1, 4, 6)),
    "eagle3_vllm": (LlamaConfig, dict(num_key_value_heads=4, rope_parameters=dict(
        rope_type="linear", factor=2.0, rope_theta=1000.0)),
                    dict(draft_vocab_size=VOCAB, fc_norm=True, norm_output=True), (0, 3, 5)),
    "eagle3_speculators": (LlamaConfig, dict(attention_bias=True, num_attention_heads=2,
                                             num_key_value_heads=1, rope_parameters=LLAMA3),
                           dict(draft_vocab_size=12, norm_before_residual=True,
                                norm_before_fc=True), (2, 3, 6)),
    "eagle3_speculators_qwen3": (Qwen3Config, dict(rope_parameters=dict(rope_type="default",
                                                                        rope_theta=10000.0)),
                                 dict(draft_vocab_size=25, norm_output=True), None),
    # as the library's trainer makes them by default, but for the window's length
    "eagle3_speculators_window": (Qwen3Config, dict(
        rope_parameters=dict(rope_type="default", rope_theta=10000.0), sliding_window=5,
        use_sliding_window=True, layer_types=["sliding_attention"]),
                                  dict(draft_vocab_size=VOCAB, norm_before_residual=True), None),
    "eagle3_speculators_layers": (Qwen3Config, dict(
        num_hidden_layers=3, sliding_window=4, use_sliding_window=True, layer_types=[
            "full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters=dict(rope_type="default", rope_theta=1000.0)),
                                  dict(draft_vocab_size=20, norm_before_residual=True,
                                       fc_norm=True, norm_output=True), (0, 2, 5, 6)),
    "eagle3_vllm_layers": (LlamaConfig, dict(num_hidden_layers=2, rope_parameters=dict(
        rope_type="default", rope_theta=300.0)),
                           dict(draft_vocab_size=VOCAB, norm_before_fc=True), (3, 6)),
}


def make_target():
    shutil.rmtree(TARGET, ignore_errors=True)
    config = LlamaConfig(**{**BLOCK, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
                            "num_key_value_heads": 1,
                            "intermediate_size": 16, "tie_word_embeddings": True})
    model = LlamaForCausalLM(config)
    randomize(model, 100)
    model.to(torch.bfloat16).save_pretrained(TARGET)


def draft_of(case, seed):
    """The library's model with random weights, and the depths that it fuses."""
    block_class, changes, flags, depths = CASES[case]
    aux = list(depths or (2, LAYERS // 2, LAYERS - 3))
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=block_class(**{**BLOCK, **changes}),
        eagle_aux_hidden_state_layer_ids=aux, **flags, speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
            default_proposal_method="greedy", verifier=VerifierConfig(
                name_or_path="eagle3_target", architectures=["LlamaForCausalLM"])))
    model = Eagle3DraftModel(config).eval()
    randomize(model, seed)
    size = flags["draft_vocab_size"]
    if size != VOCAB:
        ids = np.sort(np.random.default_rng(seed).permutation(VOCAB)[:size])
        marks = np.isin(np.arange(VOCAB), ids)
        model.load_vocab_mappings(torch.from_numpy(marks), torch.from_numpy(ids - np.arange(size)))
    return model, aux


def logits_of(model, aux, tokens):
    """[STEPS, S, Vd] of every unrolled step, each at the position of the token that it has read
    last."""
    target = LlamaForCausalLM.from_pretrained(TARGET, dtype=torch.float32,
                                              attn_implementation="eager").eval()
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out[0].numpy()))
    with torch.no_grad():
        hidden = target(tokens, output_hidden_states=True).hidden_states
        hidden = torch.cat([hidden[depth] for depth in aux], dim=-1)
        ids, n = tokens[:, 1:], tokens.shape[1] - 1
        model(hidden[:, :-1], ids, torch.zeros(1, n, dtype=torch.long), ttt_steps=STEPS)
    logits = np.full((STEPS, LENGTH, seen[0].shape[-1]), np.nan, np.float32)
    for step, rows in enumerate(seen):
        logits[step, 1 + step:] = rows[:n - step]
    return logits


def flat(model, **changes):
    """The config.json of SpecForge and vLLM."""
    config = model.config
    layer = config.transformer_layer_config.to_dict()
    rope = layer.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    out = {key: value
           for key, value in layer.items() if key in BLOCK or key in ("attention_bias", "mlp_bias")}
    flags = {flag: True for flag in ("norm_before_residual", "norm_before_fc", "fc_norm",
                                     "norm_output") if getattr(config, flag)}
    return {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama",
            "hidden_act": "silu", **out, **flags,
            "rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "tie_word_embeddings": False, "draft_vocab_size": config.draft_vocab_size, **changes}


def save(case, model, aux):
    directory = HERE / case
    if case.startswith("eagle3_speculators"):
        model.save_pretrained(directory)
        (directory / "config.py").unlink()  # the library's own code, which nothing here runs
        config = json.loads((directory / "config.json").read_text())
        del config["auto_map"]
        tensors = load_file(directory / "model.safetensors")
        if CASES[case][3] is None:
            del config[AUX]
    else:
        directory.mkdir()
        tensors = {name: x.detach()
                   for name, x in model.state_dict().items() if not name.startswith("verifier_")}
        config = flat(model, **{AUX: aux})
    if case == "eagle3_specforge":
        tensors = {name.replace("layers.0.", "midlayer."): x for name, x in tensors.items()}
        config = flat(model, torch_dtype="bfloat16", eagle_config={
            "use_aux_hidden_state": True, AUX: [depth - 1 for depth in aux]})
    else:
        del tensors["embed_tokens.weight"]  # the target's
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)


def cast(model, dtype):
    """The parameters alone: a model's own cast rounds the rotary frequencies too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def make(case, seed):
    model, aux = draft_of(case, seed)
    dtype = torch.float16 if case == "eagle3_vllm" else torch.bfloat16
    cast(model, dtype)
    if case != "eagle3_specforge":
        target = LlamaForCausalLM.from_pretrained(TARGET, dtype=dtype)
        model.embed_tokens.weight.data = target.model.embed_tokens.weight.data.clone()
    shutil.rmtree(HERE / case, ignore_errors=True)
    save(case, model, aux)
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (1, LENGTH), dtype=np.int32)
    logits = logits_of(cast(model, torch.float32), aux, torch.from_numpy(tokens).long())
    np.savez(HERE / case / "reference.npz", tokens=tokens, logits=logits)
    print(f"{case}: logits in [{np.nanmin(logits):.2f}, {np.nanmax(logits):.2f}]")


if __name__ == "__main__":
    if not sys.argv[1:] or not TARGET.exists():
        make_target()
    for number, case in enumerate(CASES):
        if case in (sys.argv[1:] or CASES):
            make(case, number)
