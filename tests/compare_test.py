"""scripts/compare and scripts/repro on two tiny run files: the table, going on, and what must fail. Uses DETOUR_BIN."""

import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from detour_e2e import CONFIG, DETOUR, detour, shards

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEQ_LEN, STEPS = 128, 6
STEP_TOKENS = 2 * SEQ_LEN
RUN = f"""seq_len = {SEQ_LEN}
micro_batch_size = 2
global_batch_size = 2
lr = 0.01
warmup_steps = 2
eval_every = 0
eval_tokens = 512
save_every = 0
log_every = 1
"""

sys.path.insert(0, str(ROOT / "bench"))
import compare_plot  # noqa: E402
import compare_table  # noqa: E402


def script(name, *args):
    return subprocess.run([ROOT / "scripts" / name, *map(str, args)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "DETOUR_BIN": DETOUR})


def expect_error(result, *parts):
    assert result.returncode == 1, result
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in line, line


class World:
    """Two run files, and the flags of their comparison."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out"
        (folder / "model.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 2}))
        self.dense = self.run_file("dense", 'method = "dense"')
        self.routed = self.run_file("routed", 'method = "dtrnet"\nlayout = "all"\ntarget_share = 0.3')

    def run_file(self, name, text):
        path = self.folder / f"{name}.toml"
        path.write_text(f'model_config = "{self.folder / "model.json"}"\n{RUN}{text}\n')
        return path

    def flags(self, *flags, out=None):
        return ["--data", shards(), "--out", out or self.out, "--max-tokens", STEPS * STEP_TOKENS - 100,
                "--lengths", "64,256,4096", "--jobs", 1, "--speed-seconds", 0.2, *flags]

    def table(self):
        return json.loads((self.out / "table.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """… after one comparison."""
    world = World(tmp_path_factory.mktemp("compare"))
    result = script("compare", *world.flags(world.dense, world.routed))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith((world.out / "table.md").read_text())
    return world


def test_rows(world):
    rows = world.table()["rows"]
    assert [row["name"] for row in rows] == ["dense-seed42", "dense-seed43", "routed-seed42", "routed-seed43"]
    assert len({row["config_sha256"] for row in rows}) == 4 and len({row["loss"] for row in rows}) == 4
    for row in rows:
        assert row["steps"] == STEPS and row["tokens"] == STEPS * STEP_TOKENS
        assert f"--seed {row['seed']} " in row["command"] and row["command"].startswith("detour train --config ")
        assert re.fullmatch(r"[0-9a-f]{64}", row["config_sha256"]) and row["machine"]
        assert "out_dir" not in row["config"] and str(shards()) not in row["config"]
        stdout, _ = detour("eval", "--model", world.out / row["name"] / "latest", "--data", shards(), "--seq-len",
                           SEQ_LEN, "--json")
        evaluated = json.loads(stdout)
        for key in ("loss", "bits_per_byte", "flops_per_token"):
            assert row[key] == pytest.approx(evaluated[key], rel=1e-12)
        assert row["train_tokens_per_s"] > 0 and row["train_seconds"] > 0
        assert all(row[f"{what}_peak_rss_bytes"] > 10e6 for what in ("train", "eval", "decode"))
        assert [at["length"] for at in row["lengths"]] == [64, 256, 624]  # the context, of 640, ends before 4096
        assert all(at["decode_tokens_per_s"] > 0 for at in row["lengths"])
        assert row["lengths"][1]["kv_bytes"] > row["lengths"][0]["kv_bytes"]
    dense, routed = rows[0], rows[2]
    assert dense["share_routed"] is None and 0 <= routed["share_routed"] < 1
    assert dense["flops_per_token"] == rows[1]["flops_per_token"] > 0
    assert routed["lengths"][1]["kv_bytes"] < dense["lengths"][1]["kv_bytes"]


def test_figures_over_seeds(world):
    table = world.table()
    for method in table["methods"]:
        rows = [row for row in table["rows"] if row["run"] == method["run"]]
        a, b = (row["bits_per_byte"] for row in rows)
        assert method["bits_per_byte"] == pytest.approx((a + b) / 2)
        assert method["interval"] == "t95"
        assert method["bits_per_byte_half_width"] == pytest.approx(12.706 * abs(a - b) / 2)
        assert method["lengths"][0]["kv_bytes"] == sum(row["lengths"][0]["kv_bytes"] for row in rows) / 2
    firsts, seconds = ([row["bits_per_byte"] for row in table["rows"] if row["run"] == run]
                       for run in ("dense", "routed"))
    ratios = [second / first - 1 for first, second in zip(firsts, seconds)]
    assert table["methods"][1]["against_first"] == pytest.approx(sum(ratios) / 2)
    assert table["methods"][0]["against_first"] == 0


def test_page(world):
    page = (world.out / "compare.html").read_text()
    assert not re.search(r"<script|src=|href=|url\(|@import", page)
    for row in world.table()["rows"]:
        assert row["name"] in page
    assert page.count("<svg") == 4 and page.count("<title>dense: ") == 4
    assert "nan" not in page and page.count("<svg") == page.count("</svg>")


def test_second_call_repeats_nothing(world):
    before = {path: path.stat().st_mtime_ns for path in world.out.rglob("*") if path.is_file()}
    table = world.table()
    result = script("compare", *world.flags(world.dense, world.routed))
    assert result.returncode == 0, result.stderr
    assert world.table() == table and "training" not in result.stderr
    written = {"table.json", "table.md", "compare.html"} | {f"{row['name']}.json" for row in table["rows"]}
    assert {path.name for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns} <= written


def test_goes_on_after_a_signal(world, tmp_path):
    """An interrupted comparison saves; the next call ends with the loss of one that never stopped."""
    flags = world.flags(world.routed, "--seeds", "42", "--max-tokens", 40 * STEP_TOKENS, out=tmp_path / "out")
    process = subprocess.Popen([ROOT / "scripts" / "compare", *map(str, flags)], stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, env={**os.environ, "DETOUR_BIN": DETOUR})
    run = tmp_path / "out" / "routed-seed42"
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopping: routed-seed42" in stderr
    assert json.loads((run / "summary.json").read_text())["stopped_by"] == "signal"
    step = json.loads((run / "latest" / "trainer_state.json").read_text())["step"]
    assert 3 <= step < 40

    assert script("compare", *flags).returncode == 0
    assert f"at step {step}" in (tmp_path / "out" / "routed-seed42.log").read_text()
    row = json.loads((tmp_path / "out" / "table.json").read_text())["rows"][0]
    again = script("repro", row["name"], "--table", tmp_path / "out" / "table.json")
    assert again.returncode == 0 and "relative difference 0.0e+00" in again.stdout, again
    assert "one seed" in (tmp_path / "out" / "table.md").read_text()


def test_repro(world, tmp_path):
    table = world.out / "table.json"
    result = script("repro", "routed-seed43", "--table", table, "--out", tmp_path / "again")
    assert result.returncode == 0 and "routed-seed43: reproduced" in result.stdout, result
    assert (tmp_path / "again" / "latest" / "model.safetensors").is_file()
    expect_error(script("repro", "routed-seed43", "--table", table, "--out", tmp_path / "again"), "fresh folder")
    expect_error(script("repro", "none", "--table", table), "no row none", "dense-seed42")
    expect_error(script("repro", "x", "--table", tmp_path / "none.json"), "none.json")


@pytest.mark.parametrize("key, says", [
    ("loss", "the validation loss differs by"), ("config_sha256", "the configuration"),
    ("model_sha256", "the model config"), ("data_sha256", "the data")])
def test_repro_fails_if_the_record_is_altered(world, tmp_path, key, says):
    table = world.table()
    row = table["rows"][0]
    row[key] = row[key] * (1 + 3e-6) if key == "loss" else "0" * 64
    (tmp_path / "table.json").write_text(json.dumps(table))
    expect_error(script("repro", row["name"], "--table", tmp_path / "table.json"), f"{row['name']}: {says}")


def test_repro_fails_if_the_run_file_is_altered(tmp_path, world):
    table, moved = world.table(), tmp_path / "dense.toml"
    moved.write_text(world.dense.read_text().replace("lr = 0.01", "lr = 0.02"))
    row = table["rows"][0]
    row["command"] = row["command"].replace(str(world.dense), str(moved))
    (tmp_path / "table.json").write_text(json.dumps(table))
    expect_error(script("repro", row["name"], "--table", tmp_path / "table.json"), "(lr = 0.01, now lr = 0.02)")


def test_dry_run(world, tmp_path):
    result = script("compare", *world.flags(world.dense, "--dry-run", out=tmp_path / "out"))
    assert result.returncode == 0 and not (tmp_path / "out").exists()
    assert f"dense-seed42: {STEPS} steps, {STEPS * STEP_TOKENS:,} tokens, new\n  detour train " in result.stdout
    assert "dense-seed43" in result.stdout
    result = script("compare", *world.flags(world.dense, "--dry-run"))
    assert "tokens, done\n" in result.stdout


def test_equal_flops(world, tmp_path):
    """The cheaper run gets more tokens, as many as make three forward passes at its pilot's share equal."""
    flags = world.flags(world.dense, world.routed, "--equal-flops", "--seeds", "42", "--max-tokens", 12 * STEP_TOKENS,
                        out=tmp_path / "out")
    assert script("compare", *flags, "--dry-run").returncode == 0 and not (tmp_path / "out").exists()
    assert script("compare", *flags).returncode == 0
    dense, routed = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    pilot = next((tmp_path / "out" / "pilots").glob("routed-*/metrics.jsonl")).read_text()
    shares = [record["share"] for record in map(json.loads, pilot.splitlines()) if "share" in record]
    stdout, _ = detour("info", tmp_path / "out" / "routed-seed42" / "latest", "--json", "--seq-len", SEQ_LEN, "--share",
                       sum(shares) / len(shares))
    at = json.loads(stdout)["lengths"][0]
    assert dense["steps"] == 12
    assert routed["steps"] == round(12 * at["dense_flops_per_token_causal"] / at["flops_per_token_causal"]) > 12


def test_bad_input(world, tmp_path):
    out = tmp_path / "out"
    wrong = world.run_file("wrong", "max_step = 3")
    (tmp_path / "dense.toml").write_text(world.dense.read_text())
    expect_error(script("compare", *world.flags(tmp_path / "none.toml", out=out)), "none.toml: no such run file")
    expect_error(script("compare", *world.flags(wrong, out=out)), f"{wrong}:11", "unknown key", '"max_steps"')
    expect_error(script("compare", *world.flags(world.run_file("model", 'method = "dens"'), out=out)), "dens")
    expect_error(script("compare", *world.flags(world.dense, tmp_path / "dense.toml", out=out)), "called dense")
    expect_error(script("compare", *world.flags(world.dense, "--data", tmp_path, out=out)), "no shards", "--data")
    expect_error(script("compare", *world.flags(world.dense, "--seeds", "1,1", out=out)), "--seeds")
    expect_error(script("compare", *world.flags(world.dense, "--jobs", "0", out=out)), "--jobs")
    expect_error(script("compare", "--data", shards()), "RUN.toml")
    assert not out.exists()
    # The folder holds other runs.
    expect_error(script("compare", *world.flags(world.dense, "--max-tokens", 2 * STEP_TOKENS)),
                 "dense-seed42 was trained with another config (max_steps = 6, now max_steps = 2)")


def test_a_failed_run_leaves_the_others(world, tmp_path):
    short = json.dumps({**CONFIG, "num_hidden_layers": 2, "max_position_embeddings": SEQ_LEN // 2})
    (tmp_path / "short.json").write_text(short)
    failing = tmp_path / "failing.toml"
    failing.write_text(f'model_config = "{tmp_path / "short.json"}"\nmethod = "dense"\n{RUN}')
    result = script("compare", *world.flags(failing, world.dense, "--seeds", "42", out=tmp_path / "out"))
    expect_error(result, "1 of 2 runs failed")
    assert "failing-seed42 failed: " in result.stderr and "max_position_embeddings" in result.stderr
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense-seed42"]


def test_student_quantiles():
    """Against the integral of the density, by Simpson's rule. Three decimals: the quantile is off by 5e-4 at
    most, and the integral by that times the density there."""
    for n in (1, 2, 5, 10, 11, 20, 100):
        def density(x):
            return math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n * math.pi) \
                * (1 + x * x / n) ** (-(n + 1) / 2)

        t = compare_table.t_975(n)
        points = [t * i / 2000 for i in range(2001)]
        area = t / 6000 * sum(density(x) * (1 if x in (0, t) else 4 if i % 2 else 2) for i, x in enumerate(points))
        assert abs(area - 0.475) <= 5.1e-4 * density(t)


def test_labels_keep_clear():
    """Points on a line closer than a label is wide: no label covers another or leaves the frame."""
    drawn = [(100.0 + 40 * i, 200.0, 190.0, 210.0, f"method-number-{i}") for i in range(8)]
    frame = (50, 30, 1000, 400)
    boxes = [place[4] for place in compare_plot.place_labels(drawn, frame).values()]
    for i, box in enumerate(boxes):
        assert compare_plot.overlap(box, frame) == pytest.approx((box[2] - box[0]) * (box[3] - box[1]))
        assert all(compare_plot.overlap(box, other) == 0 for other in boxes[:i])
