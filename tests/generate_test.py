"""`detour generate`: answers depend on the prompt, its index and the options alone, and are what `detour logits`
implies. The program is found in DETOUR_BIN."""

import json
import os
import re
import signal
import subprocess

import numpy as np
import pytest
from detour_e2e import CONFIG, FOLDER, corpus, detour, expect_error, logits, model, tokenizer, train, write_tokens
from safetensors.numpy import load_file
from tokenizers import Tokenizer

PROMPTS = ["The state of the union", "I", "Fellow citizens of the Senate, and of the House of Representatives: " * 8,
           "état, 世界 👩‍👩‍👧", "a", "In the course of human events it is the duty of Congress to provide for the common",
           "no  blanks \t lost", "=== 2 (length)"]


def generate(*args, stdin=b"", method="dtrnet"):
    return detour("generate", "--model", model(method), *args, stdin=stdin)


def flags(prompts):
    return [flag for prompt in prompts for flag in ("--prompt", prompt)]


def answers(*args, prompts=PROMPTS, **kwargs):
    """(reason, text) of each of several prompts."""
    stdout = generate(*flags(prompts), *args, **kwargs)[0].decode()
    return parse(stdout, prompts)


def parse(stdout, prompts):
    pattern = "".join(f"=== {i + 1} \\((\\w+)\\)\n{re.escape(p)}(.*)\n" for i, p in enumerate(prompts))
    match = re.fullmatch(pattern, stdout, re.DOTALL)
    assert match, stdout
    return list(zip(match.groups()[::2], match.groups()[1::2]))


def one(prompt, *args, **kwargs):
    """The text after a single prompt."""
    stdout = generate("--prompt", prompt, *args, **kwargs)[0].decode()
    assert stdout.startswith(prompt) and stdout.endswith("\n")
    return stdout[len(prompt):-1]


def prompt_file(prompts, end="\n"):
    path = FOLDER / "prompts.txt"
    path.write_bytes(("\n".join(prompts) + end).encode())
    return path


GREEDY = ("--temp", 0, "-n", 30)
SAMPLED = ("--temp", 1.2, "--top-k", 200, "--top-p", 0.98, "--min-p", 0.0005, "--repetition-penalty", 1.1, "-n", 30)


def test_greedy_one_by_one():
    together = answers(*GREEDY)
    assert all(text for _, text in together)
    for prompt, (_, text) in zip(PROMPTS[2:4], together[2:4]):
        assert one(prompt, *GREEDY) == text


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_chunks_batches_and_threads_change_no_token(options):
    base = answers(*options)
    for variant in ("--prefill-chunk 1 --threads 1", "--prefill-chunk 7 --max-batch 3", "--max-batch 1 --simd avx2"):
        assert answers(*options, *variant.split()) == base, variant
    file, _ = generate("--prompts", prompt_file(PROMPTS), *options)
    assert parse(file.decode(), PROMPTS) == base
    stdin, _ = generate("--prompts", "-", *options, stdin="\n\n".join(PROMPTS).encode())
    assert stdin == file


def test_an_answer_depends_on_its_index_not_on_the_others():
    base = answers(*SAMPLED)
    others = [PROMPTS[0], "x", "Something else, and longer", *PROMPTS[3:6]]
    assert answers(*SAMPLED, prompts=others)[3:] == base[3:6]
    assert one(PROMPTS[0], *SAMPLED) == base[0][1]
    twice = answers(*SAMPLED, prompts=[PROMPTS[0]] * 2)
    assert twice[0] == base[0] != twice[1]


def test_seed():
    first = answers(*SAMPLED, "--seed", 7)
    assert answers(*SAMPLED, "--seed", 7) == first
    assert answers(*SAMPLED, "--seed", 8) != first
    assert answers(*SAMPLED, "--seed", 42) == answers(*SAMPLED)
    assert answers(*GREEDY, "--seed", 7, prompts=PROMPTS[:2]) == answers(*GREEDY, "--seed", 8, prompts=PROMPTS[:2])


def test_top_k_1_is_greedy():
    assert answers("--temp", 1.5, "--top-k", 1, "-n", 20) == answers("--temp", 0, "-n", 20)


@pytest.mark.parametrize("method,steps", [("dtrnet", 8), ("dense", 4)])
def test_greedy_is_the_argmax_of_a_full_recompute(method, steps):
    """With and without a repetition penalty, which makes the likeliest tokens vary."""
    hugging_face = Tokenizer.from_file(str(tokenizer() / "tokenizer.json"))
    penalty = 1.5
    sequences = [hugging_face.encode(p).ids for p in PROMPTS for _ in range(2)]
    starts = [len(s) for s in sequences]
    for _ in range(steps):
        tokens = write_tokens(FOLDER / "greedy.safetensors", sequences)
        out = logits(model(method), tokens, "--mode", "full")
        values = load_file(out)["logits"]
        out.unlink()
        for i, s in enumerate(sequences):
            last = values[i, len(s) - 1].copy()
            if i % 2:
                seen = np.unique(s)
                last[seen] = np.where(last[seen] > 0, last[seen] / np.float32(penalty),
                                      last[seen] * np.float32(penalty))
            s.append(int(np.argmax(last)))
    assert len({s[-1] for s in sequences}) > 2
    for odd, args in enumerate([(), ("--repetition-penalty", penalty)]):
        got = answers("--temp", 0, "-n", steps, "--ignore-eos", *args, method=method)
        for (reason, text), ids, start in zip(got, sequences[odd::2], starts[odd::2]):
            raw, _ = detour("tokenizer", "decode", "--model", tokenizer(), *ids[start:])
            assert (reason, text) == ("length", raw.decode(errors="replace"))


def test_json():
    """A line a prompt: the text that is printed otherwise, its ids, and who attended."""
    stdout, _ = generate(*flags(PROMPTS), *SAMPLED, "--json")
    lines = [json.loads(line) for line in stdout.decode().splitlines()]
    assert [(line["finish_reason"], line["text"]) for line in lines] == answers(*SAMPLED)
    for line, prompt in zip(lines, PROMPTS, strict=True):
        assert line["prompt"] == prompt and line["positions"] == len(line["prompt_tokens"]) + len(line["tokens"]) - 1
        raw, _ = detour("tokenizer", "decode", "--model", tokenizer(), *line["tokens"])
        assert raw.decode(errors="replace") == line["text"]
        dense = [n == line["positions"] for n in line["routed_tokens_by_layer"]]
        assert dense[0] and dense[2] and not all(dense)


def test_drafts_change_no_token():
    """Greedy decoding drafted by the first layers, one prompt or several, stop strings included."""
    plain = answers("--temp", 0, "-n", 30)
    for layers in (1, 3):
        assert answers("--temp", 0, "-n", 30, "--draft-layers", layers, "--draft-tokens", 5) == plain
    stop = plain[0][1][8:11]
    assert (answers("--temp", 0, "-n", 30, "--draft-layers", 2, "--stop", stop)
            == answers("--temp", 0, "-n", 30, "--stop", stop))
    stderr = generate("-p", PROMPTS[0], "--temp", 0, "-n", 30, "--draft-layers", 2, "--stats")[1].decode()
    assert re.search(r"30 new tokens, [\d.]+ tok/s in decode; \d+ of \d+ drafted tokens accepted", stderr), stderr
    for wrong in (("--temp", 1), ("--temp", 0, "--repetition-penalty", 2)):
        expect_error("generate", "--model", model("dtrnet"), "-p", "a", "--draft-layers", 1, *wrong, says="--draft-layers")
    expect_error("generate", "--model", model("dtrnet"), "-p", "a", "--temp", 0, "--draft-layers", 4, says="1 to 3")


def test_exit():
    """A dense model may stop early; a model with routers that decide may not. No threshold reached: nothing changes."""
    plain = answers("--temp", 0, "-n", 12, method="dense")
    assert answers("--temp", 0, "-n", 12, "--exit", "margin", "--exit-threshold", 1, method="dense") == plain
    answers("--temp", 0, "-n", 12, "--exit", "state", "--exit-threshold", 0.3, method="dense")
    expect_error("generate", "--model", model("dtrnet"), "-p", "a", "--exit", "margin", says="dtrnet")
    expect_error("generate", "--model", model("dense"), "-p", "a", "--exit", "often", says="often")


def test_stop():
    text = one(PROMPTS[0], *SAMPLED)
    reason, plain = answers(*SAMPLED, prompts=PROMPTS[:2])[0]
    assert (reason, plain) == ("length", text)
    for begin, size in ((0, 1), (4, 3), (12, 7), (len(text) - 5, 5)):
        stop = text[begin:begin + size]
        expected = text[:text.find(stop)]
        assert one(PROMPTS[0], *SAMPLED, "--stop", stop) == expected, stop
    both = answers(*SAMPLED, "--stop", "never seen", "--stop", text[10:14], prompts=PROMPTS[:2])
    assert both[0] == ("stopped", text[:text.find(text[10:14])])
    # Neither a stop string in the prompt, nor one that only begins, takes anything away.
    assert one(PROMPTS[0], *SAMPLED, "--stop", PROMPTS[0]) == text
    assert one(PROMPTS[0], *SAMPLED, "--stop", text[-4:] + "?!", "--stop", text + "?!") == text
    expect_error("generate", "--model", model("dtrnet"), "-p", "a", "--stop", "", says="--stop")


def test_output_is_always_utf8():
    """A hot sampler breaks characters everywhere; answers that end inside one are complete all the same."""
    wild = ("--temp", 20, "--ignore-eos")
    got = answers(*wild, "-n", 100)  # decodes strictly
    assert any("�" in text for _, text in got)
    assert one(PROMPTS[0], *wild, "-n", 100) == got[0][1]
    for n in (1, 2, 5):
        answers(*wild, "-n", n)


def test_answers_come_as_they_are_done():
    command = [os.environ["DETOUR_BIN"], "generate", "--model", str(model("dtrnet")), "--prompts", "-", "--max-batch", "2", "-n", "30", "--json",
               "--ignore-eos"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write("\n".join(f"{i} {PROMPTS[0]}" for i in range(4000)).encode())
    process.stdin.close()
    first = json.loads(process.stdout.readline())
    assert first["finish_reason"] == "length" and first["prompt"].startswith("0 ")
    process.send_signal(signal.SIGINT)
    rest = [json.loads(line) for line in process.stdout.read().decode().splitlines()]
    assert process.wait() == 0
    assert 0 < len(rest) < 3999
    assert [r["prompt"].split()[0] for r in [first, *rest]] == [str(i) for i in range(len(rest) + 1)]
    assert rest[-1]["finish_reason"] in ("stopped", "length")


def test_lengths():
    assert one(PROMPTS[0], "-n", 0) == ""
    context = CONFIG["max_position_embeddings"]
    word = PROMPTS[2].strip()
    ids = Tokenizer.from_file(str(tokenizer() / "tokenizer.json")).encode(word).ids
    assert answers("--ignore-eos", "-n", context - len(ids), "--temp", 0, prompts=[word, "a"])[0][0] == "length"
    assert answers("--ignore-eos", "-n", context, "--temp", 0, prompts=[word, "a"])[0][0] == "context"
    expect_error("generate", "--model", model("dtrnet"), "-p", "the " * 700, says=f"{context}")


def test_wrong_use():
    expect_error("generate", "--model", model("dtrnet"), says="--prompt")
    expect_error("generate", "--model", model("dtrnet"), "-p", "", says="prompt")
    expect_error("generate", "--model", model("dtrnet"), "--prompts", "-", stdin=b"\n\n", says="prompt")
    expect_error("generate", "--model", model("dtrnet"), "--prompts", FOLDER / "none.txt", says="none.txt")
    for wrong in (("--temp", -1), ("--top-p", 0), ("--top-k", -1), ("--min-p", 2), ("--repetition-penalty", 0),
                  ("--temp", "nan"), ("--simd", "mmx")):
        expect_error("generate", "--model", model("dtrnet"), "-p", "a", *wrong)


def kv_bytes(stderr):
    number, unit = re.search(r"KV cache ([\d.]+) (B|KiB|MiB)\b", stderr).groups()
    return float(number) * {"B": 1, "KiB": 1024, "MiB": 1024 ** 2}[unit]


def test_stats():
    args = ("--prompt", (corpus() / "1790-Washington-1.txt").read_text()[:1000], "-n", 20, "--temp", 0, "--stats",
            "--ignore-eos")
    routed, dense = (generate(*args, method=method)[1].decode() for method in ("dtrnet", "dense"))
    for stderr in (routed, dense):
        assert re.search(r"prompt \d+ tokens in [\d.]+ s; 20 new tokens, [\d.]+ tok/s in decode; KV cache ", stderr)
    share = float(re.search(r"([\d.]+)% of tokens attended in routed layers", routed).group(1)) / 100
    assert 0 < share < 1 and "attended" not in dense
    # Keys and values in f32 with 2 of 4 layers routed; pages of 16 entries, positions beside them.
    positions = int(re.search(r"prompt (\d+) tokens", dense).group(1)) + 19
    exact = positions * 4 * CONFIG["num_key_value_heads"] * CONFIG["head_dim"] * 2 * 4
    page = 16 * (CONFIG["head_dim"] * 2 + 1) * 4
    assert exact * 0.995 <= kv_bytes(dense) <= 1.005 * (exact + 4 * page)
    assert kv_bytes(routed) < kv_bytes(dense)
    expected = exact * (2 + 2 * share) / 4
    assert expected * 0.99 <= kv_bytes(routed) <= 1.03 * (expected + 4 * page)


def test_checkpoints_have_the_tokenizer_of_the_data_by_default():
    """prepare, train and generate as their help texts show them: no --tokenizer for train."""
    latest = train(FOLDER / "default", "dtrnet", "--max-steps", 1)
    stdout, _ = detour("generate", "--model", latest, "-p", "The", "-n", 1)
    assert stdout.startswith(b"The")
    assert json.loads((latest / "tokenizer.json").read_text()) == \
        json.loads((tokenizer() / "tokenizer.json").read_text())
