"""Killed at any moment, out of disk, or refused by the disk: the last checkpoint stays whole. Uses DETOUR_BIN;
DETOUR_KILLS sets the number of kills."""
import json
import os
import random
import shutil
import subprocess
import time

import pytest

from robust_fixtures import (checkpoints, error_line, ok, records, run, start, wait_for_step,  # noqa: F401
                             weights, world)

KILLS = int(os.environ.get("DETOUR_KILLS", 20))
WHOLE = {"config.json", "model.safetensors", "optimizer.safetensors", "trainer_state.json", "tokenizer.json"}
STEPS = 100_000  # never reached: the learning rate, a function of the run's length, must stay the same


def saving(world, out, save_every=1):
    return world.train_args(out, "--max-steps", STEPS, "--save-every", save_every, "--eval-every", 0,
                            "--target-share", 0.3, "--resume", "auto")


def state(out):
    return json.loads((out / "latest" / "trainer_state.json").read_text())


def wait_for_checkpoint(process, out, step):
    end = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:
        if os.path.lexists(out / "latest") and os.readlink(out / "latest") >= f"step-{step:08}":
            return
        time.sleep(0.002)


def leftovers(out):
    return [p.name for p in out.rglob(".*")]


def test_sigkill_at_random_moments(world, tmp_path):
    rng = random.Random(int(os.environ.get("DETOUR_KILL_SEED", 1)))
    last_step = 0
    advanced = 0
    torn = []
    for kill in range(KILLS):
        process = start(saving(world, tmp_path))
        if rng.random() < 0.8:  # else at any moment of the start
            wait_for_checkpoint(process, tmp_path, last_step + 1)
            time.sleep(rng.random() * 0.1)
        else:
            time.sleep(rng.random() * 0.5)
        assert process.poll() is None, process.stderr.read()
        process.kill()
        stderr = process.communicate()[1]
        assert "detour: error" not in stderr
        if not (tmp_path / "latest").exists():
            assert last_step == 0, f"kill {kill}: latest is gone"
            continue
        step = state(tmp_path)["step"]
        assert step >= last_step, f"kill {kill}: latest went back"
        if last_step:
            assert f"at step {last_step}" in stderr or "resuming" not in stderr, stderr
        advanced += step > last_step
        last_step = step
        if kill % 4 == 0 or kill == KILLS - 1:
            ok(*world.eval_args(tmp_path / "latest"))
        torn += [f"kill {kill}: {name}" for name in checkpoints(tmp_path)
                 if not WHOLE <= {p.name for p in (tmp_path / name).iterdir()}]
    assert advanced >= KILLS // 4

    # The killed run, continued to a stop, is one that was never killed.
    for out, save_every in ((tmp_path, 1), (tmp_path / "whole", 0)):
        process = start(saving(world, out, save_every))
        wait_for_step(process, out, last_step + 3)
        process.terminate()
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    common = min(len(records(tmp_path)), len(records(tmp_path / "whole")))
    assert common >= last_step + 3
    assert records(tmp_path)[:common] == records(tmp_path / "whole")[:common]
    assert [r["step"] for r in records(tmp_path)] == list(range(1, len(records(tmp_path)) + 1))
    assert not leftovers(tmp_path)
    assert len(checkpoints(tmp_path)) == 2
    assert not torn, "checkpoints that were half removed"


@pytest.fixture(scope="module")
def started(world):
    """A run of two saved steps, to be copied."""
    out = world.root / "started"
    ok(*train_to(world, out, 2))
    return out


def train_to(world, out, steps):
    return world.train_args(out, "--max-steps", steps, "--save-every", 1, "--eval-every", 0, "--resume", "auto")


@pytest.fixture
def out(started, tmp_path):
    shutil.copytree(started, tmp_path / "out", symlinks=True)
    return tmp_path / "out"


@pytest.mark.parametrize("action", ["", ":kill"])
@pytest.mark.parametrize("point", ["write:1", "write:3", "fsync:1", "fsync:7", "rename:1", "rename:2"])
def test_fail_points(world, out, point, action):
    before = {p.name: p.read_bytes() for p in (out / "latest").iterdir()}
    old = (out / "latest").resolve()
    result = run(*train_to(world, out, 3), env={"DETOUR_FAIL_POINT": point + action})
    if action:
        assert result.returncode == -9
    else:
        line = error_line(result, "No space left on device")
        assert str(out) in line
        assert not leftovers(out)
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    ok(*train_to(world, out, 3))  # reads the checkpoint
    assert state(out)["step"] == 3
    assert not leftovers(out)
    assert checkpoints(out) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("point", ["remove:1", "remove:1:kill"])
def test_fail_points_of_removal(world, out, point):
    """A checkpoint that cannot be removed does not stop the run."""
    result = run(*train_to(world, out, 3), env={"DETOUR_FAIL_POINT": point})
    assert result.returncode in (0, -9)
    ok(*world.eval_args(out / "latest"))
    ok(*train_to(world, out, 4))
    assert not leftovers(out)


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", mount],
                                           capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_full_disk(world, started, small_disk):
    out = small_disk / "out"
    shutil.copytree(started, out, symlinks=True)
    before = (out / "latest" / "model.safetensors").read_bytes()
    for spare in (100, 200, 300):  # KiB; a checkpoint takes about 500
        filler = small_disk / "filler"
        filler.write_bytes(b"")
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        filler.write_bytes(bytes(max(0, free - spare * 1024)))
        result = run(*train_to(world, out, 3))
        error_line(result, "No space left on device")
        assert not leftovers(out)
        assert (out / "latest" / "model.safetensors").read_bytes() == before
        ok(*world.eval_args(out / "latest"))
    filler.unlink()
    ok(*train_to(world, out, 3))
    assert state(out)["step"] == 3


def test_full_disk_of_other_commands(world, small_disk):
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    commands = [
        ["prepare", world.corpus, "--tokenizer", world.tok, "--out-dir", small_disk / "data"],
        ["tokenizer", "train", "--input", world.corpus, "--vocab-size", 300, "--out-dir", small_disk / "tok"],
        world.train_args(small_disk / "out", "--max-steps", 2),
    ]
    for args in commands:
        error_line(run(*args), "No space left on device")
        rest = [str(p) for p in small_disk.rglob("*") if p.is_file() and p.name != "filler" and p.stat().st_size]
        assert not rest, args[0]
