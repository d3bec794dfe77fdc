"""`--weights`: matrices kept in 16, 8 or 4 bits. The same bits in every mode, the values of an independent product (the
`gguf` package's blocks, integer dot products in numpy inside of transformers' forward pass). Uses DETOUR_BIN."""
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from convert_test import convert, interleaved
from detour_e2e import FOLDER, corpus, detour, expect_error, logits, model, tokenizer, write_tokens
from families_test import CASES, save
from tokenizers import Tokenizer

FORMATS = ["bf16", "q8", "q4", "q4min"]
TYPE = {"q8": GGMLQuantizationType.Q8_0, "q4": GGMLQuantizationType.Q4_0, "q4min": GGMLQuantizationType.Q4_1}
CASES["blocks"] = ("Llama", {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True})


def values(path):
    return load_file(path)["logits"]


@pytest.fixture(scope="module", params=["dtrnet", "dense"])
def trained(request):
    """A trained model and text for it."""
    oracle = Tokenizer.from_file(str(tokenizer() / "tokenizer.json"))
    text = oracle.encode((corpus() / "1790-Washington-1.txt").read_text()).ids
    sequences = [text[i:i + n] for i, n in [(0, 300), (100, 1), (7, 33), (50, 64)]]
    return model(request.param), write_tokens(FOLDER / f"weights_{request.param}.safetensors", sequences)


@pytest.mark.parametrize("weights", FORMATS)
def test_every_mode_gives_the_same_bits(trained, weights):
    directory, tokens = trained
    full = logits(directory, tokens, "--weights", weights)
    for flags in ["--mode incremental", "--mode chunked --chunk 7 --threads 1", "--simd avx2 --threads 2"]:
        assert logits(directory, tokens, "--weights", weights, *flags.split()).read_bytes() == full.read_bytes(), flags
    exact = values(logits(directory, tokens))
    error = np.abs(values(full) - exact).max() / np.abs(exact).max()
    assert 0 < error < {"bf16": 0.02, "q8": 0.05, "q4": 0.8, "q4min": 0.8}[weights]


def rounded_to_bf16(source, out):
    tensors = load_file(source / "model.safetensors")
    for name, t in tensors.items():
        if t.ndim == 2 and "router" not in name:
            tensors[name] = torch.from_numpy(t).bfloat16().float().numpy()
    out.mkdir()
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, out / "model.safetensors")
    return out


def test_bf16_is_the_model_of_rounded_weights(trained, tmp_path):
    directory, tokens = trained
    rounded = rounded_to_bf16(directory, tmp_path / "rounded")
    assert logits(rounded, tokens).read_bytes() == logits(directory, tokens, "--weights", "bf16").read_bytes()


def blocks_of(raw, kind):
    """Scales [M, B], minima [M, B] and numbers [M, B, 32] of a GGUF file's blocks."""
    raw = raw.reshape(len(raw), -1, {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind.name])
    halves = np.ascontiguousarray(raw[..., :4]).view(np.float16).astype(np.float64)
    if kind.name == "Q8_0":
        return halves[..., 0], 0, raw[..., 2:].view(np.int8).astype(np.int64)
    q = raw[..., 2 if kind.name == "Q4_0" else 4:]
    q = np.concatenate([q & 15, q >> 4], -1).astype(np.int64)
    return (halves[..., 0], 0, q - 8) if kind.name == "Q4_0" else (halves[..., 0], halves[..., 1], q)


class QuantLinear(torch.nn.Module):
    """x Wᵀ of quantized W and x, in numpy: nothing here is Detour's."""

    def __init__(self, raw, kind):
        super().__init__()
        self.scale, self.min, self.q = blocks_of(raw, kind)

    def forward(self, x):
        rows = x.detach().numpy().astype(np.float32).reshape(-1, self.q.shape[1], 32)
        largest = np.abs(rows).max(-1, keepdims=True)
        inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
        q = np.rint(rows * inverse).astype(np.int64)
        s = (largest[..., 0] / np.float32(127)).astype(np.float64)
        y = np.einsum("nbk,mbk,nb,mb->nm", q, self.q, s, self.scale, optimize=True)
        if not np.isscalar(self.min):
            y = y + np.einsum("nb,nb,mb->nm", q.sum(-1), s, self.min, optimize=True)
        return torch.from_numpy(y.astype(np.float32)).reshape(*x.shape[:-1], -1)


def quantized(net, kind, raw_of=None):
    """transformers' model with every product replaced; embeddings are read from the blocks too. raw_of: the blocks of a
    weight by its name, else the gguf package's."""
    raw = {name: raw_of(name) if raw_of else quantize(w.detach().numpy(), kind)
           for name, w in net.named_parameters() if w.ndim == 2}
    net.lm_head = QuantLinear(raw["model.embed_tokens.weight"], kind)
    net.get_input_embeddings().weight = torch.nn.Parameter(
        torch.from_numpy(dequantize(raw["model.embed_tokens.weight"], kind)))
    for name, blocks in raw.items():
        if name.startswith("model.layers."):
            path, attribute = name.removesuffix(".weight").rsplit(".", 1)
            setattr(net.get_submodule(path), attribute, QuantLinear(blocks, kind))
    return net


@pytest.mark.parametrize("weights", TYPE)
def test_values_are_those_of_an_independent_product(weights, tmp_path):
    net = save("blocks", tmp_path / "model")
    sequences = [list(range(1, 40)), [5, 4, 3, 2] * 6]
    found = values(logits(tmp_path / "model", write_tokens(tmp_path / "ids", sequences), "--weights", weights))
    with torch.no_grad():
        plain = [net(torch.tensor([s])).logits[0].numpy() for s in sequences]
        net = quantized(net, TYPE[weights])
        want = [net(torch.tensor([s])).logits[0].numpy() for s in sequences]
    for i, s in enumerate(sequences):
        scale = np.abs(want[i]).max()
        # A number at a tie may go the other way where sums were rounded otherwise: one step of 127 of one input.
        assert np.abs(found[i, :len(s)] - want[i]).max() / scale < 2e-3
        assert np.abs(plain[i] - want[i]).max() / scale > 5e-3  # so the bound above means something


@pytest.mark.parametrize("weights", TYPE)
def test_blocks_of_a_gguf_file_stay_as_they_are(weights, tmp_path):
    """Also where they are not those that Detour would make: scales and numbers of another quantizer."""
    save("blocks", tmp_path / "model")
    plain = convert(tmp_path / "model", tmp_path / "plain.gguf", "--no-tokenizer")
    kind, rng = TYPE[weights], np.random.default_rng(1)
    reader = gguf.GGUFReader(plain)
    out = GGUFWriter(tmp_path / "m.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "general.name")):
            out.add_key_value(field.name, field.contents(), field.types[0])
    for t in reader.tensors:
        data = t.data
        if data.ndim == 2:
            data = quantize(data, kind)
            data[:, 0] ^= rng.integers(0, 3, len(data), dtype=np.uint8)  # the scale's last bits
            data[:, -1] = rng.integers(0, 256, len(data), dtype=np.uint8)
        out.add_tensor(t.name, data, raw_dtype=kind if data.dtype == np.uint8 else None)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()

    tokens = write_tokens(tmp_path / "ids", [list(range(1, 40))])
    stored = values(logits(tmp_path / "m.gguf", tokens, "--weights", "stored"))
    # The same blocks in the oracle.
    convert(tmp_path / "m.gguf", tmp_path / "f32", "--no-tokenizer")
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "f32")
    raw = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, net.config.num_hidden_layers)
    heads = {"q_proj": net.config.num_attention_heads, "k_proj": net.config.num_key_value_heads}

    def raw_of(name):
        rows, count = raw[names.get_name(name, (".weight",))], heads.get(name.split(".")[-2])
        if count:  # back from the file's order of rows
            rows = rows[np.argsort(interleaved(np.arange(len(rows))[:, None], count)[:, 0])]
        return rows

    with torch.no_grad():
        want = quantized(net, kind, raw_of)(torch.tensor([list(range(1, 40))])).logits[0].numpy()
    assert np.abs(stored[0] - want).max() / np.abs(want).max() < 2e-3
    if weights == "q8":  # a file of the package's own blocks: made again, they are the same
        again = convert(tmp_path / "model", tmp_path / "q8.gguf", "--type", "q8_0", "--no-tokenizer")
        assert (logits(again, tokens, "--weights", "stored").read_bytes()
                == logits(again, tokens, "--weights", "q8").read_bytes())


@pytest.mark.parametrize("weights", ["f32", *FORMATS])
def test_verify(trained, weights):
    out, _ = detour("verify", trained[0], "--tokens", 200, "--weights", weights)
    assert b"Gemm = scalar reference" in out


def test_memory(tmp_path):
    """Eight bits need less than a third of the memory, from the file on."""
    CASES["large"] = ("Llama", {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6,
                                "head_dim": 64, "vocab_size": 64})
    save("large", tmp_path / "model")
    tokens = write_tokens(tmp_path / "ids", [[1, 2, 3]])

    def peak(*flags):
        script = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
                  "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
        run = subprocess.run([sys.executable, "-c", script, os.environ["DETOUR_BIN"], "logits", "--model",
                              str(tmp_path / "model"), "--tokens", str(tokens), "--out", str(tmp_path / "out"), *flags],
                             capture_output=True, text=True, check=True)
        return int(run.stdout.split()[-1]) * 1024

    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    f32, q8 = peak("--weights", "f32"), peak("--weights", "q8")
    assert size > 3e8 and f32 - q8 > 0.6 * size


def test_unknown_formats(tmp_path):
    save("blocks", tmp_path / "model")
    tokens = write_tokens(tmp_path / "ids", [[1, 2]])
    expect_error("logits", "--model", tmp_path / "model", "--tokens", tokens, "--out", tmp_path / "out", "--weights", "q3",
                 says="--weights: expected f32, bf16, q8, q4, q4min or stored, got 'q3'")
    assert not (tmp_path / "out").exists()
