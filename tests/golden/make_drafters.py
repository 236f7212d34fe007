"""Make the golden drafts of one pass in `drafters/`: tiny random DFlash, DSpark and P-EAGLE
checkpoints with the logits that the speculators library gives for them, and some of the first two
as SpecForge writes them.

    pip install speculators==0.9.0 transformers==5.19.0 torch==2.13.0 numpy safetensors
    python tests/golden/make_drafters.py [CASE ...]

eagle3_target is their policy. Each case becomes a directory with config.json and model.safetensors,
plus reference.npz: tokens int32 [1, S]; anchors int32 [A], positions of them; base float32
[A, block, Vd], the logits of every slot behind each anchor (an anchor's own slot that predicts
nothing has some too); of DSpark also logits, the same with the Markov bias, where every
token before is that of `tokens`, and confidence [A, block], if there is such a head.

Of P-EAGLE there are no anchors but all positions, as of EAGLE-3: logits float32 [DEPTHS, S, Vd],
where row s of depth d predicts the token at s + 1 with d tokens before it masked, and the rows
before d + 1 are not there and hold nan.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch
from make_eagle3 import HIDDEN, TARGET, VOCAB, cast
from make_golden import randomize
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorsConfig
from speculators.config import VerifierConfig
from speculators.models.dflash import DFlashSpeculatorConfig
from speculators.models.dspark import DSparkSpeculatorConfig
from speculators.models.peagle import PEagleSpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

HERE = Path(__file__).parent / "drafters"
LENGTH, BLOCK, MASK, REDUCED, DEPTHS = 24, 4, 31, 12, 4
ANCHORS = [1, 6, 13, 20]
LAYER = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=20, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
             rms_norm_eps=1e-5, attn_implementation="eager",
             rope_parameters=dict(rope_type="default", rope_theta=300.0))
FULL, SLIDING = "full_attention", "sliding_attention"
DFLASH, DSPARK = DFlashSpeculatorConfig, DSparkSpeculatorConfig


def windows(*types):
    return dict(layer_types=list(types), sliding_window=4, use_sliding_window=True)


# name: class, its options, what differs from LAYER, which layers' inputs it reads
CASES = {
    "dflash": (DFLASH, {}, {}, [1, 3, 6]),
    "dflash_sliding": (DFLASH, {}, windows(SLIDING, FULL), [1, 3, 6]),
    "dflash_sliding_both_ways_reduced": (
        DFLASH, dict(sliding_window_non_causal=True, sample_from_anchor=True,
                     draft_vocab_size=REDUCED), windows(SLIDING, SLIDING), [2, 5]),
    "dspark": (DSPARK, {}, {}, [1, 3, 6]),
    "dspark_sliding": (DSPARK, dict(enable_confidence_head=False), windows(SLIDING, SLIDING), [4]),
    "dspark_bonus_anchor": (DSPARK, dict(sample_from_anchor=False), {}, [1, 3, 6]),
    "dspark_gated_reduced": (DSPARK, dict(markov_head_type="gated", draft_vocab_size=REDUCED),
                             dict(attention_bias=True), [1, 3, 6]),
    "dspark_rnn": (DSPARK, dict(markov_head_type="rnn", confidence_head_with_markov=False), {},
                   [0, 3]),
    "dspark_rnn_bonus_anchor": (DSPARK, dict(markov_head_type="rnn", sample_from_anchor=False), {},
                                [1, 3, 6]),
    "dspark_no_heads": (DSPARK, dict(markov_rank=0, enable_confidence_head=False,
                                     confidence_head_with_markov=False), {}, [1, 3, 6]),
}
PEAGLE = {
    "peagle": (LlamaConfig, {}, dict(num_hidden_layers=1), [1, 3, 6]),
    "peagle_qwen3_fc_norm_reduced": (
        Qwen3Config, dict(fc_norm=True, norm_output=True, norm_before_residual=True,
                          draft_vocab_size=REDUCED), dict(num_hidden_layers=1), [1, 3, 6]),
    "peagle_two_layers_sliding": (LlamaConfig, dict(norm_before_fc=True, norm_before_residual=True),
                                  dict(layer_types=[SLIDING, FULL], sliding_window=5),
                                  [1, 2, 4, 5]),
}
"""Name: class of the layers, options, what differs from LAYER, which layers' inputs it reads."""
SPECFORGE = {"specforge_dflash": "dflash", "specforge_dflash_sliding": "dflash_sliding",
             "specforge_dspark": "dspark", "specforge_dspark_reduced": "dspark_gated_reduced"}
"""Cases in SpecForge's layout, and which of the above they hold."""


def config_of(case):
    if case in PEAGLE:
        layers, options, changes, aux = PEAGLE[case]
        own = {"eagle_aux_hidden_state_layer_ids": aux}
    else:
        kind, options, changes, aux = CASES[case]
        layers, own = Qwen3Config, {"aux_hidden_state_layer_ids": aux, "block_size": BLOCK}
        if kind is DSPARK:
            own["markov_rank"] = 6
    return (PEagleSpeculatorConfig if case in PEAGLE else kind)(**{
        "transformer_layer_config": layers(**{**LAYER, **changes}), "draft_vocab_size": VOCAB,
        "mask_token_id": MASK, **own, **options, "speculators_config": SpeculatorsConfig(
            algorithm=case.split("_")[0], default_proposal_method="greedy",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=BLOCK - 1)],
            verifier=VerifierConfig(name_or_path=str(TARGET),
                                    architectures=["LlamaForCausalLM"]))})


def draft_of(case, seed):
    config = config_of(case)
    model = SpeculatorModel.registered_model_class_from_config(config)(config).eval()
    randomize(model, seed)
    if config.draft_vocab_size != VOCAB:
        ids = np.sort(np.random.default_rng(seed).permutation(VOCAB)[:config.draft_vocab_size])
        model.load_vocab_mappings(torch.from_numpy(np.isin(np.arange(VOCAB), ids)),
                                  torch.from_numpy(ids - np.arange(len(ids))))
    model.load_verifier_weights()
    return model


def of_peagle(model, tokens):
    """What the library's own forward makes of drafts behind every position."""
    target = LlamaForCausalLM.from_pretrained(TARGET, dtype=torch.float32,
                                              attn_implementation="eager").eval()
    n, out, core = LENGTH - 1, [], "speculators.models.peagle.core"
    depth = torch.cat([torch.full((n - d,), d) for d in range(DEPTHS)])
    anchor = torch.cat([torch.arange(n - d) for d in range(DEPTHS)])
    model.lm_head.register_forward_hook(lambda _, args, x: out.append(x[0].numpy()))
    with (torch.no_grad(), mock.patch(f"{core}.compute_metrics", return_value=(0, {})),
          mock.patch(f"{core}.generate_cod_sample_indices", return_value=(anchor, depth))):
        states = target(tokens, output_hidden_states=True).hidden_states
        fused = torch.cat([states[i] for i in model.config.eagle_aux_hidden_state_layer_ids], -1)
        model(fused[:, :-1], tokens[:, 1:], torch.zeros((1, n), dtype=torch.long),
              verifier_last_hidden_states=states[-1][:, :-1])
    logits = np.full((DEPTHS, LENGTH, out[0].shape[-1]), np.nan, np.float32)
    logits[depth, 1 + anchor + depth] = out[0]
    return {"logits": logits}


def reference(model, tokens):
    """What the library's own forward makes of these tokens: what it hands to its loss."""
    target = LlamaForCausalLM.from_pretrained(TARGET, dtype=torch.float32,
                                              attn_implementation="eager").eval()
    core, base = type(model).__module__, []
    model.lm_head.register_forward_hook(lambda _, args, out: base.append(out))
    chosen = (torch.tensor(ANCHORS), torch.ones(len(ANCHORS), dtype=torch.bool))
    with (torch.no_grad(), mock.patch(f"{core}.compute_metrics", return_value=(0, {})) as loss,
          mock.patch("speculators.models.dflash.core.select_anchors", return_value=chosen)):
        states = target(tokens, output_hidden_states=True).hidden_states
        fused = torch.cat([states[i] for i in model.config.aux_hidden_state_layer_ids], dim=-1)
        model(fused, tokens, torch.ones(tokens.shape), states[-1],
              torch.zeros(tokens.shape, dtype=torch.long), max_anchors=len(ANCHORS))
    logits, _, confidence = loss.call_args.args[:3]
    found = {"base": base[0]}
    if "dspark" in core:
        found["logits"] = logits
        if confidence is not None:
            found["confidence"] = confidence
    return {name: x.reshape(len(ANCHORS), BLOCK, *x.shape[2:]).numpy() for name, x in found.items()}


def specforge(config):
    """The config.json that SpecForge has in the place of the library's: flat, with what is DFlash's
    in `dflash_config`, layers named by their output, and no word on the anchor's slot."""
    layer = {**Qwen3Config(**config["transformer_layer_config"]).to_dict(), "model_type": "qwen3"}
    rope = layer.pop("rope_parameters")
    own = {"mask_token_id": config["mask_token_id"],
           "target_layer_ids": [i - 1 for i in config["aux_hidden_state_layer_ids"]]}
    dspark = config["speculators_model_type"] == "dspark"
    if dspark:
        own |= {"projector_type": "dspark", "confidence_head_alpha": 1.0,
                **{key: config[key] for key in ("markov_rank", "markov_head_type",
                                                "enable_confidence_head",
                                                "confidence_head_with_markov")}}
    name = "DSparkDraftModel" if dspark else "DFlashDraftModel"
    out = {**layer, "rope_theta": rope["rope_theta"], "rope_scaling": None, "architectures": [name],
           "auto_map": {"AutoModel": f"{name.removesuffix('DraftModel').lower()}.{name}"},
           "block_size": config["block_size"], "num_target_layers": 7, "dtype": "float16",
           "dflash_config": own}
    if config["draft_vocab_size"] != VOCAB:
        out["draft_vocab_size"] = config["draft_vocab_size"]
    return out


def make(case, seed):
    directory, kind = HERE / case, SPECFORGE.get(case, case)
    model = draft_of(kind, seed)
    cast(model, torch.float16 if case in SPECFORGE else torch.bfloat16)
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "config.py").unlink(missing_ok=True)  # the library's own code
    config = json.loads((directory / "config.json").read_text())
    config.pop("auto_map", None)
    config["speculators_config"]["verifier"]["name_or_path"] = "eagle3_target"
    if case in SPECFORGE:
        config = specforge(config)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    tokens = np.random.default_rng(seed).integers(0, MASK, (1, LENGTH), dtype=np.int32)
    model = cast(model, torch.float32)
    if case in PEAGLE:
        found = of_peagle(model, torch.from_numpy(tokens).long())
    else:
        found = {"anchors": np.int32(ANCHORS),
                 **reference(model, torch.from_numpy(tokens).long())}
    np.savez(directory / "reference.npz", tokens=tokens, **found)
    print(case, sorted(tensors), {name: (x.shape, float(np.nanmax(np.abs(x))))
                                  for name, x in found.items()})


if __name__ == "__main__":
    for number, case in enumerate([*CASES, *SPECFORGE, *PEAGLE]):
        if case in (sys.argv[1:] or [*CASES, *SPECFORGE, *PEAGLE]):
            make(case, number)
