"""`detour convert`: Hugging Face directories and GGUF files, both ways. Weights come back bit for bit, the packages
`gguf`, transformers and safetensors read what is written, and files that lie end in one line. Uses DETOUR_BIN."""
import json
import pathlib
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

import detour_e2e as e2e
from families_test import CASES, LLAMA3, SIZES, assert_equal_logits, save, tokens
from robust_fixtures import error_line, ok, run

CASES |= {
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3_8192": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 5e5,
                                                           "factor": 8.0}}),
    # Of these transformers does not read the width of a head from a GGUF file.
    "qwen2_even": ("Qwen2", {"hidden_size": 64, "tie_word_embeddings": True}),
    "qwen3_wide": ("Qwen3", {"head_dim": 128}),
}
# Those that a GGUF file can hold; llama3 only as Llama 3 has it, or the file names the first length.
GGUF_CASES = ["llama", "llama_tied", "llama_biases", "llama_linear", "llama_dynamic", "llama3", "llama3_8192", "llama_yarn",
              "mistral_full", "qwen2", "qwen2_even", "qwen3", "qwen3_wide"]
READ_BY_TRANSFORMERS = ["llama", "llama_tied", "qwen2_even", "qwen3_wide"]
TEXTS = ["Fellow citizens of the Senate,\n and of the House — 1,234 naïve 東京 🙂", " a  b\t<|endoftext|>x", ""]


def convert(*args):
    e2e.detour("convert", *args)
    return args[1]


def refused(*args, says=(), **kwargs):
    result = run(*args, timeout=30, **kwargs)
    error_line(result, *says)
    assert result.stdout == "" and result.stderr.count("\n") == 1, result.stderr


def weights(directory):
    """name -> (type, shape, bytes)"""
    return {n: (t.dtype.name, t.shape, t.tobytes()) for n, t in load_file(directory / "model.safetensors").items()}


def logits_bytes(model, tmp_path, name):
    path, _ = tokens(tmp_path)
    out = tmp_path / f"{name}.logits"
    e2e.detour("logits", "--model", model, "--tokens", path, "--out", out, "--threads", 1)
    return out.read_bytes()


@pytest.mark.parametrize("name", GGUF_CASES)
def test_there_and_back(name, tmp_path):
    """HF -> GGUF in F32 -> HF: the same weights and logits, at every station."""
    model = save(name, tmp_path / "model")
    file = convert(tmp_path / "model", tmp_path / "m.gguf", "--no-tokenizer")
    back = convert(file, tmp_path / "back", "--no-tokenizer")
    assert weights(back) == weights(tmp_path / "model")
    expected = logits_bytes(tmp_path / "model", tmp_path, "model")
    assert logits_bytes(file, tmp_path, "gguf") == expected
    assert logits_bytes(back, tmp_path, "back") == expected
    again = convert(file, tmp_path / "again.gguf", "--no-tokenizer")
    assert tensors_of(again) == tensors_of(file)
    assert_equal_logits(transformers.AutoModelForCausalLM.from_pretrained(back).eval(), back, tmp_path)
    if name in READ_BY_TRANSFORMERS:
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
        for (n, a), (_, b) in zip(sorted(read.named_parameters()), sorted(model.named_parameters()), strict=True):
            assert torch.equal(a, b), n
        assert_equal_logits(read.eval(), file, tmp_path)


def tensors_of(path):
    return {t.name: (t.tensor_type, list(t.shape), t.data.tobytes()) for t in GGUFReader(path).tensors}


def interleaved(w, heads):
    """Rows as llama.cpp's converter writes those of Q and K."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_types_of_gguf(kind, tmp_path):
    """Values and their order, by the gguf package; rows of 48 are no whole blocks of Q8_0."""
    CASES["wide"] = ("Llama", {"hidden_size": 64, "attention_bias": True})
    save("wide", tmp_path / "model")
    reader = GGUFReader(convert(tmp_path / "model", tmp_path / "m.gguf", "--type", kind, "--no-tokenizer"))
    source = load_file(tmp_path / "model" / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    assert len(reader.tensors) == len(source)
    for t in reader.tensors:
        name, = (n for n in source if names.get_name(n, (".weight", ".bias")) == t.name)
        values = source[name]
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            values = interleaved(values, heads)
        want = GGMLQuantizationType[kind.upper()] if values.ndim == 2 else GGMLQuantizationType.F32
        if kind == "q8_0" and values.shape[-1] % 32:
            want = GGMLQuantizationType.F16
        assert t.tensor_type == want, t.name
        got = dequantize(t.data, t.tensor_type).reshape(values.shape)
        if want == GGMLQuantizationType.F16:
            assert np.array_equal(got, values.astype(np.float16).astype(np.float32))
        else:
            assert np.array_equal(got, dequantize(quantize(values, want), want)), t.name
    assert any(t.tensor_type.name == kind.upper() for t in reader.tensors)
    field = reader.get_field("llama.attention.head_count_kv")
    assert field.contents() == 2 and reader.get_field("general.file_type").contents() == {
        "f32": 0, "f16": 1, "q8_0": 7}[kind]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision(dtype, tmp_path):
    """What was stored in half precision in shards comes back to the bit as one file of that type."""
    torch_type = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    model = save("qwen2_moe", tmp_path / "model", torch_type, max_shard_size="30KB")
    out = convert(tmp_path / "model", tmp_path / "out", "--type", dtype)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(info.values()) and loaded.dtype == torch_type
    for (n, a), (_, b) in zip(sorted(loaded.named_parameters()), sorted(model.named_parameters()), strict=True):
        assert torch.equal(a.float(), b), n
    assert logits_bytes(out, tmp_path, "out") == logits_bytes(tmp_path / "model", tmp_path, "model")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "smollm3", "mistral"])
def test_families(name, tmp_path):
    """Directories of families stay such directories; what GGUF cannot hold is said in one line."""
    save(name, tmp_path / "model")
    out = convert(tmp_path / "model", tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert_equal_logits(model.eval(), out, tmp_path)
    refused("convert", tmp_path / "model", tmp_path / "m.gguf", says=["Hint: --to hf"])
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("case", ["dtrnet_gqa", "dtrnet_all_layers", "dtrnet_k32_ragged"])
def test_public_dtrnet_checkpoints(case, tmp_path):
    """Directories of the public DTRNet code: loaded by transformers and by the program, with the same weights."""
    source = e2e.GOLDEN / case
    out = convert(source, tmp_path / "out")
    assert weights(out) == weights(source)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "detour" and config["routing"]["method"] == "dtrnet"
    ids = torch.randint(0, config["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(3))
    path = e2e.write_tokens(tmp_path / "ids.safetensors", ids.tolist())
    ours = load_file(e2e.logits(out, path, "--threads", 1))["logits"]
    assert np.array_equal(ours, load_file(e2e.logits(source, path, "--threads", 1))["logits"])
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    refused("convert", source, tmp_path / "m.gguf", says=["dense", "dtrnet"])


# --- Tokenizers

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ eos_token }}"


def with_tokenizer(tmp_path, change=lambda tokenizer, config: None):
    """A dense model with the tokenizer that the program trained."""
    CASES["talks"] = ("Llama", {"vocab_size": 520, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    save("talks", tmp_path / "model")
    for path in e2e.tokenizer().iterdir():
        shutil.copy(path, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()  # transformers': without ends
    tokenizer, config = (tmp_path / "model" / n for n in ("tokenizer.json", "tokenizer_config.json"))
    contents = [json.loads(p.read_text()) for p in (tokenizer, config)]
    change(*contents)
    for path, content in zip((tokenizer, config), contents):
        path.write_text(json.dumps(content))
    return tmp_path / "model"


def ids_of(model, text):
    return e2e.detour("tokenizer", "encode", "--model", model, "--ids-only", "--add-special-tokens",
                      stdin=text.encode())[0]


PRE = {
    "gpt-2": None,
    "smollm": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
}


@pytest.mark.parametrize("pre", PRE)
@pytest.mark.parametrize("bos", [False, True])
def test_tokenizers(pre, bos, tmp_path):
    def change(tokenizer, config):
        tokenizer["pre_tokenizer"] = PRE[pre] or tokenizer["pre_tokenizer"]
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 512, "content": "<tool>", "special": False})
        config["chat_template"] = TEMPLATE
        if bos:
            token = tokenizer["added_tokens"][0]
            tokenizer["post_processor"] = {
                "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "single": [{"SpecialToken": {"id": token["content"], "type_id": 0}},
                           {"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {token["content"]: {"id": token["content"], "ids": [token["id"]],
                                                      "tokens": [token["content"]]}}}

    model = with_tokenizer(tmp_path, change)
    file = convert(model, tmp_path / "m.gguf")
    fields = GGUFReader(file).fields
    assert fields["tokenizer.ggml.pre"].contents() == pre
    assert len(fields["tokenizer.ggml.tokens"].data) == 520
    back, copied = convert(file, tmp_path / "back"), convert(model, tmp_path / "copied")
    again = convert(file, tmp_path / "again.gguf", "--type", "f16")
    texts = TEXTS + ["2024<tool>7"]
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    for text in texts:
        expected = ids_of(model, text)
        assert expected.split() == [str(i).encode() for i in theirs(text)["input_ids"]]
        for other in (file, back, copied, again):
            assert ids_of(other, text) == expected, (other, text)
    messages = [{"role": "user", "content": "hi"}]
    for directory in (back, copied):
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert [tokenizer(t)["input_ids"] for t in texts] == [theirs(t)["input_ids"] for t in texts]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>hi<|endoftext|>"
        config = json.loads((directory / "config.json").read_text())
        assert config["eos_token_id"] == config["bos_token_id"] == 0 and config["pad_token_id"] is None
        assert transformers.AutoModelForCausalLM.from_pretrained(directory).generation_config.eos_token_id == 0
    a, b = (e2e.detour("generate", "--model", m, "--prompt", "The", "--temp", 0, "-n", 12, "--json")[0]
            for m in (model, file))
    assert json.loads(a)["tokens"] == json.loads(b)["tokens"]


@pytest.mark.parametrize("change,says", [
    (lambda t, c: t.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
     "no name in GGUF"),
    (lambda t, c: t["added_tokens"][0].update(lstrip=True), "rules"),
    (lambda t, c: t["added_tokens"].append(t["added_tokens"][0] | {"id": 520, "content": "<x>"}), "521 tokens"),
])
def test_tokenizers_that_gguf_cannot_hold(change, says, tmp_path):
    model = with_tokenizer(tmp_path, change)
    refused("convert", model, tmp_path / "m.gguf", says=[says, "--no-tokenizer"])
    assert not (tmp_path / "m.gguf").exists()
    convert(model, tmp_path / "m.gguf", "--no-tokenizer")
    refused("generate", "--model", tmp_path / "m.gguf", "--prompt", "x", says=["tokenizer"])


def test_templates_in_files(tmp_path):
    """chat_template.jinja and its siblings go along; several templates go through GGUF."""
    model = with_tokenizer(tmp_path, lambda t, c: c.update(chat_template=[
        {"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]))
    file = convert(model, tmp_path / "m.gguf")
    assert GGUFReader(file).fields["tokenizer.chat_template.tool_use"].contents() == "tools"
    back = json.loads((convert(file, tmp_path / "back") / "tokenizer_config.json").read_text())
    assert back["chat_template"] == [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]
    (model / "chat_template.jinja").write_text("plain")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "x.jinja").write_text("more")
    (model / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    out = convert(model, tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == "plain"
    assert (out / "additional_chat_templates" / "x.jinja").read_text() == "more"
    assert (out / "generation_config.json").exists()
    assert GGUFReader(convert(model, tmp_path / "n.gguf")).fields["tokenizer.chat_template"].contents() == "plain"


def test_shards_and_training_from_a_gguf(tmp_path):
    """prepare takes the tokenizer of a GGUF file, and leaves it beside the shards."""
    file = convert(with_tokenizer(tmp_path), tmp_path / "m.gguf")
    e2e.detour("prepare", e2e.corpus(), "--tokenizer", file, "--out-dir", tmp_path / "shards")
    e2e.detour("prepare", e2e.corpus(), "--tokenizer", tmp_path / "model", "--out-dir", tmp_path / "expected")
    for path in (tmp_path / "expected").glob("*.bin"):
        got = (tmp_path / "shards" / path.name).read_bytes()
        assert path.read_bytes()[64:] == got[64:]  # the head says how many tokens there are, unused ones included
    assert ids_of(tmp_path / "shards", TEXTS[0]) == ids_of(file, TEXTS[0])
    text = tmp_path / "text.txt"
    text.write_text("The state of the union is what it was. " * 30)
    results = [json.loads(e2e.detour("eval", "--model", m, "--text", text, "--seq-len", 64, "--json")[0])
               for m in (tmp_path / "model", file)]
    assert results[0]["loss"] == results[1]["loss"]


# --- The command

def test_places(tmp_path):
    save("llama_tied", tmp_path / "model")
    model, file, out = tmp_path / "model", tmp_path / "m.gguf", tmp_path / "out"
    out.mkdir()
    convert(model, out)  # an empty directory is nobody's
    convert(model, file, "--no-tokenizer")
    before = file.read_bytes()
    for target in (out, file):
        refused("convert", model, target, "--no-tokenizer", says=["--overwrite"])
    convert(model, out, "--type", "bf16", "--overwrite")
    convert(model, file, "--type", "f16", "--overwrite", "--no-tokenizer")
    assert file.read_bytes() != before
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    refused("convert", model, home, "--overwrite", says=["model directory"])
    refused("convert", model, home, "--overwrite", "--to", "gguf", says=["a file"])
    refused("convert", model, model, "--overwrite", says=["another place"])
    refused("convert", model, tmp_path / "x", "--type", "q8_0", says=["q8_0"])
    refused("convert", model, tmp_path / "x.gguf", "--type", "bf16", says=["bf16"])
    refused("convert", tmp_path / "nothing", tmp_path / "x", says=["nothing"])
    convert(model, tmp_path / "plain", "--to", "gguf", "--no-tokenizer")
    assert (tmp_path / "plain").read_bytes() == before
    assert (home / "letter.txt").read_text() == "dear"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") or p.name in ("x", "x.gguf")]


def test_failed_writing_leaves_nothing(tmp_path):
    save("llama_tied", tmp_path / "model")
    out = tmp_path / "out"
    for point in ("write:1", "write:3", "fsync:2", "rename:1"):
        for target in (out / "dir", out / "m.gguf"):
            out.mkdir(exist_ok=True)
            refused("convert", tmp_path / "model", target, "--no-tokenizer", env={"DETOUR_FAIL_POINT": point})
            assert not list(out.iterdir()), point
    ok("convert", tmp_path / "model", out / "dir")


def test_values_that_a_type_cannot_hold(tmp_path):
    save("llama_tied", tmp_path / "model")
    values = load_file(tmp_path / "model" / "model.safetensors")
    values["model.layers.1.mlp.up_proj.weight"][3, 5] = 7e4
    save_file(values, tmp_path / "model" / "model.safetensors")
    refused("convert", tmp_path / "model", tmp_path / "out", "--type", "f16", says=["up_proj", "bf16"])
    refused("convert", tmp_path / "model", tmp_path / "m.gguf", "--type", "f16", "--no-tokenizer", says=["ffn_up"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_routed_models_without_a_class(tmp_path):
    save("qwen3", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["routing"] = {"method": "early_exit"}
    path.write_text(json.dumps(config))
    refused("convert", tmp_path / "model", tmp_path / "out", says=["norms of queries and keys"])


# --- Files that lie

D, F, V, L, H, G = 32, 48, 40, 2, 4, 2


def metadata():
    keys = {"vocab_size": V, "context_length": 64, "embedding_length": D, "block_count": L, "feed_forward_length": F,
            "attention.head_count": H, "attention.head_count_kv": G, "rope.dimension_count": D // H,
            "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4}
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    return {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in keys.items()} | ends | vocabulary()


def vocabulary():
    letters = [chr(c) for c in range(97, 97 + V - 3)]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *letters], "tokenizer.ggml.merges": []}


def tensors():
    rng = np.random.default_rng(1)
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,), "output.weight": (V, D)}
    for i in range(L):
        for name, shape in {"attn_norm": (D,), "attn_q": (D, D), "attn_k": (D // 2, D), "attn_v": (D // 2, D),
                            "attn_output": (D, D), "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D),
                            "ffn_down": (D, F)}.items():
            shapes[f"blk.{i}.{name}.weight"] = shape
    return {n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}


def write(path, keys, arrays):
    writer = GGUFWriter(path, keys.pop("general.architecture", "llama"))
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            if value:
                writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value < 0:
            writer.add_int32(key, value)
        else:
            writer.add_uint64(key, value)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def without(name):
    return lambda keys, arrays: [d.pop(name, None) for d in (keys, arrays)]


def key(name, value):
    return lambda keys, arrays: keys.__setitem__(name, value)


def tensor(name, *shape):
    return lambda keys, arrays: arrays.__setitem__(name, np.zeros(shape, np.float32))


def test_the_file_before_it_lies(tmp_path):
    file = write(tmp_path / "m.gguf", metadata(), tensors())
    out = convert(file, tmp_path / "out")
    q = load_file(out / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(interleaved(q, H), tensors()["blk.0.attn_q.weight"])
    config = json.loads((out / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["head_dim"] == 8 and config["eos_token_id"] == 2
    info = json.loads(e2e.detour("info", file, "--json")[0])
    assert info["parameters"] == sum(t.size for t in tensors().values())
    e2e.detour("verify", file, "--tokens", 200)
    lists = metadata() | {"llama.attention.head_count_kv": [G] * L, "llama.feed_forward_length": [F] * L}
    assert weights(convert(write(tmp_path / "n.gguf", lists, tensors()), tmp_path / "n")) == weights(out)


LIES = {
    "architecture": (key("general.architecture", "gpt2"), "llama, qwen2, qwen3"),
    "architecture_of_others": (key("general.architecture", "qwen2"), "qwen2."),
    "no_layers": (without("llama.block_count"), "llama.block_count"),
    "zero_layers": (key("llama.block_count", 0), "llama.block_count"),
    "more_layers": (key("llama.block_count", 3), "blk.2."),
    "fewer_layers": (key("llama.block_count", 1), "blk.1."),
    "layers_huge": (key("llama.block_count", 2**63), "llama.block_count"),
    "layers_negative": (key("llama.block_count", -2), "llama.block_count"),
    "layers_text": (key("llama.block_count", "2"), "llama.block_count"),
    "no_width": (without("llama.embedding_length"), "llama.embedding_length"),
    "width": (key("llama.embedding_length", 64), "the width of a head, 16"),
    "width_huge": (key("llama.embedding_length", 1 << 17), "["),
    "no_ffn": (without("llama.feed_forward_length"), "llama.feed_forward_length"),
    "ffn": (key("llama.feed_forward_length", 40), "ffn_gate"),
    "ffn_by_layer": (key("llama.feed_forward_length", [48, 40]), "layers of different widths"),
    "no_heads": (without("llama.attention.head_count"), "llama.attention.head_count"),
    "heads": (key("llama.attention.head_count", 5), "num_attention_heads 5"),
    "heads_zero": (key("llama.attention.head_count", 0), "llama.attention.head_count"),
    "kv_heads": (key("llama.attention.head_count_kv", 3), "num_key_value_heads"),
    "kv_heads_more": (key("llama.attention.head_count_kv", 8), "llama.attention.head_count_kv"),
    "kv_heads_other": (key("llama.attention.head_count_kv", 4), "attn_k"),
    "head_width": (key("llama.attention.key_length", 16), "rope.dimension_count"),
    "value_width": (key("llama.attention.value_length", 16), "value_length"),
    "no_eps": (without("llama.attention.layer_norm_rms_epsilon"), "epsilon"),
    "eps_nan": (key("llama.attention.layer_norm_rms_epsilon", float("nan")), "epsilon"),
    "eps_negative": (key("llama.attention.layer_norm_rms_epsilon", -1.0), "rms_norm_eps"),
    "no_context": (without("llama.context_length"), "llama.context_length"),
    "theta": (key("llama.rope.freq_base", 0.0), "rope_theta"),
    "theta_infinite": (key("llama.rope.freq_base", float("inf")), "freq_base"),
    "vocab": (key("llama.vocab_size", 50), "token_embd"),
    "vocab_huge": (key("llama.vocab_size", 1 << 40), "vocab_size"),
    "experts": (key("llama.expert_count", 4), "experts"),
    "window": (key("llama.attention.sliding_window", 16), "sliding_window"),
    "unknown_key": (key("llama.logit_scale", 2.0), "logit_scale"),
    "split": (key("split.count", 2), "2 parts"),
    "scaling": (key("llama.rope.scaling.type", "longrope"), "longrope"),
    "scaling_factor": (key("llama.rope.scaling.type", "linear"), "factor"),
    "eos_beyond": (key("tokenizer.ggml.eos_token_id", V), "eos_token_id"),
    "no_embedding": (without("token_embd.weight"), "token_embd.weight"),
    "no_tensor": (without("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight"),
    "no_norm": (without("output_norm.weight"), "output_norm.weight"),
    "more_tensors": (tensor("blk.0.ffn_gate_exps.weight", 4, 4), "ffn_gate_exps"),
    "shape": (tensor("blk.1.ffn_down.weight", F, D), "blk.1.ffn_down.weight"),
    "embedding_dims": (tensor("token_embd.weight", V * D), "token_embd.weight"),
    "factors": (tensor("rope_freqs.weight", D // H // 2), "rope_freqs.weight"),
    "factors_shape": (tensor("rope_freqs.weight", 7), "rope_freqs.weight"),
}


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie(lie, tmp_path):
    keys, arrays = metadata(), tensors()
    change, says = LIES[lie]
    change(keys, arrays)
    write(tmp_path / "m.gguf", keys, arrays)
    refused("convert", tmp_path / "m.gguf", tmp_path / "out", says=["m.gguf", says])
    assert not (tmp_path / "out").exists()


VOCABULARIES = {
    "none": (without("tokenizer.ggml.model"), "no tokenizer"),
    "no_tokens": (without("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens"),
    "model": (key("tokenizer.ggml.model", "bert"), "bert"),
    "pre": (key("tokenizer.ggml.pre", "chatglm"), "chatglm"),
    "merges": (key("tokenizer.ggml.merges", ["a zz"]), "zz"),
    "merges_kind": (key("tokenizer.ggml.merges", 5), "tokenizer.ggml.merges"),
    "types": (key("tokenizer.ggml.token_type", [1, 1]), "token types"),
}


@pytest.mark.parametrize("lie", VOCABULARIES)
def test_tokenizers_that_lie(lie, tmp_path):
    keys = metadata()
    change, says = VOCABULARIES[lie]
    change(keys, {})
    file = write(tmp_path / "m.gguf", keys, tensors())
    refused("convert", file, tmp_path / "out", says=["m.gguf", says])
    refused("tokenizer", "encode", "--model", file, says=["m.gguf", says], input="abc")
    assert not (tmp_path / "out").exists()
    convert(file, tmp_path / "out", "--no-tokenizer")


@pytest.mark.parametrize("command", [("info",), ("verify",), ("logits", "--tokens", "x", "--out", "y", "--model"),
                                     ("generate", "--prompt", "x", "--model"), ("eval", "--text", "x", "--model"),
                                     ("tokenizer", "encode", "--model")])
@pytest.mark.parametrize("content", [b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16])
def test_heads_that_lie(command, content, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    refused(*command, path, says=["m.gguf"])


def test_half_a_file(tmp_path):
    file = pathlib.Path(write(tmp_path / "m.gguf", metadata(), tensors()))
    whole = file.read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused("convert", file, tmp_path / "out", says=["m.gguf"])
