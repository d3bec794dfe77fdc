"""The page of scripts/compare: the table, and bits per byte against FLOPs per token and against training time.

One HTML file without scripts or anything from outside, in the colours of `detour report`. Each plot is drawn twice, for
wide and narrow screens.
"""
import html
import string

import compare_plot
import compare_table

STYLE = """
:root { color-scheme: light dark;
  --paper: #fcfbf9; --ink: #1d1f23; --soft: #565c66; --rule: #ddd9d0; --panel: #f4f2ed;
  --c0: #1c5f9c; --c1: #c2501a; --c5: #5b6672;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, serif; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171b; --ink: #e6e5e1; --soft: #a3a8b1; --rule: #34383f; --panel: #1d2025;
  --c0: #6aaee6; --c1: #ee8f5a; --c5: #a0acb9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 var(--serif); }
main { max-width: 1320px; margin: 0 auto; padding: 52px 32px 72px; }
header { border-bottom: 2px solid var(--ink); padding-bottom: 18px; }
h1 { font-size: 36px; line-height: 1.15; margin: 0; font-weight: 600; text-wrap: balance; }
header p { color: var(--soft); font-size: 18px; line-height: 1.45; margin: 10px 0 0; max-width: 46em; }
h2 { font-size: 24px; font-weight: 600; margin: 48px 0 10px; }
figure { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font: 13.5px/1.4 var(--sans); font-variant-numeric: tabular-nums lining-nums; }
th, td { text-align: right; padding: 7px 0 7px 14px; font-weight: 400; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
thead th { font-weight: 600; border-bottom: 1px solid var(--ink); vertical-align: bottom; white-space: normal; }
thead th:first-child { white-space: nowrap; }
tbody tr > * { border-bottom: 1px solid var(--rule); }
figcaption { font: 14px/1.5 var(--sans); color: var(--soft); max-width: 62em; }
.legend { display: flex; flex-wrap: wrap; gap: 3px 20px; font: 13.5px/1.5 var(--sans); color: var(--soft); }
.legend span { display: inline-flex; align-items: center; gap: 7px; }
.legend i { width: 10px; height: 10px; border-radius: 50%; background: currentColor; }
.legend i.key { width: 22px; height: 0; border-radius: 0; background: none; border-top: 1.5px dashed; }
.notes { font: 14px/1.5 var(--sans); color: var(--soft); padding-left: 18px; max-width: 62em; }
summary { cursor: pointer; font: 15px/1.6 var(--sans); }
pre { font: 12.5px/1.55 ui-monospace, Menlo, Consolas, monospace; background: var(--panel); padding: 14px 18px;
  border-left: 3px solid var(--rule); white-space: pre-wrap; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; font-family: var(--sans); }
svg.narrow { display: none; }
svg text { fill: var(--soft); font-size: 12.5px; font-variant-numeric: tabular-nums; }
svg .label { fill: var(--ink); font-size: 13px; paint-order: stroke; stroke: var(--paper); stroke-width: 4px;
  stroke-linejoin: round; }
svg .start { text-anchor: start; } svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
.grid { stroke: var(--rule); fill: none; } .axis, .leader { stroke: var(--soft); fill: none; }
.leader { stroke-width: .8; }
.front { stroke: var(--c0); stroke-dasharray: 5 4; fill: none; opacity: .75; }
.error { stroke: currentColor; stroke-width: 1.4; fill: none; }
.point { fill: currentColor; stroke: var(--paper); stroke-width: 1.5; }
.first { color: var(--c1); } .best { color: var(--c0); } .other { color: var(--c5); }
@media (max-width: 760px) {
  main { padding: 28px 16px 48px; } h1 { font-size: 28px; }
  svg.wide { display: none; } svg.narrow { display: block; }
}
@media print { figure { break-inside: avoid; } }
"""

PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header><h1>$title</h1><p>$subtitle</p></header>
$body
</main>
</body>
</html>
""")


def table_html(headings, lines):
    head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in headings)
    body = "".join(f'<tr><th scope="row">{html.escape(line[0])}</th>'
                   + "".join(f"<td>{html.escape(cell)}</td>" for cell in line[1:]) + "</tr>\n" for line in lines)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'


def legend(methods):
    entries = [("first", f"{methods[0]['run']}, the first"), ("best", "no other is both cheaper and better"),
               ("other", "others"), ("key best", "the best up to there")]
    spans = "".join(f'<span><i class="{sign}"></i>{html.escape(text)}</span>' for sign, text in entries)
    return f'<div class="legend">{spans}</div>\n'


def plot(title, methods, key, x_label, units):
    """`x_label` has a place for the unit, of which the values decide."""
    unit, size = compare_plot.unit([m[key] for m in methods], units)
    points = [{"name": m["run"], "x": m[key] / size, "y": m["bits_per_byte"],
               "error": m["bits_per_byte_half_width"] or 0,
               "tip": f"{m['run']}: {m['bits_per_byte']:.4f} bits per byte, {m[key] / size:.4g} {unit}"}
              for m in methods]
    drawings = "".join(compare_plot.scatter(points, x_label.format(unit), "bits per byte", width, name)
                       for name, width in (("wide", 1080), ("narrow", 380)))
    bars = "Bars: " + "; ".join(compare_table.errors(methods))
    if len(methods[0]["seeds"]) > 1:
        bars += ". Where a seed moves all runs alike, differences are surer than the bars: “against the first” below"
    return (f"<h2>{html.escape(title)}</h2>\n<figure>\n{legend(methods)}{drawings}"
            f"<figcaption>{html.escape(bars)}.</figcaption></figure>\n")


def render(table):
    methods, rows = table["methods"], table["rows"]
    by_method, by_row = compare_table.method_columns(table), compare_table.columns(table)
    seeds = sorted({row["seed"] for row in rows})
    tokens = [m["tokens"] for m in methods]
    amount = (f"{compare_table.si(tokens[0])} tokens each" if table["equal"] == "tokens"
              else f"as many training FLOPs each as {methods[0]['run']} takes for {compare_table.si(tokens[0])} tokens")
    body = plot("Quality against the work of a token", methods, "flops_per_token", "forward {} per token",
                compare_plot.FLOP_UNITS)
    body += plot("Quality against training time", methods, "train_seconds",
                 "training time of a run with one thread, {}", compare_plot.TIME_UNITS)
    body += "<h2>All figures</h2>\n" + table_html(
        ["run file", *(heading for heading, _ in by_method)],
        [[m["run"], *(text(m) for _, text in by_method)] for m in methods])
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in compare_table.notes(table))
    body += f'<ul class="notes">{notes}</ul>\n'
    body += "<h2>Single runs</h2>\n" + table_html(
        ["row", *(heading for heading, _ in by_row), "config"],
        [[row["name"], *(text(row) for _, text in by_row), row["config_sha256"][:12]] for row in rows])
    commands = "\n\n".join(f"# {row['name']}  config {row['config_sha256'][:12]}\n{row['command']}" for row in rows)
    body += (f"<h2>Commands</h2>\n<details><summary>scripts/repro ROW trains a row again</summary>"
             f"<pre>{html.escape(commands)}</pre></details>\n")
    subtitle = f"{len(methods)} run files, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}, {amount}"
    return PAGE.substitute(title="Detour: ways to route, compared", style=STYLE, subtitle=html.escape(subtitle),
                           body=body)
