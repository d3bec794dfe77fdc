#!/usr/bin/env python3
"""From which share of attending tokens on routing costs more than it saves: in FLOPs, and in seconds.

    scripts/bench breakeven [--config configs/bench.json] [--method dtrnet:all] [--lengths 2048,8192] [--threads 1]
                            [--shares 0.6,0.7,0.8,0.9,0.97] [--rounds 5] [--what prefill|train]

Models of random weights, one for each share (the routers' biases are set so), and the dense one run in turns. A curve of
second degree through the medians of each round's ratio to dense, over the shares reached, is followed to where it is 1; the
same with the FLOPs that were executed.
"""
import argparse
import os
import statistics

import numpy as np

import compare
import compare_table
from worker import Worker


def crossing(shares, ratios):
    """Where the curve through (share, ratio) first is 1 above the smallest share; None if it is nowhere near."""
    curve = np.polyfit(shares, ratios, 2) - [0, 0, 1]
    roots = [r.real for r in np.roots(curve) if abs(r.imag) < 1e-9 and shares[0] < r.real < 1.2]
    return min(roots) if roots else None


def measure(args, length):
    sequences = max(1, 4096 // length) if args.what == "train" else 1
    specs = ["dense=dense"] + [f"{share}={args.method}@{share}" for share in args.shares]
    worker = Worker(args, length, sequences, specs)
    ratios = {name: [] for name in worker.facts if name != "dense"}
    for i in range(args.rounds + 1):
        seconds = {name: worker.ask(args.what, name)["seconds"] for name in worker.facts}
        for name, values in ratios.items():
            if i > 0:
                values.append(seconds[name] / seconds["dense"])
    worker.close()
    work = "flops_with_head" if args.what == "train" else "flops"  # reading a prompt needs no head
    dense = worker.facts["dense"][work]
    points = [(f["share"], f[work] / dense, statistics.median(ratios[name]))
              for name, f in worker.facts.items() if name != "dense"]
    return sorted(points)


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench breakeven", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda kind: lambda text: [kind(n) for n in text.split(",")]
    parser.add_argument("--worker", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--config", default="configs/bench.json")
    parser.add_argument("--method", default="dtrnet:all", help="METHOD[:LAYOUT[:KEY=VALUE,...]]")
    parser.add_argument("--lengths", type=numbers(int), default=[2048, 8192])
    parser.add_argument("--shares", type=numbers(float), default=[0.6, 0.7, 0.8, 0.9, 0.97])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--what", choices=["prefill", "train"], default="prefill")
    args = parser.parse_args()
    if len(args.shares) < 3:
        parser.error("--shares: expected three or more")
    args.share = args.shares[0]
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    lines = []
    for length in args.lengths:
        points = measure(args, length)
        shares, flops, seconds = zip(*points)
        even = [crossing(shares, flops), crossing(shares, seconds)]
        lines += [[f"{length:,}", f"{100 * s:.1f} %", f"{f:.3f}", f"{t:.3f}"] for s, f, t in points]
        lines.append([f"{length:,}", "break-even", *(f"{100 * e:.1f} %" if e else "–" for e in even)])
    print(compare_table.markdown_table(["tokens", "share", "FLOPs / dense", "seconds / dense"], lines))
    print(f"\n{args.what}, {args.method}, {args.threads} thread(s), medians of {args.rounds} rounds in turns, {compare.machine()}.")


if __name__ == "__main__":
    main()
