#!/usr/bin/env python3
"""Training step: DTRNet against its dense twin, and dense against transformers, interleaved in one run.

    scripts/bench train [--config configs/bench.json] [--lengths 2048,8192] [--tokens 4096] [--share 0.1] [--threads 2]

A step is forward, backward, clipping and AdamW on --tokens random tokens in sequences of each length. Peers, at the first
length: transformers with eager attention, with fused attention (sdpa), and that under torch.compile. Medians and the range
over rounds; --json FILE writes all figures. Exits with 1 if a target is missed: of the FLOPs saved 90 % in seconds; dense
1.5 x transformers eager, 1.2 x torch.compile.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import time

from worker import Worker

SAVING_TARGET = 0.9
PEER_TARGETS = {"transformers eager": 1.5, "torch.compile": 1.2}


class Peer:
    """Training steps of the same dense model in transformers."""

    def __init__(self, config_path, seq_len, num_sequences, attention, compiled):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        with open(config_path, encoding="utf-8") as file:
            keys = json.load(file)
        keys.pop("routing", None)
        self.model = LlamaForCausalLM._from_config(LlamaConfig(**keys), attn_implementation=attention)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self.ids = torch.randint(0, keys["vocab_size"], (num_sequences, seq_len))
        self.forward = torch.compile(self.model) if compiled else self.model

    def step(self):
        import torch

        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.forward(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return time.perf_counter() - start


def measure(args, seq_len, tokens, peers):
    """Seconds of each candidate's rounds; the first round warms up."""
    worker = Worker(args, seq_len, tokens // seq_len, ["dense=dense", "dtrnet=dtrnet:bilayer"])
    candidates = {name: lambda name=name: worker.ask("train", name)["seconds"] for name in worker.facts}
    candidates.update({name: peer.step for name, peer in peers.items()})
    times = {name: [] for name in candidates}
    for i in range(args.rounds + 1):
        for name, run in candidates.items():
            seconds = run()
            if i > 0:
                times[name].append(seconds)
    worker.close()
    return {"length": seq_len, "tokens": tokens, "times": times, "facts": worker.facts}


def ratio(times, name, base):
    return statistics.median(a / b for a, b in zip(times[name], times[base]))


def describe(values):
    return f"{statistics.median(values):7.3f} s  ({min(values):.3f} to {max(values):.3f})"


def report(args, result):
    """Prints one length's rows, adds the ratios to `result`, and returns whether its targets are met."""
    times, facts = result["times"], result["facts"]
    flops, seconds = facts["dtrnet"]["flops_with_head"] / facts["dense"]["flops_with_head"], ratio(times, "dtrnet", "dense")
    result.update(flop_ratio=flops, time_ratio=seconds, saving_arrived=(1 - seconds) / (1 - flops))
    print(f"training step, {result['tokens'] // result['length']} x {result['length']} tokens, {args.threads} threads, "
          f"{args.rounds} interleaved rounds, {platform.processor() or platform.machine()}")
    met = result["saving_arrived"] >= SAVING_TARGET
    for name, values in times.items():
        line = f"  {name:20s} {describe(values)}"
        if name not in ("dense", "dtrnet"):
            result.setdefault("speed_against", {})[name] = speed = ratio(times, name, "dense")
            target = PEER_TARGETS.get(name)
            met &= target is None or speed >= target
            line += f"  detour's dense step is {speed:.2f} x as fast" + (f" (target {target})" if target else "")
        print(line, flush=True)
    print(f"  {100 * facts['dtrnet']['share']:.1f} % of tokens attend in routed layers: FLOPs x {flops:.3f}, seconds x {seconds:.3f}; "
          f"{100 * result['saving_arrived']:.0f} % of the saving arrives (target {100 * SAVING_TARGET:.0f})", flush=True)
    return met


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--config", default="configs/bench.json")
    parser.add_argument("--lengths", default="2048", help="of the sequences, separated by commas")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step; at least one sequence")
    parser.add_argument("--share", type=float, default=0.1, help="of tokens that attend in routed layers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-peers", action="store_true", help="DTRNet against dense alone")
    parser.add_argument("--json")
    args = parser.parse_args()

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    results, met = [], True
    for i, length in enumerate(int(n) for n in args.lengths.split(",")):
        tokens = max(args.tokens, length)
        peers = {}
        if i == 0 and not args.no_peers:
            import torch

            torch.set_num_threads(args.threads)
            for name, attention, compiled in (("transformers eager", "eager", False), ("transformers sdpa", "sdpa", False),
                                              ("torch.compile", "sdpa", True)):
                peers[name] = Peer(args.config, length, tokens // length, attention, compiled)
        results.append(measure(args, length, tokens, peers))
        met &= report(args, results[-1])
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"results": results, "arguments": vars(args)}, file, indent=2)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
