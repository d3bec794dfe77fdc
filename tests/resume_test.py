"""A run that was stopped and continued is the run that never stopped, to the bit. Uses DETOUR_BIN."""
import json
import os
import random
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from robust_fixtures import (checkpoints, error_line, model, ok, records, run, start, wait_for_step,  # noqa: F401
                             weights, world)

STEPS = 40
RUNS = {
    "dense": ["--method", "dense"],
    "dtrnet": ["--target-share", 0.3],
    "dtrnet_recompute": ["--target-share", 0.3, "--activation-checkpointing"],
    "dtrnet_accumulate": ["--target-share", 0.3, "--micro-batch-size", 1, "--global-batch-size", 4],
    "dtrnet_aux_wsd": ["--aux-loss-coeff", 0.01, "--lr-schedule", "wsd", "--seed", 7],
    "dtrnet_constraint": ["--routing", "budget=compute", "--routing", "dual_rate=1.0", "--routing", "budget_target=0.3"],
    "dtrnet_frequency": ["--routing", "decider=frequency", "--routing", "share=0.3"],
    "mod": ["--method", "mod", "--target-share", 0.125, "--schedule", "capacity: 1->0.125 cosine 0..0.5"],
    "dllm": ["--method", "dllm", "--routing", "hidden=16", "--schedule", "aux_loss_coeff: 0->5 sine"],
    "moe_bias": ["--method", "moe", "--routing", "experts=4", "--routing", "bias_rate=0.01", "--routing", "jitter=0.01"],
    "skip": ["--method", "skip", "--schedule", "temperature: 5->1 linear", "--schedule", "target_share: 1->0.4 linear"],
    "recursion": ["--method", "recursion", "--layout", "all", "--target-share", 1, "--micro-batch-size", 1,
                  "--global-batch-size", 4],
    "recursion_token": ["--method", "recursion", "--layout", "1,2", "--routing", "recursions=2", "--routing",
                        "choice=token", "--activation-checkpointing"],
    "dtrnet_router": ["--target-share", 0.3, "--train", "router"],
    "dtrnet_integral": ["--target-share", 0.3, "--controller-integral", 0.25, "--routing", "estimator=ste"],
    "dllm_lora": ["--method", "dllm", "--routing", "hidden=16", "--train", "router+lora", "--lora-rank", 4,
                  "--lr", 0.01],
    "dllm_lora_recompute": ["--method", "dllm", "--routing", "hidden=16", "--train", "router+lora", "--lora-rank", 4,
                            "--lr", 0.01, "--activation-checkpointing"],
    "early_exit": ["--method", "early_exit", "--routing", "max_dropout=0.5"],
}


@pytest.fixture(scope="module")
def uninterrupted(world):
    """Each kind of run, done in one go, once."""
    done = {}

    def get(kind):
        if kind not in done:
            out = world.root / f"whole_{kind}"
            ok(*world.train_args(out, "--max-steps", STEPS, *RUNS[kind]))
            done[kind] = out
        return done[kind]

    return get


@pytest.mark.parametrize("kind", RUNS)
def test_signals_and_resume(world, uninterrupted, tmp_path, kind):
    whole = uninterrupted(kind)
    args = world.train_args(tmp_path, "--max-steps", STEPS, "--resume", "auto", *RUNS[kind])
    rng = random.Random(kind)
    stops = []
    for number in [signal.SIGINT, signal.SIGTERM]:
        process = start(args)
        last = stops[-1] if stops else 0
        wait_for_step(process, tmp_path, last + rng.randint(1, 10))
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == 0, stderr
        if stdout.startswith("signal"):
            state = json.loads((tmp_path / "latest" / "trainer_state.json").read_text())
            stops.append(state["step"])
    assert stops and all(0 < step < STEPS for step in stops)
    result = ok(*args)
    assert f"resuming {tmp_path}/step-{stops[-1]:08} at step {stops[-1]}" in result.stderr
    assert weights(tmp_path) == weights(whole)
    assert records(tmp_path) == records(whole)


def test_a_config_kept_in_the_checkpoint(world, uninterrupted):
    state = json.loads((uninterrupted("dtrnet") / "latest" / "trainer_state.json").read_text())
    assert (state["step"], state["config"]["target_share"]) == (STEPS, 0.3)
    assert state["config"]["max_steps"] == STEPS


@pytest.mark.parametrize("kind", ["dtrnet", "dllm_lora"])
def test_activation_checkpointing_changes_no_bit(uninterrupted, kind):
    assert weights(uninterrupted(kind)) == weights(uninterrupted(f"{kind}_recompute"))
    assert records(uninterrupted(kind)) == records(uninterrupted(f"{kind}_recompute"))


@pytest.mark.parametrize("kind", ["dense", "dtrnet", "moe_bias"])
def test_threads_change_no_bit(world, tmp_path, kind):
    runs = [tmp_path / f"threads_{n}" for n in (1, 2)]
    for n, out in enumerate(runs, start=1):
        ok(*world.train_args(out, "--max-steps", 10, *RUNS[kind], "--threads", n))
    assert weights(runs[0]) == weights(runs[1])
    assert records(runs[0]) == records(runs[1])


def test_saving_and_validating_more_often_changes_no_bit(world, uninterrupted, tmp_path):
    ok(*world.train_args(tmp_path, "--max-steps", STEPS, "--save-every", 13, "--eval-every", 7, *RUNS["dtrnet"]))
    assert weights(tmp_path) == weights(uninterrupted("dtrnet"))


def test_resume_of_a_finished_run_changes_nothing(world, tmp_path):
    args = world.train_args(tmp_path, "--max-steps", 4)
    ok(*args)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    ok(*args, "--resume", "auto")
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert set(after) == set(files)
    for path in files:
        if path.name == "summary.json":
            old, new = json.loads(files[path]), json.loads(after[path])
            for key in ("steps", "tokens", "val_loss", "val_bits_per_byte", "val_share"):
                assert new[key] == old[key], key
        else:
            assert after[path] == files[path], path


def test_resume_from_a_named_checkpoint(world, uninterrupted, tmp_path):
    ok(*world.train_args(tmp_path / "a", "--max-steps", STEPS, "--save-every", 20, "--keep-last", 9,
                         *RUNS["dtrnet"]))
    ok(*world.train_args(tmp_path / "b", "--max-steps", STEPS, "--resume", tmp_path / "a" / "step-00000020",
                         *RUNS["dtrnet"]))
    assert weights(tmp_path / "b") == weights(uninterrupted("dtrnet"))
    assert records(tmp_path / "b") == [r for r in records(uninterrupted("dtrnet")) if r["step"] > 20]


@pytest.mark.parametrize("keep,left", [(1, [9]), (2, [8, 9]), (3, [6, 8, 9])])
def test_keep_last(world, tmp_path, keep, left):
    ok(*world.train_args(tmp_path, "--max-steps", 9, "--save-every", 2, "--keep-last", keep))
    assert checkpoints(tmp_path) == [f"step-{step:08}" for step in left]
    assert os.readlink(tmp_path / "latest") == "step-00000009"
    assert not [p.name for p in tmp_path.rglob(".*")]


def test_checkpoints_are_not_overwritten(world, tmp_path):
    args = world.train_args(tmp_path, "--max-steps", 2)
    ok(*args)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    result = run(*args)
    error_line(result, "already holds checkpoints", "--resume auto")
    assert (result.stdout, len(result.stderr.splitlines())) == ("", 1)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_metrics_and_tensorboard(world, uninterrupted, tmp_path):
    """The event files of an interrupted and continued run hold each step once, with the values of the log."""
    args = world.train_args(tmp_path, "--max-steps", STEPS, "--resume", "auto", "--tensorboard", tmp_path / "tb",
                            *RUNS["dtrnet"])
    process = start(args)
    wait_for_step(process, tmp_path, 11)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    ok(*args)
    steps = [r for r in records(tmp_path) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert records(tmp_path) == records(uninterrupted("dtrnet"))
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    tags = {"train/loss": "loss", "train/grad_norm": "grad_norm", "train/lr": "lr", "routing/share": "share"}
    for tag, field in tags.items():
        scalars = events.Scalars(tag)
        assert [s.step for s in scalars] == list(range(1, STEPS + 1))
        for scalar, record in zip(scalars, steps):
            assert scalar.value == pytest.approx(record[field], rel=1e-6)
    assert [s.step for s in events.Scalars("val/loss")] == list(range(10, STEPS + 1, 10))
