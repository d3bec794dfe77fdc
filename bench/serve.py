#!/usr/bin/env python3
"""Serving speed of one model: Detour in every weight format against transformers and llama.cpp, interleaved in one run.

    scripts/bench prefill --model DIR [--gguf FILE…] [--llama-bench PROGRAM] [--tokens 512] [--threads 1,2] [--rounds 5]
    scripts/bench decode  --model DIR … [--depth 16] [--tokens 64]

Peers: transformers eager in f32 (this environment's), and with --llama-bench the program of that name of any llama.cpp,
on each --gguf. The machine's own roof is in the same table: the best f32 product of torch (MKL) over sizes, and how fast a
gigabyte is read. Medians and the range over rounds; --json FILE writes all figures.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import compare

ROOT = pathlib.Path(__file__).resolve().parent.parent
FORMATS = ["f32", "bf16", "q8", "q4", "q4min"]


def gemm_roof(threads):
    """FLOP/s of torch's best f32 product."""
    import torch

    torch.set_num_threads(threads)
    best = 0
    for n in (512, 1024, 2048):
        a, b = torch.ones(n, n), torch.ones(n, n)
        for _ in range(4):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def read_roof(threads):
    """Bytes/s of a sum over a gigabyte."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(1 << 28)
    best = 0
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


class Detour:
    def __init__(self, args, weights):
        self.args, self.weights, self.name = args, weights, f"detour {weights}"

    def measure(self, threads):
        args = self.args
        prompt = "the" + " the" * (args.prompt - 1)
        run = subprocess.run([args.program, "generate", "--model", str(args.model), "--prompt", prompt, "--max-tokens",
                              str(args.new + 1), "--ignore-eos", "--temp", "0", "--stats", "--json", "--weights",
                              self.weights, "--threads", str(threads)], capture_output=True, text=True, check=True)
        stats = json.loads(run.stderr.splitlines()[-1])
        if stats["prompt_tokens"] != args.prompt:
            compare.die(f"{args.model}: expected a token a word, got {stats['prompt_tokens']} for {args.prompt}")
        self.peak = stats["peak_rss_bytes"]
        return stats["decode_tokens_per_s"] if args.new else args.prompt / stats["prefill_seconds"]


class Transformers:
    name = "transformers f32"

    def __init__(self, args):
        import torch
        import transformers

        self.args = args
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32,
                                                                       attn_implementation="eager").eval()

    def measure(self, threads):
        self.torch.set_num_threads(threads)
        ids = self.torch.full((1, self.args.prompt), 260)
        with self.torch.inference_mode():
            start = time.perf_counter()
            out = self.model(ids, use_cache=True, logits_to_keep=1)
            if not self.args.new:
                return self.args.prompt / (time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(self.args.new):
                token = out.logits[:, -1:].argmax(-1)
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return self.args.new / (time.perf_counter() - start)


class LlamaCpp:
    def __init__(self, args, file):
        self.args, self.file, self.name = args, file, f"llama.cpp {file.stem}"

    def measure(self, threads):
        args = self.args
        what = ["-p", "0", "-n", str(args.new)] if args.new else ["-p", str(args.prompt), "-n", "0"]
        run = subprocess.run([args.llama_bench, "-m", self.file, *what, "-t", str(threads), "-r", "1", "-o", "json"],
                             capture_output=True, text=True, check=True)
        return json.loads(run.stdout)[0]["avg_ts"]


def parse():
    parser = argparse.ArgumentParser(prog="scripts/bench prefill|decode", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prefill", "decode"])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--gguf", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--llama-bench")
    parser.add_argument("--weights", default=",".join(FORMATS), type=lambda text: text.split(","))
    parser.add_argument("--tokens", type=int, help="of the prompt (512), or decoded (64)")
    parser.add_argument("--depth", type=int, default=16, help="tokens before the decoded ones")
    parser.add_argument("--threads", default=[1, 2], type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--program", default=os.environ.get("DETOUR_BIN", str(ROOT / "build/release/detour")))
    args = parser.parse_args()
    decode = args.what == "decode"
    args.prompt = args.depth if decode else args.tokens or 512
    args.new = (args.tokens or 64) if decode else 0
    return args


def main():
    args = parse()
    peers = [Detour(args, weights) for weights in args.weights]
    peers += [LlamaCpp(args, file) for file in args.gguf if args.llama_bench]
    peers += [] if args.no_transformers else [Transformers(args)]
    result = {"what": args.what, "prompt": args.prompt, "new": args.new, "machine": compare.machine(), "threads": {}}
    for threads in args.threads:
        speeds = {peer.name: [] for peer in peers}
        for i in range(args.rounds + 1):  # the first warms up
            for peer in peers:
                speed = peer.measure(threads)
                if i > 0:
                    speeds[peer.name].append(speed)
        roof = {"gemm_flops": gemm_roof(threads), "read_bytes": read_roof(threads)}
        result["threads"][threads] = {"tokens_per_s": speeds, **roof}
        print(f"{args.what}, {args.prompt} tokens{f', then {args.new}' if args.new else ''}, {threads} threads, "
              f"{args.rounds} rounds, {result['machine']}; roof {roof['gemm_flops'] / 1e9:.0f} GFLOP/s, "
              f"{roof['read_bytes'] / 1e9:.1f} GB/s")
        for name, values in speeds.items():
            print(f"  {name:34s} {statistics.median(values):8.1f} tokens/s  ({min(values):.1f} to {max(values):.1f})")
        sys.stdout.flush()
    result["peak_rss_bytes"] = {peer.name: peer.peak for peer in peers if isinstance(peer, Detour)}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
