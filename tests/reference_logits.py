#!/usr/bin/env python3
"""Logits of a model directory by the reference, in the format of `detour logits`.

IN: `input_ids` int32 [B,T] or [T], optional `lengths` int32 [B]. OUT: `logits` [B,T,V] and, per
routed layer i, `layer{i}.router_probs` [B,T,2] and `layer{i}.routed` u8 [B,T]; rows past a length
are 0. Dense models run in transformers (eager, f32), routed ones in tools/reference_dtrnet.py;
--float64 runs either in the latter, in float64, as the value that float32 errors are measured by.
Each sequence runs alone, without padding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from reference_dtrnet import Config, Model  # noqa: E402


def read_batch(path: Path, vocab_size: int) -> tuple[Tensor, list[int]]:
    """input_ids [B,T] and the length of each sequence."""
    tensors = load_file(path)
    unknown = tensors.keys() - {"input_ids", "lengths"}
    if unknown or "input_ids" not in tensors:
        raise ValueError(f"{path}: expected input_ids and optional lengths, got {sorted(tensors)}")
    ids = torch.atleast_2d(tensors["input_ids"])
    lengths = tensors.get("lengths", torch.full((len(ids),), ids.shape[1])).tolist()
    if len(lengths) != len(ids) or not all(0 <= n <= ids.shape[1] for n in lengths):
        raise ValueError(f"{path}: lengths {lengths} do not fit input_ids {list(ids.shape)}")
    used = torch.cat([row[:n] for row, n in zip(ids, lengths)])
    if len(used) and not 0 <= used.min() <= used.max() < vocab_size:
        raise ValueError(f"{path}: ids outside 0..{vocab_size - 1}")
    return ids, lengths


def transformers_forward(directory: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    problems = {k: v for k, v in report.items() if v}
    if problems:
        raise ValueError(f"{directory}: transformers loads it with {problems}")
    return lambda ids: {"logits": model.eval()(ids.long(), use_cache=False).logits}


def reference_forward(directory: Path, dtype: torch.dtype) -> Callable[[Tensor], dict[str, Tensor]]:
    model = Model.load(directory, dtype)

    def forward(ids: Tensor) -> dict[str, Tensor]:
        out = model.forward(ids)
        tensors = {"logits": out.logits}
        for i, probs in out.router_probs.items():
            tensors[f"layer{i}.router_probs"] = probs
            tensors[f"layer{i}.routed"] = out.routed[i].to(torch.uint8)
        return tensors

    return forward


def run(forward: Callable[[Tensor], dict[str, Tensor]], ids: Tensor,
        lengths: list[int]) -> dict[str, Tensor]:
    """Runs each sequence alone and puts the rows at their places, zeros elsewhere."""
    out: dict[str, Tensor] = {}
    if not any(lengths):
        raise ValueError("every sequence is empty")
    for b, length in enumerate(lengths):
        if length == 0:
            continue
        for name, values in forward(ids[b:b + 1, :length]).items():
            if name not in out:
                out[name] = torch.zeros(*ids.shape, *values.shape[2:], dtype=values.dtype)
            out[name][b, :length] = values[0]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("input", type=Path, metavar="IN.safetensors")
    parser.add_argument("output", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--float64", action="store_true")
    args = parser.parse_args()
    config = Config.from_dict(json.loads((args.model_dir / "config.json").read_text()))
    ids, lengths = read_batch(args.input, config.vocab_size)
    if config.routed_layers or args.float64:
        forward = reference_forward(args.model_dir,
                                    torch.float64 if args.float64 else torch.float32)
    else:
        forward = transformers_forward(args.model_dir)
    with torch.no_grad():
        save_file(run(forward, ids, lengths), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
