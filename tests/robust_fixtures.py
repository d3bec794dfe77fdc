"""What the resume, kill and bad-input tests share: the program, and a world small enough for a run to take a second."""
import json
import os
import random
import re
import subprocess
import time

import pytest

DETOUR = os.environ["DETOUR_BIN"]
VOCAB = 400
CONTEXT = 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": CONTEXT, "tie_word_embeddings": True,
}
# What a run computes; the other fields of metrics.jsonl are times and memory.
EXACT_FIELDS = ("step", "loss", "grad_norm", "lr", "tokens", "share", "share_by_layer", "aux_loss", "target_share",
                "val_loss", "val_bits_per_byte", "val_share")


def run(*args, timeout=60, env=None, **kwargs):
    return subprocess.run([DETOUR, *map(str, args)], capture_output=True, text=True, errors="replace",
                          timeout=timeout, env={**os.environ, **(env or {})}, **kwargs)


def ok(*args, **kwargs):
    result = run(*args, **kwargs)
    assert result.returncode == 0, result.stderr
    return result


def error_line(result, *parts):
    """Checks the last line of standard error, and that it is for people; returns it."""
    assert result.returncode in (1, 2), (result.returncode, result.stderr)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("detour: error: "), result.stderr
    for alien in ("check failed", "frame #", "internal error", "std::", "nlohmann", "c10", "at::", "filesystem error",
                  "json.exception", "basic_string", "vector::", "stoi", "terminate", ".cc:", ".h:", "bad_alloc"):
        assert alien not in result.stderr.replace("Hint:", ""), result.stderr
    assert re.search(r"[\w)\"}/]", line[len("detour: error: "):])
    for part in parts:
        assert part in line, line
    return line


class World:
    """A corpus, its tokenizer and shards, and one config of each kind; read-only for the tests."""

    def __init__(self, root):
        self.root = root
        self.corpus, self.tok, self.data = root / "corpus.txt", root / "tok", root / "data"
        rng = random.Random(1)
        letters = "etaoinshrdlucmfwypvbgk"
        words = ["".join(rng.choice(letters) for _ in range(rng.randint(2, 8))) for _ in range(300)]
        documents = [" ".join(rng.choice(words) for _ in range(60)) + "." for _ in range(60)]
        self.corpus.write_text("\n\n".join(documents) + "\n")
        ok("tokenizer", "train", "--input", self.corpus, "--vocab-size", VOCAB, "--out-dir", self.tok)
        ok("prepare", self.corpus, "--tokenizer", self.tok, "--out-dir", self.data, "--document-separator",
           "blank-line", "--val-fraction", 0.1)
        self.dense = self.config("dense.json")
        self.dtrnet = self.config("dtrnet.json", routing={"method": "dtrnet", "layers": [1, 2]})

    def config(self, name, **changes):
        path = self.root / name
        path.write_text(json.dumps({**CONFIG, **changes}))
        return path

    def train_args(self, out, *flags, config=None):
        """Flags of a training run; those given later win, as in `flags`."""
        defaults = {"--data": self.data, "--out-dir": out, "--model-config": config or self.dtrnet,
                    "--tokenizer": self.tok, "--seq-len": CONTEXT, "--micro-batch-size": 2, "--global-batch-size": 2,
                    "--warmup-steps": 3, "--log-every": 1, "--save-every": 0, "--eval-every": 10,
                    "--eval-tokens": 256, "--threads": 2}
        flags = list(map(str, flags))
        for flag in flags:
            defaults.pop(flag, None)
        return ["train", *(str(x) for pair in defaults.items() for x in pair), *flags]

    def eval_args(self, model, *flags):
        return ["eval", "--model", model, "--data", self.data, "--seq-len", CONTEXT, "--max-tokens", 128,
                "--threads", 1, *flags]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def model(world):
    """A trained dtrnet model directory with its tokenizer; copy it before breaking it."""
    out = world.root / "model"
    ok(*world.train_args(out, "--max-steps", 2))
    return (out / "latest").resolve()


def records(out):
    """The deterministic fields of metrics.jsonl."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in EXACT_FIELDS} for line in lines]


def weights(out):
    """The bytes that a continued run must share with one that never stopped."""
    files = [out / "latest" / name for name in ("model.safetensors", "optimizer.safetensors", "lora.safetensors")]
    return [file.read_bytes() for file in files if file.exists() or file.stem != "lora"]


def checkpoints(out):
    return sorted(p.name for p in out.glob("step-*"))


def start(args, **kwargs):
    return subprocess.Popen([DETOUR, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **kwargs)


def wait_for_step(process, out, step):
    """Returns once the run has logged `step`, or has ended."""
    end = time.monotonic() + 30
    path = out / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and f'{{"step":{step},' in path.read_text():
            return
        time.sleep(0.002)
