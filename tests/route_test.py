"""A dense model becomes a routed one (`detour route`), learns from the dense one (`train --teacher`), and is asked what
it can recall (`eval --recall`). Uses DETOUR_BIN."""
import json
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from robust_fixtures import CONTEXT, checkpoints, error_line, ok, run, weights, world  # noqa: F401

LENGTH = 1024  # the model's context, and that of questions to recall

# Methods whose routed model can be the dense one, with what else they need here.
EXACT = {"dtrnet": [], "dtrnet window": ["--routing", "bypass=window", "--routing", "window=4"],
         "dtrnet constant": ["--routing", "bypass=constant"], "dllm": ["--layers", "1,2"], "skip": [],
         "early_exit": [], "moe": ["--routing", "experts=3"], "moe shared": ["--routing", "shared_expert=true"],
         "dtrnet+moe": [], "blocks": ["--routing", "block_size=16", "--routing", "top_k=64"]}


@pytest.fixture(scope="module")
def dense(world):
    out = world.root / "dense_for_route"
    config = world.config("dense_long.json", max_position_embeddings=LENGTH)
    ok(*world.train_args(out, "--max-steps", 8, config=config))
    return (out / "latest").resolve()


def logits(world, model, tmp_path):
    ids = np.random.default_rng(1).integers(0, 256, (2, CONTEXT), dtype=np.int32)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    ok("logits", "--model", model, "--tokens", tmp_path / "ids.safetensors", "--out", tmp_path / "logits.safetensors")
    return load_file(tmp_path / "logits.safetensors")


@pytest.mark.parametrize("name", EXACT)
def test_it_starts_as_the_dense_model(world, dense, tmp_path, name):
    printed = ok("route", dense, "--method", name.split()[0], *EXACT[name], "--out", tmp_path / "routed", "--data",
                 world.data, "--seq-len", CONTEXT, "--eval-tokens", 512).stdout
    assert "1.0000 times the dense model's" in printed
    expected = logits(world, dense, tmp_path)["logits"]
    answer = logits(world, tmp_path / "routed", tmp_path)
    scale = np.abs(expected).max()
    assert np.abs(answer["logits"] - expected).max() <= (1e-6 * scale if "moe" in name else 0)
    for key, flags in answer.items():
        assert not key.endswith("routed") or "moe" in name or flags.all(), key
    source, routed = load_file(dense / "model.safetensors"), load_file(tmp_path / "routed" / "model.safetensors")
    for key in set(source) & set(routed):
        assert source[key].tobytes() == routed[key].tobytes(), key


def first_tokens(folder, num):
    """The first tokens of the training split, and where documents begin among them (docs/formats.md)."""
    data = (folder / "train-00000.bin").read_bytes()
    num_tokens, num_documents = np.frombuffer(data, "<u8", 2, 16).astype(int)
    ids = np.frombuffer(data, "<u2", num, 64).astype(int)
    begins = np.frombuffer(data, "<u8", num_documents, 64 + (2 * num_tokens + 7) // 8 * 8).astype(int)
    return ids, [int(b) for b in begins if b < num]


@pytest.mark.parametrize("bypass, decider", [("constant", "learned"), ("value", "learned"), ("constant", "random")])
def test_a_bypass_is_fitted_to_attention(world, dense, tmp_path, bypass, decider):
    printed = ok("route", dense, "--method", "dtrnet", "--layers", "all", "--routing", f"bypass={bypass}", "--routing",
                 "value_scale=true", "--routing", f"decider={decider}", "--data", world.data, "--seq-len", CONTEXT,
                 "--eval-tokens", 4 * CONTEXT, "--out", tmp_path / "routed").stdout
    assert "bypass fitted" in printed and ("1.0000 times" in printed) == (decider == "learned")
    torch.set_num_threads(1)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(dense, attn_implementation="eager").eval()
    ids, begins = first_tokens(world.data, 4 * CONTEXT)
    cuts = sorted({*begins, *range(0, len(ids), CONTEXT), len(ids)})
    answers, values = {}, {}

    def keep(where, at):
        return lambda module, args, out: where.setdefault(at, []).append(out[0] if isinstance(out, tuple) else out)
    for i, layer in enumerate(oracle.model.layers):
        layer.self_attn.register_forward_hook(keep(answers, i))
        layer.self_attn.v_proj.register_forward_hook(keep(values, i))
    with torch.no_grad():
        for begin, end in zip(cuts, cuts[1:]):
            oracle(torch.tensor(ids[None, begin:end]))
    routed, config = load_file(tmp_path / "routed" / "model.safetensors"), oracle.config
    heads, dim = config.num_attention_heads, config.hidden_size
    for i, layer in enumerate(oracle.model.layers):
        # Rows behind the first four of their document, or of what a sequence has of it.
        o = torch.cat([x[0, 4:] for x in answers[i]]).double()
        v = torch.cat([x[0, 4:] for x in values[i]]).double().unflatten(1, (config.num_key_value_heads, -1))
        v = v.repeat_interleave(heads // config.num_key_value_heads, 1)
        w = layer.self_attn.o_proj.weight.detach().double().view(dim, heads, -1)
        f = torch.einsum("nhk,dhk->ndh", v, w)
        center = (lambda x: x - x.mean(0)) if bypass == "constant" else (lambda x: x)
        a = np.linalg.lstsq(center(f).reshape(-1, heads).numpy(), center(o).reshape(-1).numpy(), rcond=None)[0]
        prefix = f"model.layers.{i}.router.bypass_"
        np.testing.assert_allclose(routed[prefix + "scale"], a, atol=1e-3 * np.abs(a).max())
        if bypass == "constant":
            c = (o - f @ torch.tensor(a)).mean(0).numpy()
            np.testing.assert_allclose(routed[prefix + "constant"], c, atol=1e-3 * np.abs(c).max())


def test_a_bypass_learns_whoever_decides(world, dense, tmp_path):
    """A layer without attention: no gate has weights, and the vector in its place is trained alone."""
    ok("route", dense, "--method", "dtrnet", "--routing", "bypass=constant", "--routing", "decider=random", "--routing",
       "share=0", "--routing", "reserved=1", "--data", world.data, "--seq-len", CONTEXT, "--out", tmp_path / "routed")
    ok("train", "--init-from", tmp_path / "routed", "--teacher", dense, "--train", "router", "--data", world.data,
       "--out-dir", tmp_path / "taught", "--seq-len", CONTEXT, "--max-steps", 3, "--lr", 1e-2)
    before = load_file(tmp_path / "routed" / "model.safetensors")
    after = load_file(tmp_path / "taught" / "latest" / "model.safetensors")
    changed = {key for key in before if before[key].tobytes() != after[key].tobytes()}
    assert changed and changed == {key for key in before if "router.bypass_" in key}


def test_experts_are_copies_of_the_mlp(world, dense, tmp_path):
    ok("route", dense, "--method", "moe", "--routing", "experts=3", "--layers", "1", "--out", tmp_path / "routed")
    source, routed = load_file(dense / "model.safetensors"), load_file(tmp_path / "routed" / "model.safetensors")
    for e in range(3):
        for ours, mlp in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            np.testing.assert_array_equal(routed[f"model.layers.1.block_sparse_moe.experts.{e}.{ours}.weight"],
                                          source[f"model.layers.1.mlp.{mlp}.weight"])
    assert not any("layers.1.mlp" in name for name in routed)


def test_what_cannot_start_dense_says_so(world, dense, tmp_path):
    assert "cannot be set to let every token in" in ok("route", dense, "--method", "mod", "--out",
                                                       tmp_path / "routed").stdout


@pytest.mark.parametrize("flags,says", [
    (["--method", "dense"], "--method"), (["--method", "nope"], "dtrnet"),
    (["--method", "recursion", "--layers", "0,1,2"], "no place for"),
    (["--method", "dtrnet", "--layers", "9"], "layers below"),
    (["--method", "dtrnet", "--routing", "window=0"], "window"),
    (["--method", "moe", "--routing", "expert_size=8"], "which the dense model has not")])
def test_refused(world, dense, tmp_path, flags, says):
    assert says in error_line(run("route", dense, *flags, "--out", tmp_path / "routed"))
    assert not (tmp_path / "routed").exists()


def test_routed_models_and_taken_names_are_refused(world, dense, tmp_path):
    ok("route", dense, "--method", "dtrnet", "--out", tmp_path / "routed")
    assert "dense model" in error_line(run("route", tmp_path / "routed", "--method", "dtrnet", "--out", tmp_path / "b"))
    assert "exists" in error_line(run("route", dense, "--method", "dtrnet", "--out", tmp_path / "routed"))


def test_gguf_files_are_converted_first(world, dense, tmp_path):
    ok("convert", dense, tmp_path / "dense.gguf")
    for args in (["route", tmp_path / "dense.gguf", "--method", "dtrnet", "--out", tmp_path / "routed"],
                 world.train_args(tmp_path / "out", "--init-from", tmp_path / "dense.gguf", "--max-steps", 1),
                 world.train_args(tmp_path / "out", "--init-from", dense, "--teacher", tmp_path / "dense.gguf",
                                  "--max-steps", 1)):
        assert "detour convert" in error_line(run(*args))


TAUGHT = ["--train", "router+lora", "--lora-rank", 2, "--target-share", 0.5, "--distill-temperature", 2,
          "--distill-weight", 0.75, "--distill-hidden", 0.5]


@pytest.fixture(scope="module")
def routed(world, dense):
    out = world.root / "routed_to_teach"
    ok("route", dense, "--method", "dtrnet", "--layers", "all", "--out", out)
    return out


def test_distillation_brings_the_model_to_its_teacher(world, dense, routed, tmp_path):
    ok(*world.train_args(tmp_path, "--init-from", routed, "--teacher", dense, "--max-steps", 40, "--lr", 0.01, *TAUGHT,
                         "--share-ramp", 0, "--log-every", 1))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    divergence = [line["divergence"] for line in lines if "divergence" in line]
    assert len(divergence) == 40 and min(divergence[2:]) > 0
    assert np.mean(divergence[-5:]) < 0.7 * max(divergence), divergence
    summary = json.loads((tmp_path / "summary.json").read_text())
    own = json.loads(ok("eval", "--model", dense, "--data", world.data, "--seq-len", CONTEXT, "--max-tokens", 256,
                        "--json").stdout)
    assert summary["teacher_val_loss"] == pytest.approx(own["loss"], rel=1e-6)


def test_a_taught_run_resumes_to_the_bit(world, dense, routed, tmp_path):
    flags = ["--init-from", routed, "--teacher", dense, *TAUGHT, "--max-steps", 6]
    ok(*world.train_args(tmp_path / "whole", *flags))
    ok(*world.train_args(tmp_path / "cut", *flags, "--save-every", 3))
    steps = checkpoints(tmp_path / "cut")
    assert len(steps) == 2
    ok(*world.train_args(tmp_path / "again", *flags, "--resume", tmp_path / "cut" / steps[0]))
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


def test_it_stops_when_the_teacher_is_reached(world, dense, routed, tmp_path):
    ok(*world.train_args(tmp_path, "--init-from", routed, "--teacher", dense, "--train", "router", "--target-share", 0.9,
                         "--share-ramp", 0.2, "--max-steps", 200, "--eval-every", 10, "--stop-within", 3, "--lr", 1e-5,
                         "--min-lr", 1e-6))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stopped_by"] == "recovered" and summary["steps"] < 200
    assert abs(summary["val_share"] - 0.9) < 0.05
    assert math.exp(summary["val_loss"] - summary["teacher_val_loss"]) <= 3


@pytest.mark.parametrize("flags,says", [
    (["--distill-weight", 0.5], "--teacher"), (["--stop-within", 1.1], "--teacher"),
    (["--teacher", "TEACHER", "--stop-within", 0.5], "--stop-within"),
    (["--teacher", "nowhere"], "nowhere")])
def test_bad_distillation(world, dense, routed, tmp_path, flags, says):
    flags = [dense if f == "TEACHER" else f for f in flags]
    assert says in error_line(run(*world.train_args(tmp_path, "--init-from", routed, "--max-steps", 2, *flags)))


def test_recall_asks_the_same_of_every_model(world, dense, routed, tmp_path):
    args = ["--data", world.data, "--split", "train", "--seq-len", CONTEXT, "--max-tokens", 128, "--json"]
    recall = [json.loads(ok("eval", "--model", m, *args, "--recall", LENGTH, "--recall-prompts", 3, "--recall-pairs", 2)
                         .stdout)["recall"] for m in (dense, dense, routed)]
    assert recall[0] == recall[1] == recall[2]
    assert [(r["task"], r["answers"]) for r in recall[0]] == [("needle", 3), ("pairs", 6)]
    assert all(0 <= r["right"] <= 1 and r["loss"] > 0 for r in recall[0])


def test_recall_without_room_is_refused(world, dense):
    args = ["eval", "--model", dense, "--data", world.data, "--seq-len", CONTEXT, "--max-tokens", 128]
    assert "eval.recall" in error_line(run(*args, "--recall", 40))
    assert "context" in error_line(run(*args, "--recall", 1 << 20))
    assert "--recall needs --data" in error_line(run("eval", "--model", dense, "--text", __file__, "--recall", 64))
