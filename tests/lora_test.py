"""Training a part of a model: routers, adapters, or both, on weights that stay as they are. Uses DETOUR_BIN."""
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from robust_fixtures import (CONTEXT, error_line, ok, records, run, start, wait_for_step, weights,  # noqa: F401
                             world)

TARGETS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
           "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
DLLM = ["--method", "dllm", "--routing", "hidden=16", "--layout", "1,2"]


@pytest.fixture(scope="module")
def dense(world):
    """A dense model, trained for a few steps."""
    out = world.root / "dense_for_lora"
    ok(*world.train_args(out, "--max-steps", 5, config=world.dense))
    return (out / "latest").resolve()


def part(world, out, source, *flags, steps=6):
    """The checkpoint of a run from `source`, what the run printed, and its summary."""
    args = world.train_args(out, "--init-from", source, "--max-steps", steps, "--lr", 0.01, *flags)
    result = ok(*args)
    return out / "latest", result.stderr, json.loads((out / "summary.json").read_text())


def is_router(name):
    return "router" in name or "weight_predictor" in name


@pytest.mark.parametrize("targets", ["q,k,v", "k", "q,k,v,o,gate,up,down"])
def test_merged_weights_are_base_plus_adapters(world, dense, tmp_path, targets):
    out, printed, summary = part(world, tmp_path, dense, *DLLM, "--train", "router+lora", "--lora-rank", 4,
                                 "--lora-alpha", 6, "--lora-targets", targets)
    source, merged, lora = load_file(dense / "model.safetensors"), load_file(out / "model.safetensors"), \
        load_file(out / "lora.safetensors")
    with safe_open(out / "lora.safetensors", "numpy") as file:
        assert {k: v for k, v in file.metadata().items() if k != "format"} == \
            {"rank": "4", "alpha": "6", "targets": targets}
    names = [name for name in source if any(f".{TARGETS[t]}.weight" in name for t in targets.split(","))]
    assert len(names) == 3 * len(targets.split(",")) and len(lora) == 3 * len(names)
    for name in names:
        prefix = name.removesuffix(".weight")
        a, b = lora[f"{prefix}.lora_A.weight"], lora[f"{prefix}.lora_B.weight"]
        assert a.shape == (4, source[name].shape[1]) and b.shape == (source[name].shape[0], 4)
        np.testing.assert_array_equal(lora[f"{prefix}.base_layer.weight"], source[name])
        expected = source[name] + 1.5 * b.astype(np.float64) @ a.astype(np.float64)
        assert np.abs(b).max() > 0 and np.abs(merged[name] - source[name]).max() > 1e-4
        assert np.abs(merged[name] - expected).max() <= 1e-6 * np.abs(expected).max()
    for name in set(source) - set(names):
        assert merged[name].tobytes() == source[name].tobytes(), name
    routers = {name for name in merged if is_router(name)}
    assert routers and set(merged) == set(source) | routers
    adapters = sum(t.size for name, t in lora.items() if ".lora_" in name)
    trained = adapters + sum(merged[name].size for name in routers)
    assert (summary["trained_parameters"], summary["adapter_parameters"]) == (trained, adapters)
    assert "--train router+lora" in printed and "random" not in printed
    states = load_file(out / "optimizer.safetensors")
    assert {name.rsplit(".", 1)[0] for name in states} == routers | {name for name in lora if ".lora_" in name}


def test_routers_alone(world, dense, tmp_path):
    out, _, summary = part(world, tmp_path, dense, "--method", "dtrnet", "--layout", "1,2", "--routing",
                           "bypass=constant", "--train", "router", "--target-share", 0.5)
    source, trained = load_file(dense / "model.safetensors"), load_file(out / "model.safetensors")
    assert not (out / "lora.safetensors").exists()
    for name in source:
        assert trained[name].tobytes() == source[name].tobytes(), name
    routers = {name: t for name, t in trained.items() if name not in source}
    assert any("bypass" in name for name in routers) and all(t.any() for t in routers.values())
    assert summary["trained_parameters"] == sum(t.size for t in routers.values())
    assert summary["adapter_parameters"] == 0


def test_a_dense_model_with_adapters_alone(world, dense, tmp_path):
    out, _, summary = part(world, tmp_path, dense, "--train", "lora", "--lora-targets", "o")
    assert "routing" not in json.loads((out / "config.json").read_text())
    assert summary["trained_parameters"] == summary["adapter_parameters"] == 3 * 8 * (32 + 32)


def test_checkpoints_load_as_any_model(world, dense, tmp_path):
    """Serving, and a further run, see one set of weights: the merged ones."""
    out, _, summary = part(world, tmp_path / "a", dense, *DLLM, "--train", "router+lora")
    result = json.loads(ok("eval", "--model", out, "--data", world.data, "--seq-len", CONTEXT, "--max-tokens", 256,
                           "--json").stdout)
    assert result["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert ok("generate", "--model", out, "--prompt", "a", "--max-tokens", 5, "--ignore-eos").stdout
    ok("verify", out, "--tokens", 64)
    again, _, _ = part(world, tmp_path / "b", out, "--train", "lora", steps=1)
    merged, lora = load_file(out / "model.safetensors"), load_file(again / "lora.safetensors")
    for name in [name for name in lora if ".base_layer." in name]:
        assert lora[name].tobytes() == merged[name.replace(".base_layer", "")].tobytes(), name


def test_new_routers_are_those_of_a_new_model(world, dense, tmp_path):
    """A dense start with --method: every weight of the dense model, and routers as a new model of the seed has them."""
    flags = ["--max-steps", 1, "--lr", 1e-30, "--min-lr", 0, *DLLM]
    ok(*world.train_args(tmp_path / "new", *flags, config=world.dense))
    ok(*world.train_args(tmp_path / "from", "--init-from", dense, *flags))
    new, begun = (load_file(tmp_path / x / "latest" / "model.safetensors") for x in ("new", "from"))
    source = load_file(dense / "model.safetensors")
    assert set(new) == set(begun)
    for name in new:
        expected = (new if is_router(name) else source)[name]
        np.testing.assert_allclose(begun[name], expected, rtol=0, atol=1e-20, err_msg=name)


def test_frozen_random_weights_are_announced(world, tmp_path):
    assert "frozen weights are random" in ok(*world.train_args(tmp_path, "--max-steps", 1, "--train", "router")).stderr


def test_a_step_that_reaches_no_router_trains_nothing(world, dense, tmp_path):
    """Routers that a schedule leaves out for the first half get no gradient there, and that is no error."""
    ok(*world.train_args(tmp_path, "--init-from", dense, *DLLM, "--max-steps", 4, "--train", "router", "--schedule",
                         "routed_layers: 0->2 constant 0.5..1"))
    norms = [json.loads(line)["grad_norm"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
             if "grad_norm" in line]
    assert norms[:2] == [0, 0] and min(norms[2:]) > 0


REFUSED = [
    (["--train", "rooters"], ["--train", "all, router, router+lora, lora", "rooters"]),
    (["--train", "router"], ["--train router", "method with routers", "dense"]),
    (["--train", "router+lora"], ["--train router+lora", "method with routers", "dense"]),
    (["--train", "router", "--method", "early_exit"], ["no router of method early_exit has weights"]),
    (["--train", "router", "--method", "dtrnet", "--routing", "decider=random"], ["no router of method dtrnet"]),
    (["--train", "lora", "--lora-targets", "q,x"], ["--lora-targets", "q, k, v, o, gate, up, down", "q,x"]),
    (["--train", "lora", "--lora-targets", ""], ["--lora-targets"]),
    (["--train", "lora", "--lora-targets", "q,q"], ["--lora-targets"]),
    (["--train", "lora", "--lora-rank", "0"], ["--lora-rank", "1 to 32"]),
    (["--train", "lora", "--lora-rank", "33"], ["--lora-rank", "1 to 32"]),
    (["--train", "lora", "--lora-rank", "1.5"], ["lora-rank"]),
    (["--train", "lora", "--lora-alpha", "0"], ["--lora-alpha", "positive"]),
    (["--train", "lora", "--lora-alpha", "nan"], ["--lora-alpha", "positive"]),
    (["--train", "lora", "--lora-rank", "0", "--lora-alpha", "-1"], ["--lora-rank", "--lora-alpha"]),
    (["--lora-rank", "4"], ["--lora-rank needs --train lora"]),
    (["--method", "moe", "--routing", "expert_size=8"], ["--init-from", "method moe needs", "experts"]),
    (["--layout", "1"], ["--layout"]),
]


@pytest.mark.parametrize("flags, parts", REFUSED, ids=lambda x: "=".join(x))
def test_refused(world, dense, tmp_path, flags, parts):
    result = run(*world.train_args(tmp_path / "out", "--init-from", dense, "--max-steps", 2, *flags))
    assert result.stderr == error_line(result, *parts) + "\n" and result.stdout == ""
    assert not list(tmp_path.rglob("step-*"))


def test_a_routed_model_keeps_its_routers(world, dense, tmp_path):
    out, _, _ = part(world, tmp_path / "a", dense, *DLLM, "--train", "router")
    result = run(*world.train_args(tmp_path / "b", "--init-from", out, "--max-steps", 2, "--method", "dtrnet"))
    error_line(result, "describe a new model")


@pytest.mark.parametrize("flags, says", [
    ([], "train was"), (["--train", "lora"], "train was"), (["--lora-rank", 2], "lora_rank was 8, is now 2"),
    (["--lora-targets", "q,k"], "lora_targets was"), (["--lora-alpha", 8], "lora_alpha was"),
    (["--lora-rank", 0], "--lora-rank: expected")])
def test_resume_trains_the_same(world, dense, tmp_path, flags, says):
    part(world, tmp_path, dense, *DLLM, "--train", "router+lora")
    train = flags if not flags or "--train" in flags else ["--train", "router+lora", *flags]
    result = run(*world.train_args(tmp_path, "--init-from", dense, *DLLM, "--max-steps", 9, "--resume", "auto", *train))
    assert result.stderr == error_line(result, says) + "\n"


@pytest.mark.parametrize("threads", [1, 2])
def test_killed_and_resumed_is_the_run_that_never_stopped(world, dense, tmp_path, threads):
    args = ["--init-from", dense, *DLLM, "--train", "router+lora", "--max-steps", 30, "--save-every", 4, "--lr", 0.01,
            "--threads", threads]
    ok(*world.train_args(tmp_path / "whole", *args))
    stopped = world.train_args(tmp_path / "killed", *args, "--resume", "auto")
    process = start(stopped)
    wait_for_step(process, tmp_path / "killed", 11)
    process.kill()
    process.communicate()
    assert "resuming" in ok(*stopped).stderr
    assert len(weights(tmp_path / "killed")) == 3
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")


def test_damaged_adapters(world, dense, tmp_path):
    out, _, _ = part(world, tmp_path / "a", dense, *DLLM, "--train", "router+lora")
    path = out / "lora.safetensors"
    data = bytearray(path.read_bytes())
    args = world.train_args(tmp_path / "a", "--init-from", dense, *DLLM, "--max-steps", 9, "--resume", "auto",
                            "--train", "router+lora")
    data[-1] ^= 0x40  # the last base's last value
    path.write_bytes(data)
    error_line(run(*args), "lora.safetensors", "do not add up")
    path.write_bytes(data[:-8])
    error_line(run(*args), "lora.safetensors")
    path.unlink()
    error_line(run(*args), "lora.safetensors")


def test_run_file_and_print_config(world, tmp_path):
    """The keys of a run file, a list for the targets, and what --print-config gives back."""
    file = tmp_path / "run.toml"
    file.write_text('train = "router+lora"\nlora_rank = 4\nlora_alpha = 6\nlora_targets = ["q", "o"]\n')
    printed = ok("train", "--config", file, "--print-config").stdout
    for line in ('train = "router+lora"', "lora_rank = 4", "lora_alpha = 6", 'lora_targets = "q,o"'):
        assert line in printed.splitlines(), line
    defaults = ok("train", "--print-config").stdout.splitlines()
    for line in ('train = "all"', "lora_rank = 8", "lora_alpha = 16", 'lora_targets = "q,k,v"'):
        assert line in defaults, line
