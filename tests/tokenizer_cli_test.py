"""`detour tokenizer encode | decode`: any bytes come back, and text has the ids that the package `tokenizers` gives.
The program is found in DETOUR_BIN."""

import random

from detour_e2e import FOLDER, corpus, detour, expect_error, tokenizer
from tokenizer_oracle import texts
from tokenizers import Tokenizer


def encode(data, *args):
    stdout, _ = detour("tokenizer", "encode", "--model", tokenizer(), "--ids-only", *args, stdin=data)
    assert stdout.endswith(b"\n")
    return [int(word) for word in stdout.split()]


def decode(ids, *args):
    """Ids through standard input."""
    return detour("tokenizer", "decode", "--model", tokenizer(), *args, stdin=" ".join(map(str, ids)).encode())[0]


def hugging_face():
    return Tokenizer.from_file(str(tokenizer() / "tokenizer.json"))


def byte_strings():
    """Few and long: each costs a process."""
    rng = random.Random(5)
    yield b""
    yield b"\0"
    yield b"\r\n\r\n \t" + bytes(range(256)) * 3 + b"\xf0\x9f\x91"  # an unfinished character
    yield b"a\xc0\xaf \xed\xa0\x80 \xf5\x80\x80\x80 \xef\xbb\xbf z\n"  # overlong, surrogate, too large, BOM
    yield rng.randbytes(100_000) + bytes(rng.choices(b"\xe4\xb8\x96 a\n\xff\xc3", k=5_000)) + b" "
    yield "Ünïcödé 世界 👩‍👩‍👧‍👦 ".encode() * 50 + (corpus() / "1790-Washington-1.txt").read_bytes()


def test_any_bytes_come_back():
    for data in byte_strings():
        assert decode(encode(data)) == data, data[:40]
    everything = b"<|endoftext|>".join(byte_strings())
    assert decode(encode(everything, "--no-parse-special"), "--skip-special-tokens") == everything


def test_ids_of_tokenizers():
    """Texts of many kinds; they are joined, since each costs a process."""
    real = (corpus() / "1790-Washington-1.txt").read_text()
    rng = random.Random(11)
    cases = [t for t in texts(rng, 1500, real) if "<|endoftext|>" not in t]
    joined = ["\n".join(cases[i::4]) for i in range(4)] + [real]
    oracle = hugging_face()
    for text in joined:
        ids = encode(text.encode())
        assert ids == oracle.encode(text, add_special_tokens=False).ids, text[:80]
        assert decode(ids) == text.encode()


def test_special_tokens():
    text = "one<|endoftext|>two <|endoftext|>"
    end = hugging_face().token_to_id("<|endoftext|>")
    ids = encode(text.encode())
    assert ids == hugging_face().encode(text).ids
    assert ids.count(end) == 2
    assert decode(ids) == text.encode()
    assert decode(ids, "--skip-special-tokens") == b"onetwo "
    plain = encode(text.encode(), "--no-parse-special")
    assert end not in plain and decode(plain, "--skip-special-tokens") == text.encode()
    assert encode(text.encode(), "--add-special-tokens") == hugging_face().encode(text, add_special_tokens=True).ids


def test_every_id():
    size = hugging_face().get_vocab_size()
    assert size == 512
    ids = list(range(size))
    from_stdin = decode(ids)
    assert from_stdin == detour("tokenizer", "decode", "--model", tokenizer(), *ids)[0]
    assert from_stdin.decode(errors="replace") == hugging_face().decode(ids, skip_special_tokens=False)


def test_table_has_a_line_per_token():
    text = "Hello\n\x1b[31mworld"
    stdout, _ = detour("tokenizer", "encode", "--model", tokenizer(), stdin=text.encode())
    lines = stdout.decode().splitlines()
    assert [int(line.split()[0]) for line in lines] == encode(text.encode())
    assert "\x1b" not in stdout.decode()


def test_training_equals_standard_input_and_tokenizers():
    """One file and the same text from standard input; the merges are those of the package."""
    from tokenizers import decoders, models, pre_tokenizers, trainers
    path = corpus() / "1790-Washington-1.txt"
    detour("tokenizer", "train", "--input", path, "--vocab-size", 600, "--out-dir", FOLDER / "a")
    detour("tokenizer", "train", "--input", "-", "--vocab-size", 600, "--out-dir", FOLDER / "b",
           stdin=path.read_bytes())
    assert (FOLDER / "a/tokenizer.json").read_bytes() == (FOLDER / "b/tokenizer.json").read_bytes()
    oracle = Tokenizer(models.BPE())
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    oracle.decoder = decoders.ByteLevel()
    oracle.train_from_iterator([path.read_bytes().decode()], trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert Tokenizer.from_file(str(FOLDER / "a/tokenizer.json")).get_vocab() == oracle.get_vocab()


def test_errors():
    model = ("--model", tokenizer())
    for ids in ("512", "-1", "99999999999", "1 1.5"):
        expect_error("tokenizer", "decode", *model, stdin=ids.encode())
    expect_error("tokenizer", "encode", "--model", FOLDER / "none", stdin=b"a", says="none")
    (FOLDER / "broken").mkdir()
    (FOLDER / "broken/tokenizer.json").write_bytes((tokenizer() / "tokenizer.json").read_bytes()[:-200])
    expect_error("tokenizer", "encode", "--model", FOLDER / "broken", stdin=b"a", says="broken")
