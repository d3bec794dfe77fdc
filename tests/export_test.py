"""Exported model directories in transformers: config.json with `auto_map`, beside it configuration_detour.py and
modeling_detour.py, against the program: logits of every method, padded batches, the cache, `generate`. Dense models are
plain Llama. The program is found in DETOUR_BIN.

Logits are held to 1e-4 of the largest (the same function in another order of float32 operations), the cache to 1e-5.
"""

import functools
import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch
from detour_e2e import FOLDER, detour, logits, tokenizer, train
from methods_test import (LENGTHS, SERVING, blocks, dllm, dtrnet, early_exit, mod, moe, recursion, sequences, skip,
                          tokens, write_model)
from safetensors.numpy import load_file

os.environ["HF_HOME"] = str(FOLDER / "hugging_face")  # where transformers keeps the modules that it loads
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import reference_config  # noqa: E402
from compare_logits import relative_error  # noqa: E402

logging.disable_progress_bar()
torch.set_num_threads(1)
torch.set_grad_enabled(False)

RANDOM = {"decider": "random", "share": 0.4, "decider_seed": 2**32 - 5}
WINDOW = {"bypass": "window", "window": 6, "sink": 3}
ALL = {"layers": [0, 1, 2, 3]}
ROPE = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}  # transformers 5's key
# Beside those of methods_test.py: name -> (`routing`, other keys of config.json)
MORE = {
    "early_exit": (early_exit(), {}),
    "random": (dtrnet(**RANDOM), {}),
    "dtrnet_scaled": (dtrnet(bypass="constant", value_scale=True, estimator="ste"), {}),
    "random_reserved": (dtrnet(bypass="constant", reserved=4, **RANDOM), {}),
    "random_seed": (dllm(**RANDOM | {"decider_seed": 1}), {}),
    "skip_random": (skip(**RANDOM), {}),
    "skip_constant": (skip(bypass="constant", kv="executed", scorer="norm_mlp", hidden=8, estimator="prob_gate"), {}),
    "mod_random": (mod(**RANDOM), {}),
    "mod_frequency": (mod(decider="frequency", share=0.4), {}),
    "moe_random": (moe(**RANDOM), {}),
    "moe_every_nth": (moe(decider="every_nth", normalize=False), {}),
    "moe_frequency": (moe(decider="frequency", top_k=1), {}),
    "moe_skip": ([moe(layers=[0, 1]), skip(layers=[2, 3])], {}),
    "blocks_random": (blocks(decider="random", decider_seed=2**40 + 3), {}),
    "recursion_random": (recursion(recursions=3, layers=[1, 2, 3], **RANDOM), {}),
    "recursion_token_random": (recursion(choice="token", **ALL, **RANDOM), {}),
    "recursion_skip": ([recursion(**ALL), skip(layers=[0, 2, 3], kv="executed")], {}),
    "dllm_window": ([dllm(layers=[1, 2], estimator="soft"), dtrnet(layers=[1, 3], **WINDOW)], {}),
    "rope": (dtrnet(), {"rope_theta": 500.0}),
    "rope_parameters": (dtrnet(), ROPE),
}
CASES = SERVING | MORE
FAMILIES = ["dtrnet_reserved", "dllm", "skip_executed", "mod_bce", "moe_bias_shared", "blocks", "recursion",
            "recursion_token", "early_exit", "dtrnet_window", "frequency", "mod_dtrnet"]


def written(name, routing, keys):
    """A directory of the program with random weights; keys of None are left out of its config.json."""
    directory = write_model(name, routing, keys)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return directory


def export(source, target):
    """What `detour convert` makes of a directory."""
    detour("convert", source, target)
    return target


def with_defaults(config):
    methods = reference_config.Config.from_dict(config).methods
    return [{"method": m.name, "layers": list(m.layers), **m.options} for m in methods]


def load(directory, kind=AutoModelForCausalLM):
    """The model of an exported directory; its tensors must be those of the file."""
    flags = {"trust_remote_code": True} if kind is AutoModelForCausalLM else {}
    loaded, info = kind.from_pretrained(directory, output_loading_info=True, **flags)
    assert not any(info.values()), info
    return loaded.eval()


@functools.cache
def model(name):
    """(The program's directory, the exported model) of a case, random weights."""
    source = written(f"export_{name}", *CASES[name])
    # To find and import the two files takes longer than all else: most cases share their class.
    kind = AutoModelForCausalLM if name in FAMILIES else type(model(FAMILIES[0])[1])
    return source, load(export(source, FOLDER / f"exported_{name}"), kind)


@functools.cache
def expected(name):
    """The program's logits, of each sequence."""
    values = load_file(logits(model(name)[0], tokens(), "--threads", 1))["logits"]
    return [torch.from_numpy(rows[:n]) for rows, n in zip(values, LENGTHS, strict=True)]


def padded(left, pad=7):
    """The sequences in a batch, and its mask; padding is text, for who looks at it."""
    width = max(LENGTHS)
    ids, mask = torch.full((len(LENGTHS), width), pad), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for b, sequence in enumerate(sequences()):
        where = slice(width - len(sequence), None) if left else slice(len(sequence))
        ids[b, where], mask[b, where] = torch.tensor(sequence), 1
    return ids, mask


def assert_equal(got, mask, reference, tolerance, what):
    for b, values in enumerate(reference):
        error = relative_error(got[b][mask[b] == 1], values)
        assert error <= tolerance, (what, LENGTHS[b], error)
    assert not got[mask == 0].any()


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    _, exported = model(name)
    ids, mask = padded(left=False)
    assert_equal(exported(ids, attention_mask=mask, use_cache=False).logits, mask, expected(name), 1e-4, "batch")


@pytest.mark.parametrize("name", CASES)
def test_padding_and_cache(name):
    """Padded left, and in pieces, of which some have no token of a sequence: what one sequence alone gives."""
    exported = model(name)[1]
    alone = [exported(torch.tensor([s])).logits[0] for s in sequences()]
    ids, mask = padded(left=True)
    assert_equal(exported(ids, attention_mask=mask).logits, mask, alone, 1e-5, "left")
    cache, pieces, begin = None, [], 0
    for size in (30, 1, 31, 1, 1):
        out = exported(ids[:, begin:begin + size], attention_mask=mask[:, :begin + size], past_key_values=cache)
        cache, begin = out.past_key_values, begin + size
        pieces.append(out.logits)
    assert begin == ids.shape[1] == cache.get_seq_length()
    assert_equal(torch.cat(pieces, 1), mask, alone, 1e-5, "cached")


PROMPTS = ["The state of the union", "I", "Fellow citizens of the Senate, and of the House of Representatives: "]
NEW = 24


def left_padded(prompts, pad=3):
    width = max(map(len, prompts))
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return torch.tensor([[pad] * (width - len(p)) + p for p in prompts]), mask


def near_tie(exported, sequence, token):
    """Whether the token is as good as the likeliest one, to the accuracy of the logits."""
    values = exported(torch.tensor([sequence])).logits[0, -1]
    return values.max() - values[token] <= 1e-4 * values.abs().max()


@functools.cache
def answers(name):
    """Ids of prompts and greedy answers by the program."""
    source = model(name)[0]
    for path in tokenizer().iterdir():
        shutil.copy(path, source)
    flags = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    stdout, _ = detour("generate", "--model", source, *flags, "--temp", 0, "-n", NEW, "--ignore-eos", "--json",
                       "--threads", 1)
    lines = [json.loads(line) for line in stdout.splitlines()]
    return [line["prompt_tokens"] for line in lines], [line["tokens"] for line in lines]


@pytest.mark.parametrize("name", [*FAMILIES, "dtrnet", "random", "blocks_random", "recursion_window"])
def test_generate(name):
    """A batch of prompts, with the cache: the program's tokens, up to near ties."""
    _, exported = model(name)
    prompts, tokens_expected = answers(name)
    ids, mask = left_padded(prompts)
    got = exported.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=3)
    assert len(set(sum(tokens_expected, []))) > (1 if exported.config.tie_word_embeddings else NEW // 2)
    assert got.shape == (len(prompts), ids.shape[1] + NEW)
    for prompt, tokens_got, expect in zip(prompts, got[:, ids.shape[1]:].tolist(), tokens_expected, strict=True):
        wrong = [i for i in range(NEW) if tokens_got[i] != expect[i]]
        assert not wrong or near_tie(exported, prompt + expect[:wrong[0]], tokens_got[wrong[0]]), (wrong, prompt)


@pytest.mark.parametrize("name", ["dtrnet_reserved", "recursion_window"])
def test_ways_to_generate(name):
    """Without the cache, in chunks of the prompt, by beams, going on with a cache: equal ids."""
    _, exported = model(name)
    prompts, _ = answers(name)
    ids, mask = left_padded(prompts)
    flags = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 3}
    plain = exported.generate(ids, attention_mask=mask, **flags)
    assert torch.equal(plain, exported.generate(ids, attention_mask=mask, use_cache=False, **flags))
    assert torch.equal(plain, exported.generate(ids, attention_mask=mask, prefill_chunk_size=7, **flags))
    beams = exported.generate(ids, attention_mask=mask, num_beams=3, **flags)
    assert torch.equal(beams, exported.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **flags))
    assert not torch.equal(beams, plain)
    begun = exported.generate(ids, attention_mask=mask, return_dict_in_generate=True, **flags | {"max_new_tokens": 5})
    mask = torch.cat([mask, torch.ones(len(mask), 5, dtype=torch.long)], 1)
    went_on = exported.generate(begun.sequences, attention_mask=mask, past_key_values=begun.past_key_values,
                                **flags | {"max_new_tokens": 7})
    assert torch.equal(went_on, plain)


def test_end_of_text():
    """`eos_token_id` of config.json ends answers; without it none does."""
    name = "dtrnet_reserved"
    exported = model(name)[1]
    prompts, tokens_expected = answers(name)
    assert exported.generation_config.eos_token_id is None
    stop = tokens_expected[0][3]
    target = shutil.copytree(FOLDER / f"exported_{name}", FOLDER / "exported_eos")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"eos_token_id": stop, "pad_token_id": 3}))
    got = load(target).generate(torch.tensor(prompts[:1]), max_new_tokens=NEW, do_sample=False)[0].tolist()
    assert got == prompts[0] + tokens_expected[0][:tokens_expected[0].index(stop) + 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_again(name):
    source, exported = model(name)
    target = FOLDER / f"saved_{name}"
    exported.save_pretrained(target)
    assert {p.name for p in target.glob("*.py")} == {"configuration_detour.py", "modeling_detour.py"}
    expect = pathlib.Path(logits(source, tokens(), "--threads", 1)).read_bytes()
    before = load_file(source / "model.safetensors")
    for directory in (FOLDER / f"exported_{name}", target):  # the program loads both
        after = load_file(directory / "model.safetensors")
        assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)
        assert pathlib.Path(logits(directory, tokens(), "--threads", 1)).read_bytes() == expect
    ids, mask = padded(left=False)
    again = load(target)
    assert again.config.routing == exported.config.routing
    # Equal weights; where a tensor lies in its file torch's order of sums may depend on.
    assert relative_error(again(ids, attention_mask=mask).logits, exported(ids, attention_mask=mask).logits) <= 1e-6


def test_loss_and_last_logits():
    _, exported = model("dtrnet")
    ids, mask = padded(left=False)
    out = exported(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    targets = torch.cat([torch.tensor(s[1:], dtype=torch.long) for s in sequences()])
    values = torch.cat([rows[:-1] for rows in expected("dtrnet")])
    assert abs(out.loss - torch.nn.functional.cross_entropy(values, targets)) < 1e-5
    assert relative_error(exported(ids, attention_mask=mask, logits_to_keep=2).logits, out.logits[:, -2:]) <= 1e-6
    assert relative_error(exported(ids, attention_mask=mask, return_dict=False)[0], out.logits) <= 1e-6


def assert_as_the_program(exported, directory):
    values = torch.from_numpy(load_file(logits(directory, tokens(), "--threads", 1))["logits"])
    ids, mask = padded(left=False)
    got = exported(ids, attention_mask=mask).logits
    for b, length in enumerate(LENGTHS):
        assert relative_error(got[b, :length], values[b, :length]) <= 1e-4, length


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 1}, ROPE])
def test_dense_is_llama(keys):
    """A dense directory as it is, and exported."""
    name = f"dense_{'_'.join(keys)}"
    directory = written(name, None, keys)
    llama = AutoModelForCausalLM.from_pretrained(directory)
    assert isinstance(llama, LlamaForCausalLM)
    assert_as_the_program(llama.eval(), directory)
    exported = load(export(directory, FOLDER / f"exported_{name}"))
    assert isinstance(exported, LlamaForCausalLM)
    assert_as_the_program(exported, directory)


def test_dense_that_is_no_llama():
    """transformers' Llama wants a hidden size that the heads divide: else it is a model of this kind, without routers."""
    directory = written("dense_odd", None, {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16})
    exported = load(export(directory, FOLDER / "exported_dense_odd"))
    assert type(exported).__name__ == "DetourForCausalLM"
    assert_as_the_program(exported, directory)


@pytest.mark.parametrize("method,flags", [("dtrnet+moe", ("--routing", "moe.experts=4")), ("mod", ()),
                                          ("skip", ("--routing", "kv=executed"))])
def test_trained_directories(method, flags):
    """What `detour train` writes, exported."""
    source = train(FOLDER / f"trained_{method}", method, "--max-steps", 2, "--threads", 1, *flags)
    target = export(source, FOLDER / f"exported_{method}")
    assert_as_the_program(load(target), source)


def test_trained_dense_directory():
    source = train(FOLDER / "trained_dense", "dense", "--max-steps", 2, "--threads", 1)
    llama = AutoModelForCausalLM.from_pretrained(source)
    assert isinstance(llama, LlamaForCausalLM)
    assert_as_the_program(llama.eval(), source)


@pytest.mark.parametrize("routing,says", [
    (mod(causal="none"), "cannot serve"), (recursion(causal="none"), "cannot serve"), ({"method": "guess"}, "guess"),
    ({"method": "dtrnet"}, "no layers"),
])
def test_what_cannot_be_is_refused(routing, says):
    model("dtrnet")
    target = shutil.copytree(FOLDER / "exported_dtrnet", FOLDER / f"refused_{len(list(FOLDER.glob('refused_*')))}")
    config = json.loads((target / "config.json").read_text()) | {"routing": routing}
    if "causal" in routing:
        config["routing"] = with_defaults(config)
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says):
        load(target)


def test_wrong_calls():
    _, exported = model("dtrnet")
    ids = torch.tensor([sequences()[3]])
    for wrong in ({"attention_mask": torch.ones(1, 1, 17, 17)}, {"attention_mask": torch.ones(1, 3)},
                  {"past_key_values": exported(ids.repeat(2, 1)).past_key_values}):
        with pytest.raises(ValueError, match="expected"):
            exported(ids, **wrong)
    for flags in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises((ValueError, NotImplementedError)):
            exported.generate(ids, max_new_tokens=20, do_sample=False, **flags)
