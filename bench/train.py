#!/usr/bin/env python3
"""Training step: DTRNet against its dense twin, and dense against transformers eager, interleaved in one run.

Started by scripts/bench train. Prints medians and spread; --json FILE writes all figures. Exits with 1 if a target
is missed: seconds saved >= 0.8 x FLOPs saved; dense speed >= 0.8 x transformers eager.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time


def transformers_step(config_path, seq_len, num_sequences):
    """A function that runs one training step of the same dense model in transformers, eager attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with open(config_path, encoding="utf-8") as file:
        keys = json.load(file)
    keys.pop("routing", None)
    model = LlamaForCausalLM._from_config(LlamaConfig(**keys), attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    ids = torch.randint(0, keys["vocab_size"], (num_sequences, seq_len))

    def step():
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - start

    return step


def describe(values):
    return f"{statistics.median(values):7.3f} s  ({min(values):.3f} to {max(values):.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", required=True)
    parser.add_argument("--config", default="configs/demo.json")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json")
    args = parser.parse_args()

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    torch.set_num_threads(args.threads)
    peer = transformers_step(args.config, args.seq_len, args.sequences)
    worker = subprocess.Popen(
        [args.worker, args.config, str(args.seq_len), str(args.sequences), str(args.share), str(args.threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    facts = json.loads(worker.stdout.readline())

    def ours(name):
        worker.stdin.write(name + "\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    times = {"dense": [], "dtrnet": [], "transformers": []}
    for i in range(args.pairs + 1):  # the first round warms up
        for name, run in (("dense", lambda: ours("dense")), ("dtrnet", lambda: ours("dtrnet")),
                          ("transformers", peer)):
            seconds = run()
            if i > 0:
                times[name].append(seconds)
    worker.stdin.close()

    flop_ratio = facts["routed_flops"] / facts["dense_flops"]
    time_ratio = statistics.median(r / d for r, d in zip(times["dtrnet"], times["dense"]))
    efficiency = (1 - time_ratio) / (1 - flop_ratio)
    speed = statistics.median(t / d for t, d in zip(times["transformers"], times["dense"]))
    print(f"training step, {args.sequences} x {args.seq_len} tokens, {args.threads} threads, {args.pairs} interleaved "
          f"rounds, {platform.processor() or platform.machine()}")
    for name, values in times.items():
        print(f"  {name:13s} {describe(values)}")
    print(f"  {100 * facts['share']:.1f} % of tokens attend in routed layers: FLOPs x {flop_ratio:.3f}, "
          f"seconds x {time_ratio:.3f}; {100 * efficiency:.0f} % of the saving arrives (target 80)")
    print(f"  dense against transformers eager: {speed:.2f} x its speed (target 0.8)")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"times": times, "facts": facts, "flop_ratio": flop_ratio, "time_ratio": time_ratio,
                       "efficiency": efficiency, "speed_vs_transformers": speed, "arguments": vars(args)}, file, indent=2)
    return 0 if efficiency >= 0.8 and speed >= 0.8 else 1


if __name__ == "__main__":
    sys.exit(main())
