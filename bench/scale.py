#!/usr/bin/env python3
"""How cost grows with length: reading a prompt, decoding after it and a training step, dense against each method.

    scripts/bench scale [--config configs/bench.json] [--lengths 1024,2048,…,65536] [--train-lengths 2048,8192]
                        [--share 0.1] [--threads 1] [--rounds 3] [--out out/scale] [NAME=METHOD[:LAYOUT[:KEY=VALUE,…]]…]

Models have random weights and one shape; the routers' biases are set so that --share of the bench's tokens is routed, and
the share reached is in the table. {quarter} in an option is a quarter of the length over 64 (keys of `blocks`). All models
of one length run in turns, --rounds of them; figures are medians, exponents those of a line through the three longest
lengths in logarithms. Writes scale.json, scale.md, scale.html and an SVG plot of each quantity.
"""
import argparse
import html
import json
import math
import os
import pathlib
import statistics

import compare
import compare_page
import compare_table
from worker import Worker

METHODS = ["dense=dense", "dtrnet-bilayer=dtrnet:bilayer", "dtrnet-all=dtrnet:all",
           "window=dtrnet:all:bypass=window,window=256", "blocks=blocks:all:block_size=64,top_k={quarter}",
           "mod=mod:bilayer:capacity=0.125", "dllm=dllm:all", "skip=skip:all"]
QUANTITIES = [("prefill", "Reading a prompt", "seconds"), ("decode", "Decoding one token", "milliseconds"),
              ("kv", "Keys and values kept", "MB"), ("train", "A training step", "seconds")]


def start(args, length, sequences):
    quarter = max(2, length // 256)
    return Worker(args, length, sequences, [spec.format(quarter=quarter) for spec in args.methods])


def measure_serving(args, length):
    """Medians of prefill and decode of every model at one length."""
    worker = start(args, length, 1)
    runs = {name: [] for name in worker.facts}
    for i in range(args.rounds + 1):
        for name in runs:
            read = worker.ask("prefill", name)
            decoded = worker.ask("decode", name)
            if i > 0:
                runs[name].append({**read, "decode": decoded["seconds"]})
    worker.close()
    result = {}
    for name, values in runs.items():
        seconds = [v["seconds"] for v in values]
        result[name] = {"prefill": statistics.median(seconds), "prefill_range": [min(seconds), max(seconds)],
                        "decode": 1e3 * statistics.median(v["decode"] for v in values),
                        "kv": values[0]["kv_bytes"] / 1e6, "memory_bytes": max(v["memory_bytes"] for v in values),
                        **worker.facts[name]}
    return result


def measure_training(args, length):
    worker = start(args, length, max(1, 4096 // length))
    runs = {name: [] for name in worker.facts}
    for i in range(args.rounds + 1):
        for name in runs:
            seconds = worker.ask("train", name)["seconds"]
            if i > 0:
                runs[name].append(seconds)
    worker.close()
    return {name: {"train": statistics.median(values), **worker.facts[name]} for name, values in runs.items()}


def exponent(points):
    """Slope of a least-squares line through the logarithms of the three longest points."""
    points = points[-3:]
    if len(points) < 2:
        return None
    x, y = [math.log(n) for n, _ in points], [math.log(v) for _, v in points]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def series(results, key):
    """(length, value) of each model that has the quantity."""
    names = next(iter(results.values())).keys()
    return {name: [(length, r[name][key]) for length, r in sorted(results.items())] for name in names}


def work(figures, key):
    """What a quantity must cost: bytes read by a decoded token, else FLOPs; reading a prompt needs no head."""
    if key == "decode":
        return figures["weight_bytes"] + 1e6 * figures["kv"]
    return figures["flops_with_head" if key == "train" else "flops"]


def saving(results, name, key):
    """Of the work that is saved at each length, the part that is saved in seconds."""
    for length, r in sorted(results.items()):
        dense, routed = r["dense"], r[name]
        base = work(routed, key) / work(dense, key)
        yield length, (1 - routed[key] / dense[key]) / (1 - base) if base < 0.98 else None


def table(results, key):
    lines = []
    lengths = sorted(results)
    for name, points in series(results, key).items():
        dense = dict(series(results, key)["dense"])
        cells = [f"{value:.3g}" + (f" (x {value / dense[n]:.2f})" if name != "dense" else "") for n, value in points]
        slope = exponent(points)
        lines.append([name, f"{100 * results[lengths[0]][name]['share']:.0f} %", *cells, f"{slope:.2f}" if slope else ""])
    return ["model", "share", *(f"{n:,}" for n in lengths), "exponent"], lines


def arrived(results, key):
    """Lines of the part of the saved work that is saved in seconds."""
    lines = []
    for name in next(iter(results.values())):
        if name != "dense":
            parts = dict(saving(results, name, key))
            lines.append([name, *(f"{100 * p:.0f} %" if p is not None else "–" for p in parts.values())])
    return ["model", *(f"{n:,}" for n in sorted(results))], lines


def draw(results, key, title, unit, out):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "detour", "svg.fonttype": "none", "font.size": 11})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5))
    for name, points in series(results, key).items():
        axes.plot(*zip(*points), marker="o", markersize=4, label=name, linewidth=2.5 if name == "dense" else 1.5,
                  color="black" if name == "dense" else None)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit, title=title)
    axes.set_xticks(sorted(results), [f"{n // 1024}K" for n in sorted(results)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def write(args, serving, training):
    args.out.mkdir(parents=True, exist_ok=True)
    text, body = "", ""
    for key, title, unit in QUANTITIES:
        results = training if key == "train" else serving
        if not results:
            continue
        parts = [(f"{title}, {unit}", *table(results, key))]
        if key != "kv":
            saved = "bytes read" if key == "decode" else "FLOPs"
            parts.append((f"{title}: part of the saved {saved} that is saved in seconds", *arrived(results, key)))
        draw(results, key, title, unit, args.out / f"{key}.svg")
        body += f"<h2>{html.escape(title)}</h2>\n<figure>{(args.out / f'{key}.svg').read_text().split('?>', 1)[1]}</figure>\n"
        for name, heads, lines in parts:
            text += f"**{name}**\n\n{compare_table.markdown_table(heads, lines)}\n\n"
            body += f"<h3>{html.escape(name)}</h3>\n" + compare_page.table_html(heads, lines)
    note = (f"{pathlib.Path(args.config).name}, random weights, {args.threads} thread(s), medians of {args.rounds} rounds in turns, "
            f"{compare.machine()}.")
    (args.out / "scale.md").write_text(text + note + "\n")
    (args.out / "scale.html").write_text(compare_page.PAGE.substitute(
        title="Detour: cost against length", style=compare_page.STYLE, subtitle=html.escape(note), body=body))
    (args.out / "scale.json").write_text(json.dumps({"serving": serving, "training": training, "note": note}, indent=1))
    return text + note


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench scale", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = lambda text: [int(n) for n in text.split(",") if n]
    parser.add_argument("methods", nargs="*", default=METHODS, metavar="NAME=METHOD", help="the first is named dense")
    parser.add_argument("--worker", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--config", default="configs/bench.json")
    parser.add_argument("--lengths", type=lengths, default=[1024 << i for i in range(7)])
    parser.add_argument("--train-lengths", type=lengths, default=[2048, 8192])
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/scale"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    serving, training = {}, {}
    for length in args.lengths:
        serving[length] = measure_serving(args, length)
        print(f"{length:,} tokens: " + ", ".join(f"{name} {r['prefill']:.2f} s + {r['decode']:.1f} ms"
                                                  for name, r in serving[length].items()), flush=True)
    for length in args.train_lengths:
        training[length] = measure_training(args, length)
        print(f"training, {length:,} tokens: " + ", ".join(f"{name} {r['train']:.2f} s"
                                                            for name, r in training[length].items()), flush=True)
    print(write(args, serving, training))


if __name__ == "__main__":
    main()
