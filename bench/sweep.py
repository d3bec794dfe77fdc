#!/usr/bin/env python3
"""Loss against share: one short training per ratio-controller target, per lambda, and the dense twin.

Started by scripts/bench sweep. All runs have the same shape, data, seed and steps. Prints a Markdown table of the
validation loss and the shares that attend, biases frozen. Goes on where it stopped: a finished run is not repeated.
Exits with 1 if a controlled run misses its target by more than one point over all routed layers.
"""
import argparse
import json
import pathlib
import subprocess
import sys


def train(args, name, flags):
    out = pathlib.Path(args.out) / name
    command = [args.detour, "train", "--config", args.config, "--data", args.data, "--max-steps", str(args.steps),
               "--seed", str(args.seed), "--eval-every", "0", "--save-every", "0", "--out-dir", str(out),
               "--resume", "auto", *flags]
    subprocess.run(command, check=True, stdout=sys.stderr)
    evaluated = subprocess.run([args.detour, "eval", "--model", str(out / "latest"), "--data", args.data, "--json"],
                               check=True, capture_output=True, text=True)
    return json.loads(evaluated.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--detour", default="build/release/detour")
    parser.add_argument("--config", default="configs/demo.toml")
    parser.add_argument("--data", default="out/demo/data", help="shards; scripts/demo makes these")
    parser.add_argument("--out", default="out/sweep")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--targets", default="0.05,0.1,0.15,0.25,0.5", help="of the ratio controller")
    parser.add_argument("--lambdas", default="8e-4,5e-3,2e-2,5e-2", help="aux loss without the controller")
    parser.add_argument("--json")
    args = parser.parse_args()

    runs = [("dense", ["--method", "dense"], None)]
    for target in filter(None, args.targets.split(",")):
        runs.append((f"target {target}", ["--method", "dtrnet", "--target-share", target], float(target)))
    for value in filter(None, args.lambdas.split(",")):
        runs.append((f"lambda {value}", ["--method", "dtrnet", "--aux-loss-coeff", value], None))

    results, missed = {}, []
    for name, flags, target in runs:
        result = train(args, name.replace(" ", "-"), flags)
        result["target"] = target
        results[name] = result
        if target is not None and abs(result["share_routed"] - target) > 0.01:
            missed.append(name)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(results, indent=2), encoding="utf-8")

    dense = results["dense"]["loss"]
    print("| run | validation loss | against dense | attend, % | by routed layer |\n|---|---|---|---|---|")
    for name, result in results.items():
        shares = [100 * layer["share"] for layer in result["layers"]]
        mean = f"{100 * result['share_routed']:.1f}" if shares else "–"
        print(f"| {name} | {result['loss']:.4f} ± {result['loss_stderr']:.4f} | {100 * (result['loss'] / dense - 1):+.2f} % "
              f"| {mean} | {' / '.join(f'{s:.1f}' for s in shares) or '–'} |")
    if missed:
        sys.exit(f"more than one point off: {', '.join(missed)}")


if __name__ == "__main__":
    main()
