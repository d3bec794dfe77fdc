#!/usr/bin/env python3
"""Trains a set of run files at equal tokens or equal FLOPs over several seeds, and writes one table and one page.

Started by scripts/compare, which says more. A run is a run file with a seed; it has in the output folder NAME/ (what
`detour train` writes), NAME.log, and NAME.json: its command, configuration, hashes, and what was measured so far. So a
second call goes on where the first ended. All trainings come first, then, one at a time on the quiet machine, their
speed, then the evaluations, then, one at a time again, cache and decoding.
"""
import argparse
import hashlib
import json
import os
import pathlib
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import tomllib

import compare_page
import compare_table
import jobs

PILOT_STEPS = 20  # of the run that says which share of tokens a routed model trains with
BACKWARD_AND_FORWARD = 3  # training FLOPs over those of the forward pass
NOT_HASHED = ("data", "out_dir")


def die(message):
    sys.exit("error: " + " ".join(str(message).split()))


def call(program, *args):
    """Standard output of the program, or its one-line error as ours."""
    try:
        result = subprocess.run([program, *args], capture_output=True, text=True, errors="replace")
    except OSError as error:
        die(f"{program}: {error.strerror}")
    if result.returncode != 0:
        die((result.stderr.splitlines() or [f"{program} {args[0]} failed"])[-1].removeprefix("detour: error: "))
    return result.stdout


def write(path, text):
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def sha256(*paths):
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(pathlib.Path(path).read_bytes())
        except OSError as error:
            die(f"{path}: {error.strerror}")
    return digest.hexdigest()


def data_hash(data):
    manifest = pathlib.Path(data) / "manifest.json"
    if not manifest.is_file():
        die(f"{data}: no shards (no manifest.json); scripts/demo makes some in out/demo/data, or give --data DIR")
    return sha256(manifest)


def resolve(program, command):
    """The run's configuration as text, one `key = value` a line, without the keys that say where it is."""
    text = call(program, *command[1:], "--print-config")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return "".join(f"{line}\n" for line in lines if line.split(" = ")[0] not in NOT_HASHED)


def hashes(program, command, data):
    """What a run is made from: its configuration, the config (or the weights) of the model it starts from, the data."""
    config = resolve(program, command)
    values = tomllib.loads(config)
    start = pathlib.Path(values.get("init_from") or values.get("model_config") or die("no model_config, no init_from"))
    files = sorted(start.glob("*.json")) + sorted(start.glob("*.safetensors")) if start.is_dir() else [start]
    return {"config": config, "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
            "model_sha256": sha256(*files), "data_sha256": data_hash(data)}


def machine():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def commit():
    """The checkout's commit, with + for changes since; None outside git."""
    def git(*args):
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def train_command(path, data, seed, steps, out):
    return ["detour", "train", "--config", str(path), "--data", str(data), "--seed", str(seed),
            "--max-steps", str(steps), "--max-time", "0", "--threads", "1", "--out-dir", str(out), "--resume", "auto"]


def training_job(program, run):
    """The job that trains a run, with its progress in tokens, from the end of metrics.jsonl."""
    metrics, per_step = pathlib.Path(run["out"]) / "metrics.jsonl", run["tokens"] // run["steps"]

    def progress():
        try:
            with open(metrics, "rb") as file:
                file.seek(max(0, metrics.stat().st_size - 4096))
                steps = re.findall(rb'"step":(\d+)', file.read())
        except OSError:
            return 0
        return int(steps[-1]) * per_step if steps else 0

    return {"name": run["name"], "command": [program, *run["command"][1:]], "log": f"{run['out']}.log",
            "total": run["tokens"], "progress": progress}


def trained(run):
    """The run's summary if it came to its end."""
    path = pathlib.Path(run["out"]) / "summary.json"
    if not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    return summary if summary["stopped_by"] == "done" and summary["steps"] == run["steps"] else None


def tokens_per_step(program, path, data):
    """… of a run file, which is checked as a whole here; and its configuration."""
    if not path.is_file():
        die(f"{path}: no such run file")
    command = train_command(path, data, 0, 1, "unused")
    config = tomllib.loads(resolve(program, command))
    call(program, *command[1:], "--dry-run")
    return config["global_batch_size"] * config["seq_len"], config


def pilot_run(program, args, path, per_step, config):
    """A short run of a run file. Schedules go by the part of a run that is done, so it goes through them all."""
    def command(out):
        return train_command(path, args.data, args.seeds[0], PILOT_STEPS, out) + [
            "--log-every", "1", "--eval-every", "0", "--eval-tokens", str(config["seq_len"]), "--save-every", "0"]

    made_from = json.dumps(hashes(program, command("unused"), args.data))
    out = args.out / "pilots" / f"{path.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"
    return {"name": f"pilot-{path.stem}", "out": str(out), "steps": PILOT_STEPS, "tokens": PILOT_STEPS * per_step,
            "command": command(out), "seq_len": config["seq_len"]}


def training_flops(program, pilot):
    """Per token: three times the forward pass at the mean share of tokens that the pilot run routed."""
    metrics = pathlib.Path(pilot["out"], "metrics.jsonl").read_text(encoding="utf-8")
    shares = [record["share"] for record in map(json.loads, metrics.splitlines()) if "share" in record]
    info = json.loads(call(program, "info", f"{pilot['out']}/latest", "--json", "--seq-len", str(pilot["seq_len"]),
                           "--share", str(sum(shares) / len(shares) if shares else 1)))
    return BACKWARD_AND_FORWARD * info["lengths"][0]["flops_per_token_causal"]


def equal_flops(program, args, checked):
    """Training FLOPs per token of each run file, by pilot runs. None in a dry run before these are done."""
    pilots = [pilot_run(program, args, path, *found) for path, found in zip(args.runs, checked)]
    if args.dry_run and not all(map(trained, pilots)):
        return [None] * len(pilots)
    (args.out / "pilots").mkdir(parents=True, exist_ok=True)
    train(program, pilots, args.jobs)
    for pilot in pilots:
        if not trained(pilot):
            die(f"{pilot['name']} failed: {last_line(pilot)}")
    return [training_flops(program, pilot) for pilot in pilots]


def plan(program, args):
    """All runs, file by file and seed by seed, with everything that is known before training."""
    names = [path.stem for path in args.runs]
    for name in names:
        if names.count(name) > 1:
            die(f"two run files are called {name}; a run is named by its file")
        if not re.fullmatch(r"[\w.-]+", name):
            die(f"{name}.toml: a run file's name may have letters, digits, '.', '_' and '-'")
    data_hash(args.data)
    checked = [tokens_per_step(program, path, args.data) for path in args.runs]
    common = {"machine": machine(), "commit": commit(), "version": call(program, "--version").strip()}
    costs = equal_flops(program, args, checked) if args.equal_flops else [None] * len(checked)
    runs = []
    for path, (per_step, _), flops in zip(args.runs, checked, costs):
        steps = -(-args.max_tokens // per_step)
        if args.equal_flops and runs:
            steps = max(1, round(runs[0]["tokens"] * costs[0] / (flops * per_step))) if flops else None
        for seed in args.seeds:
            name = f"{path.stem}-seed{seed}"
            run = {"name": name, "run": path.stem, "seed": seed, "out": str(args.out / name), "steps": steps, **common}
            if steps:
                run |= {"tokens": steps * per_step, "train_flops_per_token": flops,
                        "command": train_command(path, args.data, seed, steps, run["out"])}
                run |= hashes(program, run["command"], args.data)
            runs.append(run)
    return runs


def same_config(program, old, new):
    """Whether two recorded configurations are one. A key that the program did not know then may have its default."""
    if hashlib.sha256(old["config"].encode()).hexdigest() != old["config_sha256"]:
        return False
    known = {line.split(" = ")[0] for line in old["config"].splitlines()}
    defaults = resolve(program, [program, "train", "--data", "x", "--out-dir", "y"]).splitlines()
    lines = [line for line in new["config"].splitlines() if line.split(" = ")[0] in known or line not in defaults]
    return lines == old["config"].splitlines()


def recorded(program, run):
    """The run with what an earlier call wrote of it; an error if that was another run."""
    path, folder = pathlib.Path(f"{run['out']}.json"), pathlib.Path(run["out"])
    if not path.is_file():
        if folder.exists():
            die(f"{folder} is in the way: nothing says what it was made from. Remove it, or give another --out")
        return run
    old = json.loads(path.read_text(encoding="utf-8"))
    for key in ("config_sha256", "model_sha256", "data_sha256"):
        if not (same_config(program, old, run) if key == "config_sha256" else old[key] == run[key]):
            part = key.removesuffix("_sha256")
            die(f"{folder} was trained with another {part}{difference(old, run)}. Remove it and {path.name}, or give "
                "another --out")
    if trained(run):
        run = {**run, "commit": old["commit"], "version": old["version"], "machine": old["machine"]}
    elif (folder / "latest").exists() and run["commit"] != old["commit"]:
        run = {**run, "commit": f"{old['commit']}, {run['commit']}"}
    return {**old, **run}


def difference(old, new):
    """The first line in which two recorded configurations differ, in brackets."""
    pairs = zip(old["config"].splitlines(), new["config"].splitlines())
    return next((f" ({a}, now {b})" for a, b in pairs if a != b), "")


def save(run):
    write(pathlib.Path(f"{run['out']}.json"), json.dumps(run, indent=2, ensure_ascii=False) + "\n")


def last_line(run):
    path = pathlib.Path(f"{run['out']}.log")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.removeprefix("detour: error: ") for line in reversed(lines) if line), "no output")


def train(program, runs, at_once):
    jobs.run("training", [training_job(program, run) for run in runs if not trained(run)], at_once)


def evaluate(program, data, runs, at_once, keep=lambda run: None):
    """Adds `eval` to the runs, what `detour eval` says of the whole validation split, and hands each to `keep`."""
    def after(run):
        def take(job):
            if job["code"] == 0:
                run["eval"] = json.loads(pathlib.Path(job["stdout"]).read_text(encoding="utf-8"))
                keep(run)
        return take

    with tempfile.TemporaryDirectory() as folder:
        todo = []
        for run in runs:
            config = tomllib.loads(run["config"])
            command = [program, "eval", "--model", f"{run['out']}/latest", "--data", str(data), "--seq-len",
                       str(config["seq_len"]), "--threads", "1", "--json"]
            if not config["document_attention"]:
                command.append("--no-document-attention")
            todo.append({"name": run["name"], "command": command, "log": f"{run['out']}.log",
                         "stdout": f"{folder}/{run['name']}", "after": after(run)})
        jobs.run("evaluation", todo, at_once)


def time_training(program, runs, seconds, keep):
    """Adds `train_tokens_per_s`: the median step of some seconds of training from each run's end on, one run at a time,
    so that what else the machine did while the run was trained is no part of it."""
    def after(run, folder):
        def take(job):
            path = folder / "metrics.jsonl"
            if job["code"] == 0 and path.is_file():
                records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
                steps = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
                run["train_tokens_per_s"] = statistics.median(steps[1:] or steps)
                keep(run)
        return take

    with tempfile.TemporaryDirectory() as folder:
        todo = []
        for run in runs:
            out, seq_len = pathlib.Path(folder, run["name"]), str(tomllib.loads(run["config"])["seq_len"])
            command = replaced(run["command"], {"--max-steps": str(2 * run["steps"] + 1000), "--out-dir": str(out),
                                                "--resume": f"{run['out']}/latest", "--max-time": str(seconds)})
            command += ["--log-every", "1", "--eval-every", "0", "--save-every", "0", "--eval-tokens", seq_len]
            todo.append({"name": run["name"], "command": [program, *command[1:]], "log": f"{run['out']}.log",
                         "after": after(run, out)})
        jobs.run("training speed", todo, 1)


def replaced(command, values):
    """The command with other values of some flags."""
    command = list(command)
    for flag, value in values.items():
        command[command.index(flag) + 1] = value
    return command


def measure(program, data, runs, lengths, keep):
    """Likewise `report`: cache and decoding, one run at a time; and the peak memory of the process that did it."""
    def after(run, path):
        def take(job):
            if job["code"] == 0:
                run["report"] = json.loads(path.read_text(encoding="utf-8"))[0]
                run["report"] |= {"peak_rss_bytes": job["peak_rss_bytes"], "asked": lengths}
                keep(run)
        return take

    with tempfile.TemporaryDirectory() as folder:
        todo = []
        for run in runs:
            path, seq_len = pathlib.Path(folder, run["name"]), str(tomllib.loads(run["config"])["seq_len"])
            command = [program, "report", "--run", f"{run['name']}={run['out']}", "--data", str(data),
                       "--lengths", lengths, "--seq-len", seq_len, "--eval-tokens", seq_len, "--sample-tokens", "1",
                       "--threads", "1", "--json", str(path)]
            todo.append({"name": run["name"], "command": command, "log": f"{run['out']}.log", "stdout": os.devnull,
                         "after": after(run, path)})
        jobs.run("cache and decoding", todo, 1)


def carry_out(program, args, runs):
    """Trains, evaluates and measures what is not done yet; returns the runs that came through."""
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [recorded(args.detour, run) for run in runs]
    for run in runs:
        save(run)
    train(program, runs, args.jobs)
    good = [run for run in runs if trained(run)]
    time_training(program, [run for run in good if "train_tokens_per_s" not in run],
                  args.speed_seconds, save)
    good = [run for run in good if "train_tokens_per_s" in run]
    evaluate(program, args.data, [run for run in good if "eval" not in run], args.jobs, save)

    def measured(run):
        return run.get("report", {}).get("asked") == args.lengths

    measure(program, args.data, [run for run in good if "eval" in run and not measured(run)], args.lengths, save)
    good = [run for run in good if "eval" in run and measured(run)]
    for run in runs:
        if run not in good:
            print(f"{run['name']} failed: {last_line(run)}", file=sys.stderr)
    return good


def show_plan(runs):
    for run in runs:
        state = "done" if trained(run) else "to go on" if pathlib.Path(run["out"], "latest").exists() else "new"
        print(f"{run['name']}: {run['steps']} steps, {run['tokens']:,} tokens, {state}\n  {shlex.join(run['command'])}"
              if run["steps"] else f"{run['name']}: as many steps as a pilot run will say")


def parse(argv):
    def seeds(text):
        values = [int(word) for word in text.split(",")]
        if len(set(values)) < len(values) or min(values) < 0:
            raise ValueError
        return values

    def positive(text):
        if int(text) < 1:
            raise ValueError
        return int(text)

    def lengths(text):
        return ",".join(str(positive(word)) for word in text.split(","))

    parser = argparse.ArgumentParser(prog="compare", description=__doc__.splitlines()[0])
    parser.error = die
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN.toml")
    parser.add_argument("--detour", default=os.environ.get("DETOUR_BIN", "build/release/detour"))
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("out/demo/data"))
    parser.add_argument("--seeds", type=seeds, default=[42, 43])
    parser.add_argument("--max-tokens", type=positive, default=2_000_000)
    parser.add_argument("--equal-flops", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/compare"))
    parser.add_argument("--jobs", type=positive, default=2)
    parser.add_argument("--speed-seconds", type=float, default=10)
    parser.add_argument("--lengths", type=lengths, default="1024,8192")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args(argv)


def main():
    args = parse(sys.argv[1:])
    runs = plan(args.detour, args)
    if args.dry_run:
        return show_plan(runs)
    good = carry_out(args.detour, args, runs)
    if not good:
        die("no run came through")
    table = compare_table.make(good, equal="FLOPs" if args.equal_flops else "tokens", jobs=args.jobs)
    write(args.out / "table.json", json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    text = compare_table.markdown(table)
    write(args.out / "table.md", text)
    write(args.out / "compare.html", compare_page.render(table))
    print(f"{text}\n{args.out}/compare.html")
    if len(good) < len(runs):
        die(f"{len(runs) - len(good)} of {len(runs)} runs failed; they are not in the table")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
