"""Every routing method of the program against tools/reference_methods.py (in float64): logits and decisions of random
tiny models, loss, budgets and gradient norm of one training step, teacher-forced evaluation; the expert layout against
transformers' Mixtral. The program is found in DETOUR_BIN.

A training step covers all sequences of its shards exactly once, so that their order does not matter. float32 results
are held to 1e-5 of the largest value (losses, probabilities: absolute), gradient norms to 1e-4.
"""

import functools
import json
import pathlib
import shutil
import sys
import zlib

import numpy as np
import pytest
import torch
from detour_e2e import FOLDER, corpus, detour, expect_error, logits, tokenizer, write_tokens
from safetensors.numpy import load_file
from safetensors.torch import save_file as save_torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
import reference_methods  # noqa: E402
from compare_logits import relative_error  # noqa: E402

torch.set_num_threads(1)

SHAPE = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 512, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}
LENGTHS = [1, 2, 3, 17, 40, 64]


def dtrnet(**keys):
    return {"method": "dtrnet", "layers": [1, 3], "aux_loss_coeff": 0.3, **keys}


def mod(**keys):
    return {"method": "mod", "layers": [1, 3], "capacity": 0.3, "causal_coeff": 0.2, **keys}


def dllm(**keys):
    return {"method": "dllm", "hidden": 24, "aux_loss_coeff": 0.7, **keys}


def moe(**keys):
    return {"method": "moe", "layers": [1, 2], "experts": 5, "aux_loss_coeff": 0.2, **keys}


def skip(**keys):
    return {"method": "skip", "layers": [0, 1, 3], "aux_loss_coeff": 0.6, **keys}


def blocks(**keys):
    return {"method": "blocks", "block_size": 16, "top_k": 2, **keys}


def recursion(**keys):
    return {"method": "recursion", "recursions": 2, "alpha": 0.6, "causal_coeff": 0.2, "aux_loss_coeff": 0.3, **keys}


def early_exit(**keys):
    return {"method": "early_exit", "max_dropout": 0.0, "exit_scale": 0.4, **keys}


WINDOW = {"bypass": "window", "window": 6, "sink": 3}

FOUR = {"layers": [0, 1, 2, 3]}
SIX = {"num_hidden_layers": 6}  # layout middle: four routed layers
RECURSION = {
    "recursion": (recursion(alpha=0.0), SIX),
    "recursion_pairs": (recursion(**FOUR), {"tie_word_embeddings": True}),
    "recursion_four": (recursion(recursions=4, **FOUR), {}),
    "recursion_token": (recursion(choice="token", recursions=3, alpha=0.0), {"num_hidden_layers": 5}),
    "recursion_token_pairs": (recursion(choice="token", z_loss_coeff=0.05, **FOUR), {}),
    "recursion_every_nth": (recursion(recursions=3, decider="every_nth", layers=[1, 2, 3]), {}),
    "recursion_token_every_nth": (recursion(choice="token", decider="every_nth", **FOUR), {}),
    "recursion_dtrnet": ([recursion(**FOUR), dtrnet(layers=[0, 1, 3], budget="target_l2")], {}),
}
# name -> (`routing`, other keys of config.json)
SERVING = {
    "dtrnet": (dtrnet(), {"tie_word_embeddings": True}),
    "dtrnet_identity_executed": (dtrnet(bypass="identity", kv="executed"), {"head_dim": 32}),
    "dtrnet_identity_all": (dtrnet(bypass="identity", kv="all"), {"num_key_value_heads": 1}),
    "dtrnet_constant": (dtrnet(bypass="constant"), {}),
    "dtrnet_scaled": (dtrnet(bypass="constant", value_scale=True), {}),
    "dtrnet_ste": (dtrnet(estimator="ste"), {}),
    "dtrnet_linear": (dtrnet(scorer="linear"), {"num_key_value_heads": 4}),
    "dtrnet_narrow": (dtrnet(scorer="mlp", hidden=6, layers=[0, 1, 2, 3]), {}),
    "dtrnet_reserved": (dtrnet(reserved=3), {}),
    "mod_bce": (mod(), {}),
    "mod_predictor": (mod(causal="predictor", hidden=10), {}),
    "dllm": (dllm(), {}),
    "dllm_all_layers": (dllm(layers=[0, 1, 2, 3], reserved=0, estimator="prob_gate"), {}),
    "skip_all": (skip(), {}),
    "skip_executed": (skip(kv="executed"), {}),
    "skip_value": (skip(bypass="value", kv="executed", estimator="soft"), {}),
    "moe": (moe(top_k=2), {}),
    "moe_switch": (moe(top_k=1, normalize=False), {}),
    "moe_bias_shared": (moe(top_k=3, bias_rate=1e-3, shared_expert=True), {}),
    "every_nth": (dtrnet(decider="every_nth", share=0.3), {}),
    "mod_every_nth": (mod(decider="every_nth", share=0.4), {}),
    "frequency": (dtrnet(decider="frequency", share=0.4), {}),
    "skip_frequency": (skip(decider="frequency", share=0.6), {}),
    "dtrnet_moe": ([dtrnet(layers=[0, 1, 2, 3]), moe()], {}),
    "mod_moe": ([mod(layers=[1, 2, 3]), moe(layers=[0, 1, 3])], {}),
    "mod_dtrnet": ([mod(layers=[1, 2]), dtrnet(layers=[2, 3])], {}),
    "dtrnet_window": (dtrnet(**WINDOW), {}),
    "dtrnet_window_self": (dtrnet(bypass="window", window=1, sink=1, estimator="ste", layers=[0, 1, 2, 3]),
                           {"num_key_value_heads": 1}),
    "dtrnet_window_long_sink": (dtrnet(bypass="window", window=9, sink=20), {}),
    "skip_window": (skip(kv="executed", estimator="soft", **WINDOW), {}),
    "every_nth_window": (dtrnet(decider="every_nth", share=0.3, **WINDOW), {}),
    "mod_dtrnet_window": ([mod(layers=[1, 2]), dtrnet(layers=[2, 3], **WINDOW)], {}),
    "dtrnet_soft_keys": (dtrnet(estimator="soft", soft_keys=True), {}),
    "blocks": (blocks(), {}),
    "blocks_own": (blocks(top_k=1, layers=[1, 2]), {"num_key_value_heads": 1}),
    "blocks_moe": ([blocks(top_k=3), moe()], {}),
    "recursion_frequency": (recursion(recursions=3, decider="frequency", layers=[1, 2, 3]), {}),
    "recursion_window": ([recursion(choice="token"), dtrnet(layers=[0, 2, 3], **WINDOW)], SIX),
    "recursion_blocks": ([recursion(**FOUR), blocks()], {}),
    "mod_blocks": ([mod(capacity=0.6), blocks()], {}),
    **RECURSION,
}
# What `detour logits` says of their layers' attention and MLP is not compared: the reference has no router there.
UNDECIDED = {"blocks"}
TRAINING = {
    "prob_gate_mean_prob": (dtrnet(), {"tie_word_embeddings": True}),
    "prob_gate_identity": (dtrnet(bypass="identity", budget="target_l1", budget_target=0.1), {}),
    "prob_gate_identity_all": (dtrnet(bypass="identity", kv="all", budget="target_l2", budget_target=0.9), {}),
    "prob_gate_layer": (dllm(estimator="prob_gate", reserved=0), {}),
    "prob_gate_constant": (dtrnet(bypass="constant"), {}),
    "ste_constant": (dtrnet(bypass="constant", estimator="ste"), {}),
    "ste_scaled": (dtrnet(bypass="value", value_scale=True, estimator="ste"), {}),
    "ste_value": (dtrnet(estimator="ste"), {}),
    "ste_value_keys": (dtrnet(estimator="ste", key_gradient=True, budget="target_l2", budget_target=0.2), {}),
    "ste_identity_keys": (dtrnet(estimator="ste", bypass="identity", key_gradient=True, layers=[0, 1, 2]), {}),
    "soft_value": (dtrnet(estimator="soft"), {}),
    "soft_layer": (dllm(estimator="soft", reserved=0), {}),
    "dllm_ste": (dllm(estimator="ste"), {}),
    "dllm_ste_unreserved": (dllm(estimator="ste", reserved=0), {}),
    "dllm_ste_no_keys": (dllm(estimator="ste", reserved=0, key_gradient=False, layers=[0, 2, 3]), {}),
    "skip_ste_all": (skip(estimator="ste", budget_target=0.1), {}),
    "skip_ste_keys": (skip(estimator="ste", kv="executed", key_gradient=True, budget="target_l2"), {}),
    "skip_token_l1": (skip(estimator="ste", budget="target_token_l1", budget_target=0.3), {}),
    "mod_bce": (mod(), {}),
    "mod_predictor": (mod(causal="predictor"), {}),
    "mod_none": (mod(causal="none"), {}),
    "moe": (moe(top_k=2, z_loss_coeff=0.05), {}),
    "moe_switch": (moe(top_k=1, normalize=False, z_loss_coeff=0.05), {}),
    "moe_bias_shared": (moe(bias_rate=1e-3, shared_expert=True, aux_loss_coeff=0.0), {}),
    "mod_every_nth": (mod(decider="every_nth", share=0.4), {}),
    "dtrnet_moe": ([dtrnet(layers=[0, 1, 2, 3]), moe()], {}),
    "mod_moe": ([mod(layers=[1, 2, 3]), moe(layers=[0, 1, 3], z_loss_coeff=0.05)], {}),
    "soft_layer_moe": ([dllm(estimator="soft", reserved=0), moe()], {}),
    "prob_gate_window": (dtrnet(**WINDOW), {}),
    "prob_gate_window_self": (dtrnet(bypass="window", window=1, sink=1, layers=[0, 1, 2]), {"num_key_value_heads": 1}),
    "ste_window": (dtrnet(estimator="ste", **WINDOW), {}),
    "soft_window": (dtrnet(estimator="soft", **WINDOW), {}),
    "skip_ste_window": (skip(estimator="ste", kv="executed", **WINDOW), {}),
    "mod_dtrnet_window": ([mod(layers=[1, 2]), dtrnet(layers=[2, 3], **WINDOW)], {}),
    "soft_keys": (dtrnet(estimator="soft", soft_keys=True), {}),
    "soft_keys_identity": (dtrnet(estimator="soft", soft_keys=True, bypass="identity", reserved=3), {}),
    "skip_soft_keys": (skip(estimator="soft", soft_keys=True, kv="executed"), {}),
    "blocks": (blocks(top_k=3, layers=[0, 2, 3]), {}),
    "mod_blocks": ([mod(capacity=0.6), blocks()], {}),
    "recursion_none": (recursion(causal="none", layers=[0, 1, 2, 3]), {}),
    **RECURSION,
    "early_exit_all": (early_exit(curriculum="all"), {}),
}
# Training cases that are run without accumulation, too.
IN_ONE_GO = {"prob_gate_mean_prob", "skip_token_l1", "mod_bce", "moe", "early_exit_all"}
# name -> (`routing`, measure, threshold, first layer after which a token may stop)
EXITS = {
    "dense_margin": ({"method": "dense"}, "margin", 0.02, 0),
    "dense_state": ({"method": "dense"}, "state", 0.92, 1),
    "early_exit_margin": (early_exit(), "margin", 0.02, 1),
    "early_exit_state": (early_exit(), "state", 0.92, 0),
}
CURRICULA = {"rotational": (early_exit(rotation=3), 4), "gradual": (early_exit(curriculum="gradual"), 5)}


def write_model(name, routing, keys):
    """A directory with a random model whose routers take both ways."""
    folder = FOLDER / f"model_{name}"
    folder.mkdir()
    config = SHAPE | keys | {"routing": routing}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {}
    for tensor, shape in reference_methods.Config.from_dict(config).shapes().items():
        seed = f"{name} {'token_quantile' if 'token_quantile' in tensor else tensor}"  # the layers have one table
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        noise = torch.randn(shape, generator=generator)
        if "norm" in tensor:
            weights[tensor] = 1 + 0.2 * noise
        elif "token_quantile" in tensor:
            weights[tensor] = torch.rand(shape, generator=generator)
        elif "embed" in tensor:
            weights[tensor] = noise
        elif len(shape) == 1:
            weights[tensor] = 0.1 * noise
        else:
            weights[tensor] = noise / shape[1]**0.5
    save_torch(weights, folder / "model.safetensors")
    return folder


@functools.cache
def sequences():
    rng = np.random.default_rng(1)
    return [rng.integers(0, SHAPE["vocab_size"], n).tolist() for n in LENGTHS]


@functools.cache
def tokens():
    return write_tokens(FOLDER / "methods_tokens.safetensors", sequences())


def assert_both_ways(model, forwards):
    """Every gate lets some rows in and leaves some out; every expert is chosen by some row, no one by all."""
    method = model.config.method("recursion")
    first = {f"layer{i}" for i in method.layers[:method.period]} if method else set()
    for router in forwards[0].routes:
        routes = [f.routes[router] for f in forwards]
        ways = torch.cat([r.routed[r.reached] for r in routes])[:, None]
        if routes[0].decision.chosen is not None:
            ways = torch.cat([r.decision.chosen[r.reached] for r in routes])
        elif router in first:  # all rows take the first recursion
            assert ways.all(), router
            continue
        assert ways.any(0).all() and not ways.all(0).any(), router


@pytest.mark.parametrize("name", SERVING)
def test_logits_and_decisions(name):
    directory = write_model(f"serving_{name}", *SERVING[name])
    model = reference_methods.load(directory, torch.float64)
    with torch.no_grad():
        forwards = [model.forward(torch.tensor(s)) for s in sequences()]
    assert_both_ways(model, forwards)
    got = load_file(logits(directory, tokens(), "--threads", 1))
    undecided = UNDECIDED & {m.name for m in model.config.methods}
    routers = [r for (_, site), r in model.config.routers().items() if site == "layer" or not undecided]
    names = {"logits"} | {f"{r}.{part}" for r in routers for part in ("router_probs", "routed")}
    assert got.keys() == names or undecided and got.keys() > names
    for b, out in enumerate(forwards):
        for router in routers:
            route = out.routes[router]
            routed = torch.from_numpy(got[f"{router}.routed"][b, :LENGTHS[b]])
            assert torch.equal(routed.bool(), route.routed), (router, LENGTHS[b])
            probs = torch.from_numpy(got[f"{router}.router_probs"][b, :LENGTHS[b]])
            assert probs.shape == route.probs.shape
            assert (probs - route.probs).abs().max() <= 1e-5, (router, LENGTHS[b])
        error = relative_error(torch.from_numpy(got["logits"][b, :LENGTHS[b]]), out.logits)
        assert error <= 1e-5, LENGTHS[b]


@pytest.mark.parametrize("name", EXITS)
def test_exits(name):
    routing, measure, threshold, first = EXITS[name]
    directory = write_model(f"exit_{name}", routing, {})
    model = reference_methods.load(directory, torch.float64)
    with torch.no_grad():
        forwards = [model.forward(torch.tensor(s), exit=reference_methods.Exit(measure, threshold, first))
                    for s in sequences()]
    # Every layer at which a token may stop has tokens that do and tokens that do not, and none is near the threshold.
    depths = torch.cat([f.depth for f in forwards])
    assert set(depths.tolist()) == set(range(first + 1, SHAPE["num_hidden_layers"] + 1))
    assert (torch.cat([torch.cat(f.sure) for f in forwards]) - threshold).abs().min() > 1e-6
    got = load_file(logits(directory, tokens(), "--threads", 1, "--exit", measure, "--exit-threshold", threshold,
                           "--exit-from", first))
    for b, out in enumerate(forwards):
        error = relative_error(torch.from_numpy(got["logits"][b, :LENGTHS[b]]), out.logits)
        assert error <= 1e-5, LENGTHS[b]


def test_layers_before_an_exit():
    """`routed` of a layer: 1 if the token took it (docs/formats.md)."""
    directory = write_model("exit_layers", early_exit(), {})
    model = reference_methods.load(directory, torch.float64)
    got = load_file(logits(directory, tokens(), "--threads", 1, "--exit", "state", "--exit-threshold", 0.9))
    for b, sequence in enumerate(sequences()):
        with torch.no_grad():
            depth = model.forward(torch.tensor(sequence), exit=reference_methods.Exit("state", 0.9)).depth
        for i in range(SHAPE["num_hidden_layers"]):
            taken = torch.from_numpy(got[f"layer{i}.routed"][b, :LENGTHS[b]]).bool()
            assert torch.equal(taken, depth > i), (i, LENGTHS[b])


def test_no_exit_from_recursions():
    directory = write_model("exit_recursion", recursion(**FOUR), {})
    expect_error("logits", "--model", directory, "--tokens", tokens(), "--out", FOLDER / "refused.safetensors",
                 "--exit", "margin", "--exit-threshold", 0.5, says="recursion")


def test_mixtral():
    """The same directory in transformers' MixtralForCausalLM and, with our config.json, in the program."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(1)
    shape = {key: SHAPE[key] for key in SHAPE.keys() - {"model_type", "rope_theta"}}
    config = MixtralConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": SHAPE["rope_theta"]},
                           num_local_experts=6, num_experts_per_tok=2, sliding_window=None,
                           initializer_range=0.2, attn_implementation="eager")
    mixtral = MixtralForCausalLM(config).eval()
    folder = FOLDER / "mixtral"
    mixtral.save_pretrained(folder)
    assert any("block_sparse_moe" in tensor for tensor in load_file(folder / "model.safetensors"))
    (folder / "config.json").write_text(
        json.dumps(SHAPE | {"routing": {"method": "moe", "layout": "all", "experts": 6, "top_k": 2}}))
    got = load_file(logits(folder, tokens(), "--threads", 1))
    for b, sequence in enumerate(sequences()):
        with torch.no_grad():
            out = mixtral(torch.tensor([sequence]), use_cache=False, output_router_logits=True)
        error = relative_error(torch.from_numpy(got["logits"][b, :LENGTHS[b]]), out.logits[0])
        assert error <= 1e-5, LENGTHS[b]
        for i, router_logits in enumerate(out.router_logits):
            probs = torch.from_numpy(got[f"layer{i}.router_probs"][b, :LENGTHS[b]])
            assert (probs - router_logits.softmax(-1)).abs().max() <= 1e-5


@functools.cache
def shards():
    """Shards of a few short documents."""
    texts = FOLDER / "methods_texts"
    texts.mkdir()
    for n, path in enumerate(sorted(corpus().iterdir())[::2]):
        (texts / path.name).write_text(path.read_text()[:60 + 60 * n])
    detour("prepare", texts, "--tokenizer", tokenizer(), "--out-dir", FOLDER / "methods_shards", "--val-fraction", 0.3)
    return FOLDER / "methods_shards"


@functools.cache
def stream(split):
    """All tokens of a split, and where its documents begin (docs/formats.md)."""
    ids, begins = [], []
    for path in sorted(shards().glob(f"{split}-*.bin")):
        data = path.read_bytes()
        assert data[:8] == b"DTRSHARD"
        width, num_tokens, num_documents = (int.from_bytes(data[a:b], "little") for a, b in [(12, 16), (16, 24),
                                                                                            (24, 32)])
        table = 64 + -(-num_tokens * width // 8) * 8
        begins += (len(ids) + np.frombuffer(data, "<u8", num_documents, table).astype(int)).tolist()
        ids += np.frombuffer(data, f"<u{width}", num_tokens, 64).tolist()
    return ids, begins


def pieces(split, seq_len):
    """The documents in the sequences of a split, cut at their ends, and the next tokens."""
    ids, begins = stream(split)
    inputs, targets = [], []
    for first in range(0, (len(ids) - 1) // seq_len * seq_len, seq_len):
        cuts = [first, *(b for b in begins if first < b < first + seq_len), first + seq_len]
        for begin, end in zip(cuts, cuts[1:]):
            inputs.append(torch.tensor(ids[begin:end]))
            targets.append(torch.tensor(ids[begin + 1:end + 1]))
    return inputs, targets


NUM_SEQUENCES = 4


def seq_len():
    """As long as the text gives NUM_SEQUENCES of."""
    length = (len(stream("train")[0]) - 1) // NUM_SEQUENCES
    assert (len(stream("train")[0]) - 1) // length == NUM_SEQUENCES
    return length


def train(directory, micro_batch_size, steps=1):
    """The records of a run's steps, each over the whole training split; the weights stay as they are."""
    out = FOLDER / "methods_run"
    shutil.rmtree(out, ignore_errors=True)
    detour("train", "--data", shards(), "--out-dir", out, "--init-from", directory, "--seq-len", seq_len(),
           "--micro-batch-size", micro_batch_size, "--global-batch-size", NUM_SEQUENCES, "--max-steps", steps,
           "--lr", 1e-9, "--log-every", 1, "--eval-every", 0, "--eval-tokens", 16, "--save-every", 0, "--threads", 1)
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if "loss" in r]


def assert_step(record, losses, grads):
    """A record against the reference's losses and gradients of the step."""
    expected = {"loss": losses.loss.item(), "aux_loss": losses.aux_loss.item(),
                "grad_norm": reference_methods.grad_norm(grads)}
    allowed = {"loss": 1e-5 * expected["loss"], "aux_loss": 1e-5, "grad_norm": 1e-4 * expected["grad_norm"]}
    got = {key: record[key] for key in expected}
    wrong = [key for key in expected if abs(got[key] - expected[key]) > allowed[key]]
    assert not wrong, (wrong, got, expected)


@pytest.mark.parametrize("name", TRAINING)
def test_one_training_step(name):
    directory = write_model(f"training_{name}", *TRAINING[name])
    model = reference_methods.load(directory, torch.float64)
    inputs, targets = pieces("train", seq_len())
    assert len(inputs) > NUM_SEQUENCES
    losses, grads = model.gradients(inputs, targets)
    assert_both_ways(model, losses.outs)
    for micro_batch_size in (NUM_SEQUENCES, NUM_SEQUENCES // 2) if name in IN_ONE_GO else (NUM_SEQUENCES // 2,):
        assert_step(train(directory, micro_batch_size)[0], losses, grads)


@pytest.mark.parametrize("name", CURRICULA)
def test_curricula_of_exits(name):
    routing, steps = CURRICULA[name]
    directory = write_model(f"exits_{name}", routing, {})
    model = reference_methods.load(directory, torch.float64)
    inputs, targets = pieces("train", seq_len())
    records = train(directory, NUM_SEQUENCES // 2, steps)
    assert len(records) == steps
    for step, record in enumerate(records):
        assert_step(record, *model.gradients(inputs, targets, step, steps))


@pytest.mark.parametrize("name", ["mod_bce", "mod_predictor", "recursion_pairs", "recursion_four"])
def test_teacher_forced(name):
    directory = write_model(f"eval_{name}", *TRAINING[name])
    model = reference_methods.load(directory, torch.float64)
    length = min(40, len(stream("val")[0]) - 1)
    inputs, targets = pieces("val", length)
    flags = ["--data", shards(), "--seq-len", length, "--threads", 1, "--json"]
    got = {mode: json.loads(detour("eval", "--model", directory, *flags, *forced)[0])
           for mode, forced in {"teacher_forced": ["--teacher-forced"], "infer": []}.items()}
    with torch.no_grad():
        loss = {mode: model.loss(inputs, targets, mode).loss.item() for mode in got}
        forwards = [model.forward(ids, "teacher_forced") for ids in inputs]
    for mode, result in got.items():
        assert abs(result["loss"] - loss[mode]) <= 1e-5 * loss[mode], mode
    assert abs(loss["teacher_forced"] - loss["infer"]) > 1e-3
    for n, router in enumerate(forwards[0].routes):
        routes = [f.routes[router] for f in forwards]
        agreement = 1.0  # of a rule that is causal
        if routes[0].decision.causal is not None:
            agreement = torch.cat([r.decision.causal == r.routed for r in routes]).double().mean().item()
            assert 0 < agreement < 1
        share = torch.cat([r.routed for r in routes]).double().mean().item()
        assert abs(got["teacher_forced"]["layers"][n].get("causal_agreement", 1.0) - agreement) < 1e-9
        assert abs(got["teacher_forced"]["layers"][n]["share"] - share) < 1e-9


@pytest.mark.parametrize("routing,says", [
    (dtrnet(kv="all"), "bypass"), (dllm(kv="all"), "kv"), (dllm(bypass="value"), "bypass"),
    ([dllm(estimator="ste"), moe()], "estimator"), ([dllm(), dtrnet()], "estimator"),
    (moe(experts=2, top_k=3), "top_k"),
    (mod(capacity=0.0), "capacity"), (mod(capacity=1.5), "capacity"), (dtrnet(estimator="guess"), "estimator"),
    (dtrnet(bypass="window", window=0), "window: expected"), (dtrnet(kv="all", **WINDOW), "kv"),
    (blocks(block_size=24), "block_size"),
    (recursion(layers=[0, 1, 3], recursions=3), "consecutive"), (recursion(recursions=3), "of the 3 recursions"),
    ([recursion(), moe()], "experts of moe"), ([recursion(), mod(layers=[2])], "both decide"),
    ([recursion(), early_exit()], "both decide"), (recursion(alpha=-0.5), "alpha"),
    (recursion(choice="both"), "choice"),
])
def test_what_cannot_be_is_refused(routing, says):
    config = FOLDER / "refused.json"
    config.write_text(json.dumps(SHAPE | {"routing": routing}))
    expect_error("info", config, says=says)
