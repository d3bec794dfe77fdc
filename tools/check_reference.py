#!/usr/bin/env python3
"""Checks tools/reference_dtrnet.py: exits 1 if a value leaves its tolerance.

Against the golden of the public DTRNet code (logits, layer outputs, router probabilities, loss,
aux, every gradient), against the transformers goldens (dense_*), and against itself: documents
packed into one sequence equal the documents run alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from compare_logits import relative_error
from reference_dtrnet import Forward, Model, cross_entropy, next_token_targets
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def values_of(out: Forward, loss: Tensor | None, grads: dict[str, Tensor],
              train: Forward | None) -> dict[str, Tensor]:
    """The tensors of a golden file, by their names there."""
    values = {"eval.logits": out.logits}
    values |= {f"eval.layer{i}.output": x for i, x in enumerate(out.layer_outputs)}
    values |= {f"eval.layer{i}.router_probs": p for i, p in out.router_probs.items()}
    if train is not None:
        values["train.loss"] = loss.reshape(1)
        values["train.total_aux_loss"] = train.aux_loss.detach().reshape(1)
        values |= {f"train.grad.{name}": g for name, g in grads.items()}
    return values


def check_case(directory: Path) -> bool:
    """Recomputes every float tensor of a golden with the reference and prints the worst errors."""
    golden = load_file(directory / "golden.safetensors")
    ids = golden["input_ids"]
    documents = golden.get("document_ids")
    fallback = {int(n.split(".")[1].removeprefix("layer")): t
                for n, t in golden.items() if n.startswith("fallback.")}
    with torch.no_grad():
        out = Model.load(directory).forward(ids, documents)
        exact = Model.load(directory, torch.float64).forward(ids, documents)
    values = {"eval.logits_f64": exact.logits}
    if documents is not None:
        with torch.no_grad():
            values["eval_joined.logits"] = Model.load(directory).forward(ids).logits
    if "train.loss" in golden:
        targets = golden.get("targets", next_token_targets(ids, documents))
        trained = Model.load(directory).gradients(ids, targets, documents, fallback)
        values |= values_of(out, *trained)
        values["eval.loss"] = cross_entropy(out.logits, targets).reshape(1)
    else:
        values |= values_of(out, None, {}, None)
    worst = {"value": 0.0, "gradient": 0.0}
    expected = {n for n, t in golden.items()
                if t.is_floating_point() and n.startswith(("eval", "train"))}
    missing = sorted(expected - values.keys())
    for name in expected & values.keys():
        kind = "gradient" if name.startswith("train.grad.") else "value"
        worst[kind] = max(worst[kind], relative_error(values[name], golden[name]))
    ok = (not missing and worst["value"] <= VALUE_TOLERANCE
          and worst["gradient"] <= GRADIENT_TOLERANCE)
    shares = [f"{m.float().mean():.2f}" for m in out.routed.values()]
    print(f"{'ok  ' if ok else 'FAIL'} {directory.name}: {len(expected)} tensors, "
          f"values {worst['value']:.2g}"
          + (f", gradients {worst['gradient']:.2g}" if "train.loss" in golden else "")
          + (f", routed {'/'.join(shares)}" if shares else "")
          + (f", not recomputed: {missing}" if missing else ""))
    return ok


def check_documents() -> bool:
    """Documents packed in one sequence against each document run alone."""
    directory = GOLDEN / "dtrnet_gqa"
    ids = load_file(directory / "golden.safetensors")["input_ids"][:1]
    lengths = [19, 1, 28]
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    model = Model.load(directory, torch.float64)
    with torch.no_grad():
        packed = model.forward(ids, documents).logits
        alone = torch.cat([model.forward(part).logits for part in ids.split(lengths, 1)], dim=1)
        joined = model.forward(ids).logits
    error = relative_error(packed, alone)
    ok = error <= 1e-12 and relative_error(packed, joined) > 1e-3
    print(f"{'ok  ' if ok else 'FAIL'} packed documents equal documents alone: {error:.2g}")
    return ok


def main() -> int:
    public = GOLDEN / "dtrnet_gqa"
    results = [check_case(public), check_documents()]
    results += [check_case(d) for d in sorted(GOLDEN.iterdir())
                if d != public and (d / "model.safetensors").exists()
                and not d.name.startswith("adamw")]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
