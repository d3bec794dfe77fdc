#!/usr/bin/env python3
"""Writes the goldens of tests/golden/ and their manifest.json. Run by scripts/golden.

dense_*  transformers' LlamaForCausalLM (eager, f32) reading the very files that are committed
dtrnet_* tools/reference_dtrnet.py (checked against the public code by tools/check_reference.py)
adamw_*  ten steps of torch.optim.AdamW;  flops/ torch.utils.flop_counter on transformers
tests/golden/dtrnet_gqa comes from the public DTRNet code: hashed here, never rewritten.
"""

from __future__ import annotations

import os

# One code path on every machine with AVX2: the same bytes on AVX-512 machines too.
os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2,STRICT",
               "ONEDNN_MAX_CPU_ISA": "AVX2"}

import argparse
import contextlib
import hashlib
import json
import math
import platform
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy
import safetensors
import torch
import transformers
from check_reference import values_of
from compare_logits import relative_error
from reference_dtrnet import Config, Forward, Model, cross_entropy, next_token_targets
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 19
REPOSITORY = Path(__file__).resolve().parent.parent
PUBLIC = REPOSITORY / "tests" / "golden" / "dtrnet_gqa"
MIN_MARGIN = 5e-4  # least |p0 - 0.5|: far above f32 rounding, so that no engine decides otherwise
ADAMW = {"steps": 10, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "max_norm": 1.0,
         "peak_lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 3}


# --- files and random tensors -------------------------------------------------------------------


def generator(name: str) -> torch.Generator:
    """A random stream per case, so that adding a case leaves the others as they are."""
    return torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))


def random_weights(config: Config, rng: torch.Generator) -> dict[str, Tensor]:
    """Matrices N(0, 0.9/sqrt(fan_in)), norms 1 + N(0, 0.1), router biases N(0, 0.3)."""
    weights = {}
    for name, shape in config.shapes().items():
        noise = torch.randn(shape, generator=rng)
        if name.endswith("bias"):
            weights[name] = 0.3 * noise
        elif len(shape) == 1:
            weights[name] = 1 + 0.1 * noise
        else:
            weights[name] = noise * (0.9 / math.sqrt(shape[1]))
    return weights


def random_ids(config: Config, rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=rng, dtype=torch.int32)


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path, {"format": "pt"})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def fresh_directory(out: Path, name: str) -> Path:
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).mkdir(parents=True)
    return out / name


def llama_keys(*, old: bool = False, theta: float = 10000.0, dtype: str = "float32",
               **sizes: object) -> dict:
    """config.json with transformers' keys of version 4 (old) or 5."""
    keys = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "max_position_embeddings": 256, "rms_norm_eps": 1e-5} | sizes
    if old:
        return keys | {"rope_theta": theta, "torch_dtype": dtype}
    return keys | {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "dtype": dtype}


# --- dense cases: transformers is the oracle ----------------------------------------------------


def dense(out: Path, name: str, keys: dict, *, shape: tuple[int, int] = (2, 24),
          grads: bool = False, layers: bool = True, by_transformers: bool = False) -> dict:
    """One case; by_transformers: config.json exactly as save_pretrained writes it."""
    directory, rng = fresh_directory(out, name), generator(name)
    config = Config.from_dict(keys)
    if by_transformers:
        LlamaConfig(**keys).save_pretrained(directory)
    else:
        write_json(directory / "config.json", keys)
    stored = getattr(torch, keys.get("dtype", keys.get("torch_dtype")))
    weights = random_weights(config, rng)
    save(directory / "model.safetensors", {n: w.to(stored) for n, w in weights.items()})

    model = load_llama(directory)
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    ids = random_ids(config, rng, *shape)
    with torch.no_grad():
        logits = model(ids.long(), use_cache=False).logits
        exact = Model.load(directory, torch.float64).forward(ids).logits
    golden = {"input_ids": ids, "eval.logits": logits, "eval.logits_f64": exact}
    if layers:
        golden |= {f"eval.layer{i}.output": x for i, x in enumerate(outputs)}
    if grads:
        golden["targets"] = next_token_targets(ids)
        loss = cross_entropy(model(ids.long(), use_cache=False).logits, golden["targets"])
        loss.backward()
        golden["train.loss"] = loss.reshape(1)
        golden |= {f"train.grad.{n}": p.grad for n, p in model.named_parameters()}
    save(directory / "golden.safetensors", golden)
    return {"oracle": "transformers LlamaForCausalLM, eager, f32",
            "error_f32_against_f64": relative_error(logits, exact)}


def load_llama(directory: Path) -> LlamaForCausalLM:
    model, report = LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    problems = {k: v for k, v in report.items() if v}
    if problems:
        raise RuntimeError(f"{directory}: transformers loads it with {problems}")
    return model.eval()


def dense_cases(out: Path) -> dict[str, dict]:
    small = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    half = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
    return {
        "dense_k32": dense(out, "dense_k32", llama_keys(
            **small, num_attention_heads=4, num_key_value_heads=4, head_dim=32,
            tie_word_embeddings=True), grads=True, by_transformers=True),
        "dense_k64": dense(out, "dense_k64", llama_keys(
            **small, num_attention_heads=4, num_key_value_heads=2, head_dim=64, old=True,
            theta=500000.0, tie_word_embeddings=False)),
        "dense_k128": dense(out, "dense_k128", llama_keys(
            **small | {"num_hidden_layers": 1}, num_attention_heads=2, num_key_value_heads=1,
            head_dim=128, theta=100000.0, tie_word_embeddings=False), by_transformers=True),
        # As old checkpoints have it: neither num_key_value_heads nor head_dim is written.
        "dense_narrow": dense(out, "dense_narrow", llama_keys(
            vocab_size=101, hidden_size=40, intermediate_size=72, num_hidden_layers=2,
            num_attention_heads=2, tie_word_embeddings=False, old=True, rms_norm_eps=1e-6),
            grads=True),
        "dense_bf16": dense(out, "dense_bf16", llama_keys(**half, dtype="bfloat16", old=True)),
        "dense_f16": dense(out, "dense_f16", llama_keys(**half, dtype="float16")),
        "dense_long": dense(out, "dense_long", llama_keys(
            vocab_size=17, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True,
            max_position_embeddings=1024), shape=(1, 600), layers=False),
    }


# --- DTRNet cases: the reference is the oracle --------------------------------------------------


def margin(out: Forward) -> float:
    """The least distance of a decision from its threshold."""
    return min((p[..., 0] - 0.5).abs().min().item() for p in out.router_probs.values())


def calibrate(config: Config, weights: dict[str, Tensor], shares: Mapping[int, float],
              ids: Tensor, documents: Tensor | None) -> None:
    """Sets router biases so that layer i routes about shares[i] of the rows, well off p0 = 0.5.

    Biases move by multiples of 2^-12, so that rounding elsewhere does not change them.
    """
    for layer in sorted(shares):
        with torch.no_grad():
            probs = Model(config, weights, torch.float64).forward(ids, documents)
        p = probs.router_probs[layer].reshape(-1, 2)
        logits = (p[:, 0] / p[:, 1]).log().sort(descending=True).values.tolist()
        wanted = round(shares[layer] * len(logits))
        if wanted == 0:
            cut = logits[0] + 0.5
        elif wanted == len(logits):
            cut = logits[-1] - 0.25
        else:  # the widest gap near the wanted number
            near = range(max(1, wanted - 2), min(len(logits), wanted + 3))
            gap = max(near, key=lambda j: logits[j - 1] - logits[j])
            cut = (logits[gap - 1] + logits[gap]) / 2
        bias = weights[f"model.layers.{layer}.router.weight_predictor.2.bias"]
        bias[0] = round((bias[0].item() - cut) * 4096) / 4096


def dtrnet(out: Path, name: str, keys: dict, shares: Mapping[int, float], *,
           shape: tuple[int, int] = (2, 24), lengths: list[list[int]] | None = None,
           fallback: tuple[int, ...] = (), weights_of: str = "") -> dict:
    """One case. lengths: the documents of each sequence; fallback: layers with given rows."""
    directory, rng = fresh_directory(out, name), generator(weights_of or name)
    config = Config.from_dict(keys)
    weights = random_weights(config, rng)
    ids = random_ids(config, rng, *shape)
    documents = None
    if lengths:
        # A sequence starts with the id that the one before ended with: still another document.
        documents = torch.stack([torch.repeat_interleave(torch.arange(len(n)) + 2 * b,
                                                         torch.tensor(n)).to(torch.int32)
                                 for b, n in enumerate(lengths)])
    calibrate(config, weights, shares, ids, documents)
    write_json(directory / "config.json", keys)
    save(directory / "model.safetensors", weights)

    rows = {i: torch.randperm(ids.numel(), generator=rng)[:round(0.15 * ids.numel())]
            .sort().values.to(torch.int32) for i in fallback}
    targets = next_token_targets(ids, documents)
    model = Model.load(directory)
    with torch.no_grad():
        evaluated = model.forward(ids, documents)
        exact = Model.load(directory, torch.float64).forward(ids, documents)
        joined = model.forward(ids)
    loss, grads, trained = model.gradients(ids, targets, documents, rows)
    golden = {"input_ids": ids, "targets": targets, "eval.logits_f64": exact.logits}
    golden |= values_of(evaluated, loss, grads, trained)
    golden["eval.loss"] = cross_entropy(evaluated.logits, targets).reshape(1)
    golden |= {f"fallback.layer{i}.rows": r for i, r in rows.items()}
    if documents is not None:
        golden |= {"document_ids": documents, "eval_joined.logits": joined.logits}
    save(directory / "golden.safetensors", golden)

    for i in fallback:
        assert trained.routed[i].flatten().nonzero().flatten().tolist() == rows[i].tolist()
        assert not evaluated.routed[i].any()
    margins = [margin(evaluated), margin(exact), margin(trained)]
    margins += [margin(joined)] if documents is not None else []
    assert min(margins) > MIN_MARGIN, (name, margins)
    return {"oracle": "tools/reference_dtrnet.py, f32",
            "routed_rows_eval": {i: m.sum(1).tolist() for i, m in evaluated.routed.items()},
            "routed_rows_train": {i: m.sum(1).tolist() for i, m in trained.routed.items()},
            "least_margin": min(margins),
            "error_f32_against_f64": relative_error(evaluated.logits, exact.logits)}


def dtrnet_cases(out: Path) -> dict[str, dict]:
    tiny = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
            "tie_word_embeddings": True}

    def routed(layers: list[int], **sizes: object) -> dict:
        return llama_keys(**tiny | sizes) | {
            "routing": {"method": "dtrnet", "layers": layers, "aux_loss_coeff": 8e-4}}

    # The public code's keys; no layer is dense.
    all_layers = llama_keys(**tiny, old=True) | {
        "dtrnet_layers": [], "aux_loss_coeff": 0.05}
    return {
        "dtrnet_none": dtrnet(out, "dtrnet_none", routed([1, 2]), {1: 0, 2: 0}),
        "dtrnet_none_fallback": dtrnet(out, "dtrnet_none_fallback", routed([1, 2]), {1: 0, 2: 0},
                                       fallback=(1, 2), weights_of="dtrnet_none"),
        "dtrnet_all": dtrnet(out, "dtrnet_all", routed([1, 2]), {1: 1, 2: 1}),
        "dtrnet_fallback": dtrnet(out, "dtrnet_fallback", routed([1, 2]), {1: 0, 2: 0.4},
                                  fallback=(1,)),
        "dtrnet_documents": dtrnet(out, "dtrnet_documents", routed([0, 2]), {0: 0.5, 2: 0.3},
                                   shape=(2, 40), lengths=[[17, 1, 22], [1, 30, 9]]),
        "dtrnet_all_layers": dtrnet(out, "dtrnet_all_layers", all_layers,
                                    {0: 0.3, 1: 0.6, 2: 0.1}),
        "dtrnet_k32_ragged": dtrnet(out, "dtrnet_k32_ragged",
                                    routed([1, 2], tie_word_embeddings=False, head_dim=32),
                                    {1: 0.2, 2: 0.2}, shape=(3, 40)),
    }


# --- AdamW --------------------------------------------------------------------------------------


def learning_rates() -> list[float]:
    """Linear warm-up to peak_lr, then a cosine to min_lr at the last step."""
    steps, warmup = ADAMW["steps"], ADAMW["warmup_steps"]
    peak, floor = ADAMW["peak_lr"], ADAMW["min_lr"]
    rates = [peak * (t + 1) / warmup for t in range(warmup)]
    for t in range(warmup, steps):
        progress = (t + 1 - warmup) / (steps - warmup)
        rates.append(floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress)))
    return rates


def optimize(params: Mapping[str, Tensor], loss_of: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """Ten steps; losses and gradient norms (before clipping) of each, and the final parameters."""
    for p in params.values():
        p.requires_grad_(True)
    groups = [{"params": [p for p in params.values() if p.ndim > 1],
               "weight_decay": ADAMW["weight_decay"]},
              {"params": [p for p in params.values() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=ADAMW["betas"], eps=ADAMW["eps"], foreach=False)
    losses, norms = [], []
    for step, rate in enumerate(learning_rates()):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(params.values(), ADAMW["max_norm"]))
        losses.append(loss.detach())
        optimizer.step()
    return {"losses": torch.stack(losses), "grad_norms": torch.stack(norms)} | {
        f"final.{n}": p.detach() for n, p in params.items()}


def adamw(out: Path, name: str, keys: dict, shares: Mapping[int, float], scale: float) -> dict:
    directory, rng = fresh_directory(out, name), generator(name)
    config = Config.from_dict(keys)
    weights = random_weights(config, rng)
    weights["model.norm.weight"] *= scale  # brings gradient norms to both sides of max_norm
    ids = random_ids(config, rng, ADAMW["steps"], 2, 16)
    calibrate(config, weights, shares, ids.flatten(0, 1), None)
    write_json(directory / "config.json", keys)
    save(directory / "model.safetensors", weights)
    margins: list[float] = []

    def reference_run(dtype: torch.dtype) -> dict[str, Tensor]:
        model = Model.load(directory, dtype)

        def loss_of(step: int) -> Tensor:
            result = model.forward(ids[step], train=True)
            assert all(m.any() for m in result.routed.values()), "a layer would need the fallback"
            margins.extend([margin(result)] if result.routed else [])
            ce = cross_entropy(result.logits, next_token_targets(ids[step]))
            return ce + config.aux_loss_coeff * result.aux_loss

        return optimize(model.params, loss_of)

    def transformers_run() -> dict[str, Tensor]:
        model = load_llama(directory)
        return optimize(dict(model.named_parameters()), lambda step: cross_entropy(
            model(ids[step].long(), use_cache=False).logits, next_token_targets(ids[step])))

    golden = reference_run(torch.float32) if shares else transformers_run()
    exact = reference_run(torch.float64)
    save(directory / "golden.safetensors", golden | {
        "input_ids": ids, "lr": torch.tensor(learning_rates(), dtype=torch.float64)})
    assert min(margins, default=1.0) > MIN_MARGIN, margins
    errors = {n: relative_error(t, exact[n]) for n, t in golden.items()}
    worst = max((n for n in errors if n.startswith("final.")), key=errors.__getitem__)
    return {"oracle": f"torch.optim.AdamW, {'reference' if shares else 'transformers'}, f32",
            "settings": ADAMW, "grad_norms": golden["grad_norms"].tolist(),
            "least_margin": min(margins, default=None),
            "error_f32_against_f64": {"losses": errors["losses"], "final": errors[worst],
                                      "final_worst": worst}}


def adamw_cases(out: Path) -> dict[str, dict]:
    tiny = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
            "num_key_value_heads": 1, "num_hidden_layers": 2}
    routing = {"routing": {"method": "dtrnet", "layers": [1], "aux_loss_coeff": 8e-4}}
    return {
        "adamw_dense": adamw(out, "adamw_dense",
                             llama_keys(**tiny, tie_word_embeddings=False), {}, 0.32),
        "adamw_dtrnet": adamw(out, "adamw_dtrnet",
                              llama_keys(**tiny, tie_word_embeddings=True) | routing, {1: 0.5},
                              0.25),
    }


# --- FLOPs --------------------------------------------------------------------------------------


def count_flops(keys: dict, length: int, implementation: str, device: str) -> dict:
    """Forward FLOPs of one sequence: total, by operator, by module of layer 0 and the head."""
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(
            **keys, attn_implementation=implementation.split("_")[0])).eval()
        ids = torch.zeros(1, length, dtype=torch.long)
        # Given, because transformers reads values to make it, which meta tensors do not have.
        mask = torch.zeros(1, 1, length, length)
    math_only = (sdpa_kernel(SDPBackend.MATH) if implementation == "sdpa_math"
                 else contextlib.nullcontext())
    counter = FlopCounterMode(display=False)
    with counter, math_only, torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
    counts = counter.get_flop_counts()
    total = {name: sum(ops.values()) for name, ops in counts.items()}
    by_module = {n.removeprefix("LlamaForCausalLM."): total[n] for n in sorted(total)
                 if "layers.0" in n or n.endswith("lm_head")}
    return {"total": counter.get_total_flops(),
            "by_op": {str(op): n for op, n in counts["Global"].items()}, "by_module": by_module}


def flops_case(out: Path) -> dict:
    directory = fresh_directory(out, "flops")
    shapes = {
        "tiny": (48, {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 160,
                      "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
        "small": (1024, {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704,
                         "num_hidden_layers": 6, "num_attention_heads": 8,
                         "num_key_value_heads": 4, "head_dim": 64}),
        "360m": (2048, {"vocab_size": 32000, "hidden_size": 960, "intermediate_size": 2560,
                        "num_hidden_layers": 32, "num_attention_heads": 15,
                        "num_key_value_heads": 5}),
    }
    cases = []
    for name, (length, keys) in shapes.items():
        flops = {kind: count_flops(keys, length, kind, "meta") for kind in ("eager", "sdpa_math")}
        if name == "tiny":
            flops["sdpa_cpu"] = count_flops(keys, length, "sdpa", "cpu")
        cases.append({"name": name, "batch": 1, "tokens": length, "config": keys, "flops": flops})
    write_json(directory / "flops.json", {"cases": cases})
    return {"oracle": "torch.utils.flop_counter.FlopCounterMode on transformers LlamaForCausalLM",
            "counted": "aten.mm (projections, MLP, LM head of all T rows) and aten.bmm (Q K^T and "
                       "P V over the full T x T square for all H heads), 2 FLOP a multiply-add",
            "not_counted": "embedding look-up, norms, rotary angles (elementwise in transformers "
                           "5, no matmul) and rotation, softmax, SiLU, residual and gate products",
            "eager": "matmul attention, full scores",
            "sdpa_math": "scaled_dot_product_attention decomposed to matmuls; equals eager",
            "sdpa_cpu": "the fused CPU kernel has no formula in flop_counter: attention scores "
                        "count 0 there"}


# --- manifest -----------------------------------------------------------------------------------


NOTES = {
    "names": "eval.*: inference; train.*: one training forward and backward (loss = mean "
             "cross-entropy over targets >= 0, + aux_loss_coeff * total_aux_loss on dtrnet_*)",
    "targets": "i32 [B,T], already shifted; -100 (no loss) at the end of a sequence or document",
    "document_ids": "i32 [B,T]; runs of equal ids in a sequence are documents, also where the "
                    "next sequence starts with the same id",
    "eval_joined.logits": "the same tokens with document_ids ignored (one document a sequence)",
    "fallback.layer{i}.rows": "i32, flat rows b*T+t that the layer routes in training; layers "
                              "without it route none where none is routed",
    "aux": "total_aux_loss = sum_l f_l mean(p0_l) / sum_l f_l; 0 if no layer routed a row",
    "zero_gradients": "a parameter that no row used has gradient 0, not a missing tensor",
    "logits_f64": "tools/reference_dtrnet.py in f64 throughout, rotary tables too (transformers "
                  "rounds norms and angles to f32 in any dtype)",
}


def write_manifest(out: Path, cases: dict[str, dict]) -> None:
    files = {p.relative_to(out).as_posix(): p for n in cases for p in (out / n).iterdir()}
    files |= {f"{PUBLIC.name}/{p.name}": p for p in PUBLIC.iterdir()}
    versions = {m.__name__: m.__version__.split("+")[0]
                for m in (numpy, safetensors, torch, transformers)}
    write_json(out / "manifest.json", {
        "script": "scripts/golden",
        "seed": SEED,
        "packages": {"python": platform.python_version()} | versions,
        "notes": NOTES,
        "cases": cases,
        "copied": {PUBLIC.name: "made with the public DTRNet code, see its README.md"},
        "sha256": {n: hashlib.sha256(files[n].read_bytes()).hexdigest() for n in sorted(files)},
    })


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLIC.parent)
    out = parser.parse_args().out
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    cases = dense_cases(out) | dtrnet_cases(out) | adamw_cases(out) | {"flops": flops_case(out)}
    write_manifest(out, cases)


if __name__ == "__main__":
    main()
