#!/usr/bin/env python3
"""Memory of a long run: resident bytes against weights and cache, and whether they grow with the number of answers.

    scripts/bench memory --model DIR [--requests 2000] [--tokens 500] [--max-batch 64] [--weights f32] [--threads 2]

One process of `detour generate` answers --requests prompts, --max-batch at a time; its resident memory is read with every
answer. Growth is the slope of a line through the largest reading of each batch in the second half of the run, times the
number of requests. Two bounds: growth within 1 MB; the
peak, less that of a `detour` that answers nothing, at most weights, largest cache and 64 MB. Exit code 1 if one is broken.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import compare

ROOT = pathlib.Path(__file__).resolve().parent.parent
MB = 1 << 20


def resident(pid):
    """Resident bytes: now and at most so far."""
    lines = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024


def idle_bytes(program, model):
    """Resident bytes of a process that has all libraries and a tokenizer, and waits for text."""
    process = subprocess.Popen([program, "tokenizer", "encode", "--model", model], stdin=subprocess.PIPE,
                               stdout=subprocess.DEVNULL)
    time.sleep(2)
    now, _ = resident(process.pid)
    process.communicate()
    return now


def run(args):
    """(answers, most resident bytes) of each whole batch, peak, and the statistics of the run."""
    command = [args.program, "generate", "--model", args.model, "--prompts", "-", "--max-tokens", args.tokens,
               "--max-batch", args.max_batch, "--weights", args.weights, "--threads", args.threads, "--ignore-eos",
               "--json", "--stats"]
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdin.write("\n".join(f"Number {i} of all" for i in range(args.requests)))
    process.stdin.close()
    readings, peak = [], 0
    for line in process.stdout:
        if len(json.loads(line)["tokens"]) != args.tokens:
            compare.die(f"{args.model}: an answer ended before {args.tokens} tokens: its context is too short")
        try:
            now, peak = resident(process.pid)
        except (KeyError, FileNotFoundError):  # it has ended
            break
        readings.append(now)
    errors = process.stderr.read().splitlines()
    if process.wait() != 0:
        compare.die(f"detour generate failed after {len(readings)} answers: {errors[-1] if errors else ''}")
    # All answers are of one length, so a batch ends together, and its cache goes answer by answer.
    size = args.max_batch
    batches = [(i + size, max(readings[i:i + size])) for i in range(0, (args.requests - 1) // size * size, size)]
    return batches, peak, json.loads(errors[-1])


def slope(points):
    n = len(points)
    mx, my = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def weight_bytes(args):
    bits = {"f32": 32, "bf16": 16, "q8": 8.5, "q4": 4.5, "q4min": 5}[args.weights]
    info = json.loads(subprocess.run([args.program, "info", args.model, "--json"], capture_output=True,
                                     text=True, check=True).stdout)
    return info["parameters"] * bits / 8  # of a model whose head is its embedding


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench memory", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--weights", choices=["f32", "bf16", "q8", "q4", "q4min"], default="f32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--program", default=os.environ.get("DETOUR_BIN", str(ROOT / "build/release/detour")))
    args = parser.parse_args()
    if args.requests < 8 * args.max_batch:
        parser.error(f"--requests {args.requests}: expected eight batches of --max-batch {args.max_batch} or more")
    idle, weights = idle_bytes(args.program, args.model), weight_bytes(args)
    start = time.monotonic()
    readings, peak, stats = run(args)
    growth = slope(readings[len(readings) // 2:]) * args.requests
    bound = weights + stats["kv_bytes"] + 64 * MB
    print(f"{args.requests:,} answers of {args.tokens} tokens in {time.monotonic() - start:.0f} s, "
          f"{stats['decode_tokens_per_s']:.0f} tokens/s; {args.weights}, at most {args.max_batch} at a time")
    print(f"growth over all answers {growth / MB:+.2f} MB (bound 1)")
    print(f"peak {peak / MB:.0f} MB, of which idle {idle / MB:.0f}; the rest {(peak - idle) / MB:.0f} MB; weights "
          f"{weights / MB:.0f} + cache {stats['kv_bytes'] / MB:.0f} + 64 = {bound / MB:.0f} MB")
    sys.exit(0 if abs(growth) <= MB and peak - idle <= bound else 1)


if __name__ == "__main__":
    main()
