"""The table of scripts/compare: rows of single runs, figures of run files over seeds, and both as Markdown.

Bits per byte get a 95 % confidence interval over the seeds (Student's t); with one seed, the standard error of the
evaluation over its sequences. Other figures are means over the seeds.
"""
import json
import math
import pathlib
import shlex

# 97.5 % quantiles of Student's t at 1, 2, … degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Z_975 = 1.959964


def t_975(degrees):
    """Exact to three decimals: the table, then the expansion in 1/n (Abramowitz and Stegun, 26.7.5)."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z, n = Z_975, degrees
    return (z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3))


def mean(values):
    values = list(values)
    return None if any(v is None for v in values) else sum(values) / len(values)


def half_width(values):
    """Of the 95 % confidence interval of the mean of two or more values."""
    middle, n = mean(values), len(values)
    return t_975(n - 1) * math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1) / n)


def make_row(run):
    folder, evaluated, report = pathlib.Path(run["out"]), run["eval"], run["report"]
    state = json.loads((folder / "latest" / "trainer_state.json").read_text(encoding="utf-8"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    error = evaluated["loss_stderr"]
    gated = any("expert_shares" not in layer for layer in evaluated["layers"])
    return {
        **{key: run[key] for key in ("name", "run", "seed")},
        "command": shlex.join(run["command"]),
        **{key: run[key] for key in ("config_sha256", "model_sha256", "data_sha256", "commit", "version", "machine",
                                     "steps", "tokens", "train_flops_per_token")},
        "parameters": report["parameters"],
        "loss": evaluated["loss"], "loss_stderr": error,
        "bits_per_byte": evaluated["bits_per_byte"],
        "bits_per_byte_stderr": error and error * evaluated["bits_per_byte"] / evaluated["loss"],
        "share_routed": evaluated["share_routed"] if gated else None,
        "flops_per_token": evaluated["flops_per_token"],
        "train_seconds": state["seconds"],
        "train_tokens_per_s": run["train_tokens_per_s"],
        "train_peak_rss_bytes": summary["peak_rss_bytes"],
        "eval_peak_rss_bytes": evaluated["peak_rss_bytes"],
        "decode_peak_rss_bytes": report["peak_rss_bytes"],
        "lengths": report["lengths"],
        "config": run["config"],
    }


def make_method(rows, first):
    """Figures of one run file; `first`: rows of the first one, by seed, to compare with."""
    values = [row["bits_per_byte"] for row in rows]
    pairs = [row["bits_per_byte"] / first[row["seed"]]["bits_per_byte"] - 1 for row in rows if row["seed"] in first]
    several = len(values) > 1
    figures = {"run": rows[0]["run"], "seeds": [row["seed"] for row in rows], "bits_per_byte": mean(values),
               "bits_per_byte_half_width": half_width(values) if several else rows[0]["bits_per_byte_stderr"],
               "interval": "t95" if several else "stderr",
               "against_first": mean(pairs) if pairs else None,
               "against_first_half_width": half_width(pairs) if len(pairs) > 1 else None}
    for key in ("parameters", "tokens", "loss", "share_routed", "flops_per_token", "train_seconds",
                "train_tokens_per_s", "train_peak_rss_bytes", "eval_peak_rss_bytes", "decode_peak_rss_bytes"):
        figures[key] = mean(row[key] for row in rows)
    figures["lengths"] = [{key: mean(at[key] for at in same) for key in same[0]}
                          for same in zip(*(row["lengths"] for row in rows))]
    return figures


def make(runs, equal, jobs):
    rows = [make_row(run) for run in runs]
    names = list(dict.fromkeys(row["run"] for row in rows))
    first = {row["seed"]: row for row in rows if row["run"] == names[0]}
    return {"format": "detour-comparison", "version": 1, "equal": equal, "jobs": jobs, "rows": rows,
            "methods": [make_method([row for row in rows if row["run"] == name], first) for name in names]}


def three_digits(value):
    return f"{value:#.3g}".rstrip(".")


def si(value):
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * scale:
            return three_digits(value / scale) + f" {prefix}"
    return three_digits(value)


def size(value):
    """Bytes, as 4.13 MiB."""
    for prefix, shift in (("Gi", 30), ("Mi", 20), ("Ki", 10)):
        if value >= 0.9995 * (1 << shift):
            return three_digits(value / (1 << shift)) + f" {prefix}B"
    return f"{value:.0f} B"


def or_dash(value, text):
    return "–" if value is None else text(value)


def plus_minus(text, error):
    return text if error is None else f"{text} ± {error}"


def columns(table):
    """Heading and text of each column of figures; the text is made from a row or from a method."""
    def quality(figures):
        error = figures.get("bits_per_byte_half_width", figures.get("bits_per_byte_stderr"))
        return plus_minus(f"{figures['bits_per_byte']:.4f}", error and f"{error:.4f}")

    def at(length, key, text):
        return lambda figures: or_dash(next((f[key] for f in figures["lengths"] if f["length"] == length), None), text)

    result = [
        ("bits per byte", quality),
        ("FLOPs per token", lambda f: si(f["flops_per_token"])),
        ("share routed", lambda f: or_dash(f["share_routed"], lambda v: f"{100 * v:.1f} %")),
        *([("trained on", lambda f: si(f["tokens"]))] if len({row["tokens"] for row in table["rows"]}) > 1 else []),
        ("training tokens/s", lambda f: f"{f['train_tokens_per_s']:,.0f}"),
        ("memory, training", lambda f: size(f["train_peak_rss_bytes"])),
        ("memory, eval", lambda f: size(f["eval_peak_rss_bytes"])),
        ("memory, decoding", lambda f: size(f["decode_peak_rss_bytes"])),
    ]
    lengths = sorted({f["length"] for method in table["methods"] for f in method["lengths"]})
    for n in lengths:
        result.append((f"tokens/s at {n:,.0f}", at(n, "decode_tokens_per_s", lambda v: f"{v:,.0f}")))
    for n in lengths:
        result.append((f"KV at {n:,.0f}", at(n, "kv_bytes", size)))
    return result


def method_columns(table):
    def against(figures):
        if figures["against_first"] is None or figures["run"] == table["methods"][0]["run"]:
            return "–"
        error = figures["against_first_half_width"]
        return plus_minus(f"{100 * figures['against_first']:+.2f}", error and f"{100 * error:.2f}") + " %"

    first, *rest = columns(table)
    return [first, ("against the first", against), ("parameters", lambda f: si(f["parameters"])), *rest]


def errors(methods):
    """What ± means, in this table."""
    texts = {"t95": "95 % confidence interval over the seeds (Student's t, of the mean)",
             "stderr": "one seed: standard error of the evaluation over its sequences"}
    return [texts[kind] for kind in sorted({method["interval"] for method in methods})]


def notes(table):
    machines = sorted({row["machine"] for row in table["rows"]})
    commits = sorted({row["commit"] or "no commit" for row in table["rows"]})
    return [
        f"Trained on equal {table['equal']}, one thread a run, {table['jobs']} at a time. Bits per byte on the whole "
        f"validation split. ±: {'; '.join(errors(table['methods']))}. Against the first run file: of the ratios "
        "between runs of equal seed.",
        "FLOPs per token: of the forward pass over the validation split, causal, counted as executed, routers and head "
        "in; a multiply-add is 2. Share routed: of tokens, mean over gates.",
        "Decoding: one sequence, one thread, nothing else of this comparison running. Memory: peak resident; of "
        "decoding, with prefill of the longest length. KV: pages handed out.",
        f"Machine: {'; '.join(machines)}. Commit: {'; '.join(commits)}.",
    ]


def markdown_table(headings, lines):
    rule = "|---|" + "---:|" * (len(headings) - 1)
    return "\n".join(["| " + " | ".join(headings) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def markdown(table):
    by_method, by_row = method_columns(table), columns(table)
    parts = [
        markdown_table(["run file", "seeds", *(heading for heading, _ in by_method)],
                       [[m["run"], ", ".join(map(str, m["seeds"])), *(text(m) for _, text in by_method)]
                        for m in table["methods"]]),
        "\n".join(f"- {note}" for note in notes(table)),
        markdown_table(["row", *(heading for heading, _ in by_row), "config"],
                       [[row["name"], *(text(row) for _, text in by_row), row["config_sha256"][:12]]
                        for row in table["rows"]]),
        "`scripts/repro ROW` trains a row again:",
        "\n".join(f"- {row['name']}: `{row['command']}`" for row in table["rows"]),
    ]
    return "\n\n".join(parts) + "\n"
