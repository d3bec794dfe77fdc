"""`detour logits` gives the same bits, whatever the mode, chunk, batch, order, padding, threads or instruction set,
and the reference's values. The program is found in DETOUR_BIN."""

import pathlib
import random
import sys

import numpy as np
import pytest
import torch
from detour_e2e import FOLDER, GOLDEN, corpus, expect_error, logits, model, rows, tokenizer, write_tokens
from reference_logits import read_batch, reference_forward, run, transformers_forward
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
from compare_logits import relative_error  # noqa: E402

GOLDENS = ["dtrnet_k32_ragged", "dtrnet_documents", "dtrnet_all_layers", "dense_k64"]
LENGTHS = [0, 1, 2, 15, 16, 17, 31, 33, 64, 65, 100]


class Case:
    """A model, 64 sequences of many lengths, and what the program says of them in one full pass."""

    def __init__(self, name):
        self.name = name
        self.directory = model("dtrnet") if name == "trained" else GOLDEN / name
        rng = random.Random(name)
        text = [rng.randrange(61) for _ in range(2000)]
        if name == "trained":  # text as it was trained on: on noise it may route nothing
            oracle = Tokenizer.from_file(str(tokenizer() / "tokenizer.json"))
            text = oracle.encode((corpus() / "1790-Washington-1.txt").read_text()).ids
        lengths = LENGTHS + [500 if name == "trained" else 200] + [rng.randrange(1, 80) for _ in range(64 - len(LENGTHS) - 1)]
        rng.shuffle(lengths)
        begins = [rng.randrange(len(text) - n) for n in lengths]
        self.sequences = [text[begin:begin + n] for begin, n in zip(begins, lengths)]
        self.tokens = write_tokens(FOLDER / f"{name}.safetensors", self.sequences)
        self.full = logits(self.directory, self.tokens, "--mode", "full")
        self.bytes = self.full.read_bytes()
        self.rows = rows(self.full, self.sequences)


@pytest.fixture(scope="module", params=[*GOLDENS, "trained"])
def case(request):
    return Case(request.param)


def test_the_inputs_take_both_ways(case):
    tensors = load_file(case.full)
    assert np.isfinite(tensors["logits"]).all()
    routed = {name: values for name, values in tensors.items() if name.endswith(".routed")}
    assert bool(routed) == case.name.startswith(("dtrnet", "trained"))
    num_tokens = sum(map(len, case.sequences))
    assert not routed or 0 < sum(values.sum() for values in routed.values()) < num_tokens * len(routed)
    for name, values in routed.items():
        probs = tensors[name.replace("routed", "router_probs")]
        assert ((probs[..., 0] > probs[..., 1]) == values).all(), name


@pytest.mark.parametrize("flags", [
    "--mode full --threads 1", "--mode full --threads 2 --simd avx2", "--mode full --simd avx512",
    "--mode incremental", "--mode chunked --chunk 1 --threads 1", "--mode chunked --chunk 3",
    "--mode chunked --chunk 16 --threads 2", "--mode chunked --chunk 17 --simd avx2", "--mode chunked --chunk 64",
])
def test_flags_change_no_bit(case, flags):
    if "avx512" in flags and "avx512f" not in pathlib.Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX-512")
    assert logits(case.directory, case.tokens, *flags.split()).read_bytes() == case.bytes


@pytest.mark.parametrize("size,mode", [(1, "full"), (2, "incremental"), (7, "full"), (7, "chunked"),
                                       (64, "incremental")])
def test_batches_change_no_bit(case, size, mode):
    rng = random.Random(size)
    chosen = rng.sample(range(64), size)
    if size == 1:
        chosen = [max(range(64), key=lambda b: len(case.sequences[b]))]
    sequences = [case.sequences[b] for b in chosen]
    width = max(map(len, sequences)) + size % 3
    tokens = write_tokens(FOLDER / "batch.safetensors", sequences, width, pad=rng.choice([0, 7, -1]))
    got = rows(logits(case.directory, tokens, "--mode", mode, "--chunk", 5), sequences)
    assert got == [case.rows[b] for b in chosen]


def test_later_tokens_change_no_bit(case):
    """Every sequence cut at a random place; the longest also as [T] without lengths."""
    rng = random.Random(3)
    cut = [s[:rng.randrange(len(s) + 1)] for s in case.sequences]
    tokens = write_tokens(FOLDER / "cut.safetensors", cut)
    for got, whole, s in zip(rows(logits(case.directory, tokens), cut), case.rows, cut):
        assert all(whole[name][:len(got[name])] == got[name] for name in whole), len(s)
    longest = max(range(64), key=lambda b: len(case.sequences[b]))
    save_file({"input_ids": np.array(case.sequences[longest], np.int32)}, FOLDER / "flat.safetensors")
    flat = load_file(logits(case.directory, FOLDER / "flat.safetensors"))
    assert {name: values.tobytes() for name, values in flat.items()} == case.rows[longest]


def test_reference(case):
    torch.set_num_threads(1)
    ids, lengths = read_batch(case.tokens, 512 if case.name == "trained" else 61)
    longest = np.argsort(lengths)[-4:].tolist()
    chosen = longest + [b for b in range(64) if b not in longest][:12]
    ids, lengths = ids[chosen], [lengths[b] for b in chosen]
    dense = case.name.startswith("dense")
    forward = transformers_forward(case.directory) if dense else reference_forward(case.directory, torch.float32)
    with torch.no_grad():
        expected = run(forward, ids, lengths)
    got = load_file(case.full)
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        value = torch.from_numpy(got[name][chosen])
        assert value.shape == values.shape and value.dtype == values.dtype, name
        error = relative_error(value, values)
        assert error <= (1e-5 if values.dtype.is_floating_point else 0), (name, error)


def test_golden_ids():
    """The goldens' own tokens and logits, transformers' or the reference's."""
    for name in GOLDENS:
        golden = load_file(GOLDEN / name / "golden.safetensors")
        expected = golden.get("eval_joined.logits", golden["eval.logits"])
        save_file({"input_ids": golden["input_ids"]}, FOLDER / "golden.safetensors")
        got = load_file(logits(GOLDEN / name, FOLDER / "golden.safetensors"))["logits"]
        lengths = (golden["targets"] != -100).sum(1) + 1 if name == "dtrnet_k32_ragged" else [got.shape[1]] * len(got)
        for value, reference, n in zip(got, expected, lengths):
            assert relative_error(torch.from_numpy(value[:n]), torch.from_numpy(reference[:n])) <= 1e-5, name


@pytest.mark.parametrize("tensors,says", [
    ({"input_ids": np.full((1, 3), 61, np.int32)}, "61"),
    ({"input_ids": np.full((1, 3), -1, np.int32)}, "-1"),
    ({"input_ids": np.zeros((1, 257), np.int32)}, "256"),
    ({"input_ids": np.zeros((1, 3), np.int32), "lengths": np.array([4], np.int32)}, "lengths"),
    ({"input_ids": np.zeros((1, 3), np.int32), "lengths": np.array([-1], np.int32)}, "lengths"),
    ({"input_ids": np.zeros((2, 3), np.int32), "lengths": np.array([1], np.int32)}, "lengths"),
    ({"input_ids": np.zeros((1, 1, 3), np.int32)}, "input_ids"),
    ({"input_ids": np.zeros((1, 3), np.float32)}, "input_ids"),
    ({"ids": np.zeros((1, 3), np.int32)}, "input_ids"),
])
def test_wrong_tokens(tensors, says):
    path, out = FOLDER / "wrong.safetensors", FOLDER / "wrong_out.safetensors"
    save_file(tensors, path)
    expect_error("logits", "--model", GOLDEN / "dense_k64", "--tokens", path, "--out", out, says=says)
    assert not out.exists()
