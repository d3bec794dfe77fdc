"""Whatever a user or a file gets wrong ends within seconds, in one line, and leaves nothing half-written.
Uses DETOUR_BIN."""
import json
import os
import shutil
import stat
import struct
import subprocess

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from robust_fixtures import CONFIG, CONTEXT, DETOUR, VOCAB, error_line, model, ok, run, world  # noqa: F401


def refused(*args, parts=(), **kwargs):
    result = run(*args, timeout=30, **kwargs)
    line = error_line(result, *parts)
    assert result.stderr == line + "\n", result.stderr
    assert result.stdout == ""
    return result


def tree(root):
    return {str(p.relative_to(root)): p.stat().st_size if p.is_file() else -1 for p in root.rglob("*")}


@pytest.fixture
def broken(model, tmp_path):
    """A copy of the model, to be broken."""
    shutil.copytree(model, tmp_path / "broken")
    return tmp_path / "broken"


def header(text, rest=b""):
    data = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(data)) + data + rest


FILES = {
    "missing": None,
    "directory": "directory",
    "empty": b"",
    "short": b"\x01\x02",
    "binary": bytes(range(256)) * 40,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "zeros": bytes(1000),
    "header_huge": struct.pack("<Q", 1 << 62) + b"{}",
    "header_no_json": header(b"{{{{"),
    "header_array": header([1, 2]),
    "header_deep": header(b"[" * 100000),
    "header_null_bytes": header(b'{"a\x00":1}'),
    "header_bad_utf8": header(b'{"\xff\xfe":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "no_tensors": header({}),
    "offsets_beyond": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(8)),
    "offsets_negative": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, bytes(16)),
    "offsets_swapped": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, bytes(16)),
    "shape_overflow": header({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}}, bytes(16)),
    "shape_negative": header({"a": {"dtype": "F32", "shape": [-4, -1], "data_offsets": [0, 16]}}, bytes(16)),
    "shape_text": header({"a": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}, bytes(16)),
    "dtype_unknown": header({"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
}


def put(path, content):
    if path.exists():
        path.unlink()
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("kind", FILES)
def test_weights_file(world, broken, kind):
    put(broken / "model.safetensors", FILES[kind])
    refused(*world.eval_args(broken), parts=[str(broken)])


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "binary", "header_deep", "no_tensors"])
def test_tokens_file(model, tmp_path, kind):
    put(tmp_path / "ids.safetensors", FILES[kind])
    refused("logits", "--model", model, "--tokens", tmp_path / "ids.safetensors", "--out", tmp_path / "out",
            parts=["ids.safetensors"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_truncated_weights(world, broken, share):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    refused(*world.eval_args(broken), parts=["model.safetensors"])


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NORM = "model.norm.weight"
EDITS = {
    "missing": (lambda t: t.pop(NORM), NORM),
    "missing_router": (lambda t: [t.pop(n) for n in list(t) if "router" in n], "router"),
    "missing_layer": (lambda t: [t.pop(n) for n in list(t) if ".layers.2." in n], ".layers.2."),
    "shape": (lambda t: t.update({NORM: numpy.zeros(33, numpy.float32)}), NORM),
    "rank": (lambda t: t.update({NORM: numpy.zeros((32, 1), numpy.float32)}), NORM),
    "scalar": (lambda t: t.update({NORM: numpy.zeros((), numpy.float32)}), NORM),
    "empty": (lambda t: t.update({NORM: numpy.zeros(0, numpy.float32)}), NORM),
    "dtype": (lambda t: t.update({NORM: numpy.zeros(32, numpy.int32)}), NORM),
    "unexpected": (lambda t: t.update({"model.layers.0.odd.weight": numpy.zeros(3, numpy.float32)}), "odd"),
    "one_layer_more": (lambda t: t.update({n.replace("layers.2", "layers.3"): v for n, v in t.items()}), "layers.3"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_tensors(world, broken, kind):
    change, part = EDITS[kind]
    edit_weights(broken / "model.safetensors", change)
    refused(*world.eval_args(broken), parts=[part])


@pytest.mark.parametrize("kind", ["missing", "empty", "binary", "header_deep", "no_tensors"])
def test_optimizer_file(world, broken, tmp_path, kind):
    put(broken / "optimizer.safetensors", FILES[kind])
    refused(*world.train_args(tmp_path / "out", "--max-steps", 4, "--resume", broken), parts=["optimizer.safetensors"])


STATES = {
    "missing": None, "empty": b"", "binary": b"\x00\xff" * 50, "array": b"[]", "no_config": b'{"format": 1, "step": 2,'
    b'"tokens": 1, "next_sequence": 1, "seed": 42, "seconds": 1}',
    "negative": b'{"format": 1, "step": -2, "tokens": 1, "next_sequence": 1, "seed": 42, "seconds": 1, "config": {}}',
    "format": b'{"format": 9, "step": 2, "tokens": 1, "next_sequence": 1, "seed": 42, "seconds": 1, "config": {}}',
    "config_text": b'{"format": 1, "step": 2, "tokens": 1, "next_sequence": 1, "seed": 42, "seconds": 1, "config": 3}',
}


@pytest.mark.parametrize("kind", STATES)
def test_trainer_state(world, broken, tmp_path, kind):
    put(broken / "trainer_state.json", STATES[kind])
    refused(*world.train_args(tmp_path / "out", "--max-steps", 4, "--resume", broken), parts=["trainer_state.json"])


CONFIGS = {
    "unknown_key": {"hidden_sise": 32},
    "unknown_routing_key": {"routing": {"method": "dtrnet", "layers": [1], "capcity": 1}},
    "unknown_method": {"routing": {"method": "mixture"}},
    "routing_text": {"routing": "dtrnet"},
    "layers_beyond": {"routing": {"method": "dtrnet", "layers": [1, 3]}},
    "layers_negative": {"routing": {"method": "dtrnet", "layers": [-1]}},
    "layers_twice": {"routing": {"method": "dtrnet", "layers": [1, 1]}},
    "layout_unknown": {"routing": {"method": "dtrnet", "layout": "zigzag"}},
    "dense_with_layers": {"routing": {"method": "dense", "layers": [1]}},
    "vocab_absurd": {"vocab_size": 10**15},
    "vocab_negative": {"vocab_size": -400},
    "vocab_zero": {"vocab_size": 0},
    "vocab_float": {"vocab_size": 400.5},
    "vocab_text": {"vocab_size": "400"},
    "vocab_null": {"vocab_size": None},
    "vocab_beyond_int64": {"vocab_size": 10**30},
    "hidden_negative": {"hidden_size": -1},
    "hidden_no_multiple": {"hidden_size": 33, "head_dim": None},
    "layers_zero": {"num_hidden_layers": 0},
    "layers_absurd": {"num_hidden_layers": 10**9},
    "heads_zero": {"num_attention_heads": 0},
    "kv_heads_no_divisor": {"num_attention_heads": 4, "num_key_value_heads": 3},
    "kv_heads_more": {"num_key_value_heads": 8},
    "head_dim_odd": {"head_dim": 15},
    "head_dim_absurd": {"head_dim": 1 << 40},
    "memory_absurd": {"vocab_size": 1 << 24, "hidden_size": 1 << 17, "intermediate_size": 1 << 19,
                      "num_hidden_layers": 1024},
    "context_zero": {"max_position_embeddings": 0},
    "eps_negative": {"rms_norm_eps": -1},
    "theta_negative": {"rope_theta": -1},
    "rope_scaling": {"rope_scaling": {"rope_type": "longrope", "factor": 4}},
    "activation": {"hidden_act": "gelu"},
    "model_type": {"model_type": "bert\nsecond line"},
    "bias": {"attention_bias": 1},
    "tie_text": {"tie_word_embeddings": "yes"},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_values(world, tmp_path, kind):
    config = world.config(f"{kind}.json", **CONFIGS[kind])
    refused(*world.train_args(tmp_path / "out", "--max-steps", 2, config=config))
    assert not list(tmp_path.glob("out/step-*"))


CONFIG_FILES = {
    "missing": None, "directory": "directory", "empty": b"", "object": b"{}", "array": b"[]",
    "number": b"7", "null": b"null", "torn": b'{"vocab_size": 40', "deep": b'{"a":' * 100000, "deep_array": b"[" * 500000,
    "binary": bytes(range(256)), "twice": b"{} {}", "nan": b'{"rope_theta": NaN}', "bad_utf8": b'{"\xff": 1}',
    "huge_number": b'{"vocab_size": 1e999}', "same_key_twice": b'{"vocab_size": 400, "vocab_size": 500}',
    "null_byte": b'{"a\x00b": 1}',
}


@pytest.mark.parametrize("kind", CONFIG_FILES)
def test_config_file(world, broken, kind):
    put(broken / "config.json", CONFIG_FILES[kind])
    refused(*world.eval_args(broken), parts=["broken"])


INPUTS = {
    "empty": b"", "binary": bytes(range(256)) * 16, "elf": b"\x7fELF\x02\x01\x01" + bytes(500),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_prepare_input(world, tmp_path, kind):
    (tmp_path / "in.txt").write_bytes(INPUTS[kind])
    refused("prepare", tmp_path / "in.txt", "--tokenizer", world.tok, "--out-dir", tmp_path / "out")
    assert set(tree(tmp_path)) == {"in.txt"}


@pytest.mark.parametrize("line", [b"not json", b"{}", b'{"text": 3}', b"[]", b'{"text": "a"', b"\xff", b"[" * 100000])
def test_prepare_jsonl(world, tmp_path, line):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    refused("prepare", tmp_path / "in.jsonl", "--tokenizer", world.tok, "--out-dir", tmp_path / "out",
            parts=["in.jsonl"])
    assert set(tree(tmp_path)) == {"in.jsonl"}


def test_prepare_paths(world, tmp_path):
    def prepare(*args):
        return refused("prepare", *args, "--tokenizer", world.tok)

    prepare(tmp_path / "none.txt", "--out-dir", tmp_path / "out")
    (tmp_path / "dir").mkdir()
    prepare(tmp_path / "dir", "--out-dir", tmp_path / "out")
    prepare(world.corpus, "--out-dir", world.corpus)
    prepare(world.corpus, "--out-dir", "/proc/nowhere")
    before = tree(world.data)
    refused("prepare", world.corpus, "--tokenizer", world.tok, "--out-dir", world.data)
    assert tree(world.data) == before
    refused("prepare", world.corpus, "--tokenizer", tmp_path / "dir", "--out-dir", tmp_path / "out")
    refused("prepare", world.corpus, "--tokenizer", world.tok, "--out-dir", tmp_path / "out", "--document-separator",
            "/(/")
    assert set(tree(tmp_path)) == {"dir"}


TOKENIZERS = {k: CONFIG_FILES[k] for k in ("missing", "directory", "empty", "object", "array", "deep", "binary")}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_file(model, tmp_path, kind):
    put(tmp_path / "tokenizer.json", TOKENIZERS[kind])
    refused("tokenizer", "encode", "--model", tmp_path, input="text")


def test_tokenizer_model_file(tmp_path):
    for content in (b"", bytes(range(256)) * 10):
        (tmp_path / "tokenizer.model").write_bytes(content)
        refused("tokenizer", "encode", "--model", tmp_path, input="text", parts=["tokenizer.model"])


@pytest.mark.parametrize("ids", [["-1"], [str(VOCAB)], ["99999999999"], ["1", "x"]])
def test_tokenizer_decode(world, ids):
    refused("tokenizer", "decode", "--model", world.tok, "--", *ids)


IDS = numpy.arange(12, dtype=numpy.int32).reshape(2, 6)
TOKENS = {
    "beyond": {"input_ids": IDS + VOCAB - 5},
    "negative": {"input_ids": IDS - 1},
    "int64_min": {"input_ids": numpy.full((1, 4), -2**31, numpy.int32)},
    "float": {"input_ids": IDS.astype(numpy.float32)},
    "bool": {"input_ids": IDS > 3},
    "rank_3": {"input_ids": IDS.reshape(2, 3, 2)},
    "rank_0": {"input_ids": numpy.array(3, numpy.int32)},
    "other_name": {"ids": IDS},
    "too_long": {"input_ids": numpy.ones((1, CONTEXT + 1), numpy.int32)},
    "length_beyond": {"input_ids": IDS, "lengths": numpy.int32([6, 7])},
    "length_negative": {"input_ids": IDS, "lengths": numpy.int32([6, -1])},
    "length_count": {"input_ids": IDS, "lengths": numpy.int32([6])},
    "length_float": {"input_ids": IDS, "lengths": numpy.float32([6, 6])},
}


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens(model, tmp_path, kind):
    save_file(TOKENS[kind], tmp_path / "ids.safetensors")
    refused("logits", "--model", model, "--tokens", tmp_path / "ids.safetensors", "--out", tmp_path / "out", "--mode",
            "full" if len(kind) % 2 else "incremental")
    assert set(tree(tmp_path)) == {"ids.safetensors"}


@pytest.fixture(scope="module")
def ids(world):
    save_file({"input_ids": IDS}, world.root / "ids.safetensors")
    return world.root / "ids.safetensors"


def test_out_paths(model, ids, tmp_path):
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_text("")
    for out in ("dir", "none/out", "file/out", "dir/", "", "x" * 300):
        refused("logits", "--model", model, "--tokens", ids, "--out", str(tmp_path / out) if out != "" else "")
    for out in ("/proc/nowhere", "/"):
        refused("logits", "--model", model, "--tokens", ids, "--out", out)
    assert tree(tmp_path) == {"dir": -1, "file": 0}


def test_output_that_is_no_file(model, ids, tmp_path):
    """A pipe or a device is not replaced by a file."""
    os.mkfifo(tmp_path / "pipe")
    refused("logits", "--model", model, "--tokens", ids, "--out", tmp_path / "pipe", parts=["pipe"])
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert set(tree(tmp_path)) == {"pipe"}


def test_full_device(world, model):
    with open("/dev/full", "w") as full:
        for args in (world.eval_args(model), ["generate", "--model", model, "--prompt", "a", "--max-tokens", 4]):
            result = subprocess.run([DETOUR, *map(str, args)], stdout=full, stderr=subprocess.PIPE, text=True,
                                    timeout=30)
            assert (result.returncode, result.stderr) == (1, "detour: error: standard output cannot be written\n"), args


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder(world, model, ids, tmp_path):
    tmp_path.chmod(0o500)
    refused("logits", "--model", model, "--tokens", ids, "--out", tmp_path / "out")
    refused("prepare", world.corpus, "--tokenizer", world.tok, "--out-dir", tmp_path / "out")
    refused(*world.train_args(tmp_path / "out", "--max-steps", 2))
    tmp_path.chmod(0o700)
    assert not tree(tmp_path)


def test_train_out_dir(world, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "out", "/proc/nowhere"):
        refused(*world.train_args(out, "--max-steps", 2))
    for taken in ("metrics.jsonl", "latest"):
        (tmp_path / taken / taken).mkdir(parents=True)
        refused(*world.train_args(tmp_path / taken, "--max-steps", 2, "--resume", "auto"))
    refused(*world.train_args(tmp_path / "new", "--max-steps", 2, "--resume", tmp_path / "none"))
    refused(*world.train_args(tmp_path / "new", "--max-steps", 2, "--tokenizer", tmp_path / "none"))
    refused(*world.train_args(tmp_path / "new", "--max-steps", 2, "--tensorboard", tmp_path / "file"))
    assert not list(tmp_path.rglob("step-*"))


FLAGS = [
    ["--frobnicate"], ["--max-step", 3], ["--max-steps", 0], ["--max-steps", -1], ["--max-steps", "nan"],
    ["--max-steps", 1.5], ["--max-steps", 10**30], ["--max-steps", 3, "extra"], ["--max-steps"],
    ["--seq-len", -64], ["--seq-len", 0], ["--seq-len", CONTEXT + 1], ["--seq-len", 1 << 40],
    ["--micro-batch-size", 0], ["--micro-batch-size", 3, "--global-batch-size", 4],
    ["--micro-batch-size", 8, "--global-batch-size", 4],
    ["--global-batch-size", -1], ["--lr", "nan"], ["--lr", "inf"], ["--lr", -1], ["--lr", 0], ["--lr", "1e999"],
    ["--min-lr", "nan"], ["--min-lr", -1], ["--weight-decay", "nan"], ["--weight-decay", "inf"], ["--grad-clip", "nan"],
    ["--grad-clip", -1], ["--beta1", 1], ["--beta1", 1.5], ["--beta1", "nan"], ["--beta2", 1], ["--beta2", -0.1],
    ["--adam-eps", 0], ["--adam-eps", "nan"], ["--max-time", "nan"], ["--aux-loss-coeff", "nan"],
    ["--aux-loss-coeff", -2], ["--target-share", 1.5], ["--target-share", "nan"], ["--share-ramp", -1],
    ["--controller-rate", 2], ["--decay-ratio", "nan"], ["--lr-schedule", "linear"], ["--warmup-steps", -1],
    ["--threads", -1], ["--threads", 10**6], ["--threads", "two"], ["--simd", "nonsense"], ["--simd", ""],
    ["--seed", -1], ["--seed", "x"], ["--seed", 2**64], ["--keep-last", 0], ["--log-every", 0], ["--save-every", -1],
    ["--method", "mixture"], ["--layout", "zigzag"], ["--layout", "3"], ["--layout", "-1"], ["--layout", "1,1"],
    ["--layout", "2,1"], ["--layout", "1,"], ["--layout", "1;2"], ["--layout", "99999999999999999999"],
    ["--data", "/nowhere"], ["--model-config", "/nowhere"], ["--init-from", "/nowhere"], ["--resume", "/nowhere"],
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "=".join(map(str, flags)))
def test_train_flags(world, tmp_path, flags):
    given = flags if "--max-steps" in flags or "--max-step" in flags else ["--max-steps", 2, *flags]
    refused(*world.train_args(tmp_path / "out", *given))
    assert not list(tmp_path.rglob("step-*"))


def test_train_without_an_end(world, tmp_path):
    refused(*world.train_args(tmp_path / "out"), parts=["--max-steps"])


def test_seeds_beyond_int64_are_refused(world, tmp_path):
    """Every seed that the flag takes can be read back: checkpoints hold it as a JSON integer."""
    for seed in (2**63, 2**64 - 1, -1):
        refused(*world.train_args(tmp_path / str(seed), "--max-steps", 2, "--seed", seed), parts=["seed"])
    args = world.train_args(tmp_path / "largest", "--max-steps", 2, "--seed", 2**63 - 1, "--resume", "auto")
    ok(*args)
    ok(*args)


def test_vocabulary_mismatch(world, model, tmp_path):
    refused(*world.train_args(tmp_path / "out", "--max-steps", 2, config=world.config("v.json", vocab_size=300)),
            parts=["300", str(VOCAB)])
    ok("tokenizer", "train", "--input", world.corpus, "--vocab-size", 300, "--out-dir", tmp_path / "tok")
    ok("prepare", world.corpus, "--tokenizer", tmp_path / "tok", "--out-dir", tmp_path / "data")
    refused("eval", "--model", model, "--data", tmp_path / "data", "--seq-len", CONTEXT,
            parts=["300", str(VOCAB), "detour prepare"])
    refused("train", "--init-from", model, "--data", tmp_path / "data", "--seq-len", CONTEXT, "--max-steps", 2,
            "--out-dir", tmp_path / "out", parts=["300", str(VOCAB), "detour prepare"])
    assert not list(tmp_path.rglob("step-*"))


SHARDS = {
    "no_manifest": lambda d: (d / "manifest.json").unlink(),
    "empty_manifest": lambda d: (d / "manifest.json").write_text(""),
    "other_manifest": lambda d: (d / "manifest.json").write_text("{}"),
    "no_shard": lambda d: (d / "val-00000.bin").unlink(),
    "short_shard": lambda d: (d / "val-00000.bin").write_bytes((d / "val-00000.bin").read_bytes()[:-7]),
    "empty_shard": lambda d: (d / "val-00000.bin").write_bytes(b""),
    "long_shard": lambda d: (d / "val-00000.bin").write_bytes((d / "val-00000.bin").read_bytes() + b"xy"),
    "wild_ids": lambda d: (d / "val-00000.bin").write_bytes(b"\xff" * (d / "val-00000.bin").stat().st_size),
    "outside": lambda d: (d / "manifest.json").write_text(
        (d / "manifest.json").read_text().replace("val-00000.bin", "../../val-00000.bin")),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_shards(world, model, tmp_path, kind):
    shutil.copytree(world.data, tmp_path / "data")
    SHARDS[kind](tmp_path / "data")
    refused("eval", "--model", model, "--data", tmp_path / "data", "--seq-len", CONTEXT, parts=["data"])


@pytest.mark.parametrize("flags", [
    ["--seq-len", CONTEXT + 1], ["--seq-len", -1], ["--seq-len", 0], ["--max-tokens", -1],
    ["--split", "test"], ["--micro-batch-size", 0], ["--micro-batch-size", -3], ["--threads", -1], ["--simd", "sse"],
    ["--data", "/nowhere"], ["--model", "/nowhere"], ["--frob"],
], ids=str)
def test_eval_flags(world, model, flags):
    args = list(map(str, world.eval_args(model)))
    if flags[0] in args:
        at = args.index(flags[0])
        del args[at:at + 2]
    refused(*args, *flags)


@pytest.mark.parametrize("flags", [
    [], ["--prompt", "a " * 200], ["--prompt", ""], ["--prompts", "/nowhere"], ["--prompts", "/dev/null"],
    ["--prompt", "a", "--max-tokens", -1], ["--prompt", "a", "--top-k", -1],
    ["--prompt", "a", "--top-p", "nan"], ["--prompt", "a", "--top-p", 2], ["--prompt", "a", "--top-p", -1],
    ["--prompt", "a", "--min-p", "nan"], ["--prompt", "a", "--min-p", 2], ["--prompt", "a", "--temperature", -1],
    ["--prompt", "a", "--temperature", "nan"], ["--prompt", "a", "--temperature", "inf"],
    ["--prompt", "a", "--repetition-penalty", 0], ["--prompt", "a", "--repetition-penalty", "nan"],
    ["--prompt", "a", "--stop", ""], ["--prompt", "a", "--prefill-chunk", 0], ["--prompt", "a", "--max-batch", 0],
    ["--prompt", "a", "--threads", -1], ["--prompt", "a", "--simd", "x"],
    ["--prompt", "a", "--seed", -1],
], ids=lambda flags: " ".join(map(str, flags))[:40])
def test_generate(model, flags):
    flags = [f if isinstance(f, bytes) else str(f) for f in flags]
    refused("generate", "--model", model, *[os.fsdecode(f) for f in flags])


def test_generate_without_tokenizer(broken):
    (broken / "tokenizer.json").unlink()
    refused("generate", "--model", broken, "--prompt", "a", parts=["tokenizer"])


def test_generate_with_the_tokenizer_of_a_larger_model(world, broken):
    (broken / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 300}))
    refused("generate", "--model", broken, "--prompt", "a")


def test_empty_prompt_file(model, tmp_path):
    (tmp_path / "prompts").write_text("\n\n")
    refused("generate", "--model", model, "--prompts", tmp_path / "prompts", parts=["prompt"])


@pytest.mark.parametrize("command", ["info", "report"])
def test_other_commands(command, broken, world):
    refused(command)
    (broken / "config.json").write_text("{")
    refused(*([command, broken] if command == "info" else [command, "--run", f"a={broken}", "--data", world.data]))
