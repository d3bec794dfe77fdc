#!/usr/bin/env python3
"""Trains one row of a comparison again from its recorded command, and checks that it is the same run.

Started by scripts/repro, which says more. Before training, the configuration, the model config and the data must have
their recorded hashes; after it, the validation loss its recorded value within 1e-6.
"""
import argparse
import json
import os
import pathlib
import shlex
import sys
import tempfile

import compare
from compare import die

TOLERANCE = 1e-6  # of the validation loss, relative


def find_row(path, name):
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["name"]: row for row in table["rows"]}
    except OSError as error:
        die(f"{path}: {error.strerror}; scripts/compare writes it")
    except (ValueError, KeyError, TypeError):
        die(f"{path}: not a table of scripts/compare")
    if name not in rows:
        die(f"{path} has no row {name}; it has {', '.join(rows)}")
    return rows[name]


def moved(command, **places):
    """The command with other values of the flags named."""
    for flag, value in places.items():
        command[command.index("--" + flag.replace("_", "-")) + 1] = str(value)
    return command


def check_hashes(program, row, run):
    now = compare.hashes(program, run["command"], run["data"])
    for key, what in (("config_sha256", "configuration"), ("model_sha256", "model config"), ("data_sha256", "data")):
        same = compare.same_config(program, row, now) if key == "config_sha256" else now[key] == row[key]
        print(f"{what}: {row[key][:16]} recorded, {now[key][:16]} now, {'equal' if same else 'DIFFERENT'}",
              flush=True)
        if not same:
            line = compare.difference(row, now) if key == "config_sha256" else ""
            die(f"{row['name']}: the {what} is not the recorded one{line}")
    return now


def again(program, row, data, out):
    command = shlex.split(row["command"])
    data = data or command[command.index("--data") + 1]
    run = {"name": row["name"], "out": str(out), "steps": row["steps"], "tokens": row["tokens"], "data": data,
           "command": moved(command, data=data, out_dir=out)}
    run |= check_hashes(program, row, run)
    out.parent.mkdir(parents=True, exist_ok=True)
    compare.train(program, [run], 1)
    if not compare.trained(run):
        die(f"{row['name']}: training failed: {compare.last_line(run)}")
    compare.evaluate(program, data, [run], 1)
    if "eval" not in run:
        die(f"{row['name']}: evaluation failed: {compare.last_line(run)}")
    return run["eval"]


def check_loss(row, evaluated):
    error = abs(evaluated["loss"] - row["loss"]) / abs(row["loss"])
    print(f"validation loss: {row['loss']:.9f} recorded, {evaluated['loss']:.9f} now, relative difference {error:.1e}")
    print(f"bits per byte: {row['bits_per_byte']:.9f} recorded, {evaluated['bits_per_byte']:.9f} now")
    if not error <= TOLERANCE:
        die(f"{row['name']}: the validation loss differs by {error:.1e}, more than {TOLERANCE:.0e}")


def main():
    parser = argparse.ArgumentParser(prog="repro", description=__doc__.splitlines()[0])
    parser.error = die
    parser.add_argument("row")
    parser.add_argument("--detour", default=os.environ.get("DETOUR_BIN", "build/release/detour"))
    parser.add_argument("--table", type=pathlib.Path, default=pathlib.Path("out/compare/table.json"))
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--data")
    args = parser.parse_args()
    row = find_row(args.table, args.row)
    for key, now in (("commit", compare.commit()), ("machine", compare.machine())):
        if row[key] != now:
            print(f"{key}: {row[key]} recorded, {now} now")
    if args.out and args.out.exists():
        die(f"{args.out} exists; the run must start in a fresh folder")
    with tempfile.TemporaryDirectory() as folder:
        check_loss(row, again(args.detour, row, args.data, args.out or pathlib.Path(folder) / "run"))
    print(f"{row['name']}: reproduced")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
