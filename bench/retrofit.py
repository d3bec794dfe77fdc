#!/usr/bin/env python3
"""How far a trained dense model can be routed: share of global attention against perplexity and recall.

    scripts/bench retrofit --dense DIR --data DIR [--full 18 --full 7,18 …] [NAME=DIR …] --out DIR

Every point is a model: NAME=DIR are models or runs; `--full LAYERS` makes one of the dense model, without training, in
which only these layers attend globally and the others see a window (--window) and a sink of four tokens. DIR of --data was
made by `detour prepare` from text that no model was taught, and its validation split is used. Measured of each: perplexity
at --seq-len, recall (`detour eval --recall`), and in one interleaved run, KV bytes and decoding speed (`detour report`).
Written to --out: retrofit.json, retrofit.md, retrofit.html. A point that is there already is not measured again.
"""
import argparse
import html
import json
import os
import pathlib
import sys

import compare
import compare_page
import compare_plot
import compare_table

ROOT = pathlib.Path(__file__).resolve().parent.parent


def detour(args, *command):
    return compare.call(args.program, *map(str, command))


def windowed(args, full, out):
    """The dense model with global attention in the layers `full` alone."""
    num_layers = json.loads((args.dense / "config.json").read_text())["num_hidden_layers"]
    kept = [int(layer) for layer in full.split(",")] if full else []
    if not all(0 <= layer < num_layers for layer in kept):
        compare.die(f"--full {full}: expected layers from 0 to {num_layers - 1}")
    routed = ",".join(str(layer) for layer in range(num_layers) if layer not in kept)
    settings = ["bypass=window", f"window={args.window}", "sink=4", "decider=random", "share=0"]
    detour(args, "route", args.dense, "--method", "dtrnet", "--layers", routed, "--out", out,
           *(word for setting in settings for word in ("--routing", setting)))


def model_dir(path):
    return path / "latest" if (path / "latest").exists() else path


def measure(args, path):
    """Quality of one model."""
    lengths = ",".join(map(str, args.lengths))
    found = json.loads(detour(args, "eval", "--model", model_dir(path), "--data", args.data, "--seq-len", args.seq_len,
                              "--max-tokens", args.eval_tokens, "--recall", lengths, "--recall-prompts",
                              args.recall_prompts, "--json"))
    num_layers = json.loads((model_dir(path) / "config.json").read_text())["num_hidden_layers"]
    gates = [layer["share"] for layer in found["layers"] if layer["site"] == "mixer"]
    return {"attending": (num_layers - len(gates) + sum(gates)) / num_layers, "perplexity": found["perplexity"],
            "loss": found["loss"], "tokens": found["tokens"], "recall": found["recall"]}


def measure_speed(args, paths):
    """KV bytes and seconds of all models, interleaved."""
    out = args.out / "report.json"
    runs = [word for name, path in paths.items() for word in ("--run", f"{name}={path}")]
    detour(args, "report", *runs, "--data", args.data, "--lengths", ",".join(map(str, args.lengths)), "--seq-len",
           args.seq_len, "--eval-tokens", args.seq_len, "--sample-tokens", 8, "--json", out)
    return {run["name"]: run["lengths"] for run in json.loads(out.read_text())}


def recall(point, length, task):
    return next(r["right"] for r in point["recall"] if r["length"] == length and r["task"] == task)


def columns(table):
    dense = table["points"][0]
    yield "model", lambda p: p["name"]
    yield "skipped", lambda p: f"{100 * (1 - p['attending']):.1f} %"
    yield "perplexity", lambda p: f"{p['perplexity']:.3f}"
    yield "times dense", lambda p: f"{p['perplexity'] / dense['perplexity']:.4f}"
    for length in table["lengths"]:
        for task in ("needle", "pairs"):
            yield f"{task} at {length:,}", lambda p, n=length, t=task: f"{100 * recall(p, n, t):.0f} %"
    for i, length in enumerate(figure["length"] for figure in dense["lengths"]):
        yield f"KV at {length:,}", lambda p, i=i: f"{p['lengths'][i]['kv_bytes'] / dense['lengths'][i]['kv_bytes']:.3f}"
        yield f"decoding at {length:,}, tokens/s", lambda p, i=i: f"{p['lengths'][i]['decode_tokens_per_s']:.1f}"


def plots(table):
    dense = table["points"][0]

    def scatter(title, y_label, y):
        points = [{"name": p["name"], "x": 100 * p["attending"], "y": y(p), "error": 0,
                   "tip": f"{p['name']}: {100 * p['attending']:.1f} % attend, {y(p):.4g}"} for p in table["points"]]
        drawings = "".join(compare_plot.scatter(points, "(token, layer) pairs with global attention, %", y_label, width,
                                                name) for name, width in (("wide", 1080), ("narrow", 380)))
        return f"<h2>{html.escape(title)}</h2>\n<figure>\n{drawings}</figure>\n"

    longest = table["lengths"][-1]
    asked = [(n, t) for n in table["lengths"] for t in ("needle", "pairs")]
    mean = {p["name"]: sum(recall(p, n, t) for n, t in asked) / len(asked) for p in table["points"]}
    return (scatter("Perplexity", "times the dense model's", lambda p: p["perplexity"] / dense["perplexity"])
            + scatter(f"Answers missed, mean of both tasks up to {longest:,} tokens", "%",
                      lambda p: 100 * (1 - mean[p["name"]])))


def notes(table):
    return [f"Perplexity of {table['points'][0]['tokens']:,} tokens of held-out text at {table['seq_len']:,}. Skipped: "
            "(token, layer) pairs without global attention, of all pairs, layers without router included.",
            f"Recall: {table['recall_prompts']} prompts of each length; needle asks for one fact, pairs for eight.",
            "KV: bytes of the pages handed out, as a part of the dense model's. Decoding: one sequence, "
            f"{table['threads']} threads, models interleaved.", f"Machine: {table['machine']}."]


def write(table, out):
    heads = [head for head, _ in columns(table)]
    lines = [[text(p) for _, text in columns(table)] for p in table["points"]]
    markdown = compare_table.markdown_table(heads, lines)
    (out / "retrofit.md").write_text(markdown + "\n\n" + "\n".join(f"- {note}" for note in notes(table)) + "\n")
    body = plots(table) + "<h2>All figures</h2>\n" + compare_page.table_html(heads, lines)
    body += '<ul class="notes">' + "".join(f"<li>{html.escape(note)}</li>" for note in notes(table)) + "</ul>\n"
    (out / "retrofit.html").write_text(compare_page.PAGE.substitute(
        title="Detour: a dense model, routed", style=compare_page.STYLE,
        subtitle=html.escape(f"{table['dense']}, {len(table['points'])} models"), body=body))
    print(markdown)


def parse():
    parser = argparse.ArgumentParser(prog="scripts/bench retrofit", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=DIR")
    parser.add_argument("--dense", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--full", action="append", default=[], metavar="LAYERS")
    parser.add_argument("--window", type=int, default=768)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[2048, 8192])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--recall-prompts", type=int, default=8)
    parser.add_argument("--program", default=os.environ.get("DETOUR_BIN", str(ROOT / "build/release/detour")))
    return parser.parse_args()


def main():
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    models = {"dense": args.dense}
    for text in args.models:
        name, equals, path = text.partition("=")
        if not equals:
            compare.die(f"{text}: expected NAME=DIR")
        models[name] = pathlib.Path(path)
    for full in args.full:
        path = args.out / f"full-{full.replace(',', '-') or 'none'}"
        models[f"window, full {full}" if full else "window"] = path
        if not path.exists():
            windowed(args, full, path)
    points = []
    for name, path in models.items():
        kept = args.out / (name.replace(" ", "-").replace(",", "-") + ".json")
        if not kept.exists():
            print(f"{name} …", file=sys.stderr, flush=True)
            kept.write_text(json.dumps(measure(args, path)))
        points.append({"name": name, **json.loads(kept.read_text())})
    speeds = measure_speed(args, models)
    for point in points:
        point["lengths"] = speeds[point["name"]]
    table = {"dense": args.dense.name, "lengths": args.lengths, "seq_len": args.seq_len,
             "recall_prompts": args.recall_prompts, "threads": os.cpu_count(), "window": args.window,
             "machine": compare.machine(), "points": points}
    (args.out / "retrofit.json").write_text(json.dumps(table, indent=1) + "\n")
    write(table, args.out)


if __name__ == "__main__":
    main()
