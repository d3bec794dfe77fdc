"""`detour prepare` in bounded memory: JSON lines with many documents and one huge text file.

pytest runs a reduced size. The full one: prepare_large_test.py --detour build/release/detour --size-mb 4096
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import tempfile
import time

MAX_RSS_MB = 500
WORDS = ("the of and to in that state union people government which be by for we our have as is it's "
         "congress year nations\u2019 1,790 power \u00e9t\u00e9 law. public, country; great (treaty) "
         "$12,345.67 general-welfare interest peace war").split()


def byte_level_alphabet() -> dict[int, str]:
    """The byte -> character table of byte-level BPE."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in keep]
    return {b: chr(b) for b in keep} | {b: chr(256 + i) for i, b in enumerate(rest)}


def write_tokenizer(directory: pathlib.Path) -> None:
    """A tokenizer.json of the 256 bytes and, as merges, the words used here."""
    table = byte_level_alphabet()
    vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(sorted(table.values()))}
    merges = []
    for word in WORDS:
        symbols = [table[b] for b in (" " + word).encode()]
        left = symbols[0]
        for right in symbols[1:]:
            if left + right not in vocab:
                merges.append([left, right])
                vocab[left + right] = len(vocab)
            left += right
    added = {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "vocab": vocab, "merges": merges}
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [added],
         "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
         "decoder": byte_level, "model": model}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(5, 30))).capitalize() + ".\n"


def write_input(directory: pathlib.Path, size_mb: int) -> None:
    """3/4 JSON lines (documents of 0.1 to 50 KB), 1/4 a single text file: 1 GB of 4."""
    rng = random.Random(1)
    directory.mkdir()
    pool = [sentence(rng) for _ in range(20000)]
    target = size_mb << 20
    with open(directory / "many.jsonl", "w", encoding="utf-8") as f:
        written = 0
        while written < target * 3 // 4:
            count = 400 if rng.random() < 0.01 else rng.randint(1, 40)
            line = json.dumps({"id": written, "text": "".join(rng.choices(pool, k=count))}) + "\n"
            written += f.write(line)
    with open(directory / "one.txt", "wb") as f:
        written = 0
        while written < target // 4:
            written += f.write("".join(rng.choices(pool, k=2000)).encode())


def run(detour: str, directory: pathlib.Path, size_mb: int) -> float:
    """Prepares, prints time and rate, checks memory and result; returns the peak RSS in MB."""
    write_tokenizer(directory / "tokenizer")
    write_input(directory / "in", size_mb)
    source_bytes = sum(p.stat().st_size for p in (directory / "in").iterdir())
    command = [detour, "prepare", directory / "in", "--tokenizer", directory / "tokenizer",
               "--out-dir", directory / "out"]
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - start
    assert process.returncode == 0, process.returncode
    rss_mb = usage.ru_maxrss / 1024
    print(f"{source_bytes / 1e6:.0f} MB in {seconds:.1f} s, {source_bytes / 1e6 / seconds:.1f} MB/s, "
          f"CPU {usage.ru_utime + usage.ru_stime:.1f} s, peak RSS {rss_mb:.0f} MB")
    manifest = json.loads((directory / "out" / "manifest.json").read_text())
    splits = manifest["splits"]
    with open(directory / "in" / "many.jsonl", "rb") as f:
        num_documents = sum(1 for _ in f) + 1
    assert splits["train"]["documents"] + splits["val"]["documents"] == num_documents
    assert splits["val"]["documents"] > 0
    assert sum(s["bytes"] for s in manifest["sources"]) == source_bytes
    assert rss_mb <= MAX_RSS_MB, rss_mb
    return rss_mb


def test_prepare_in_bounded_memory(tmp_path):
    run(os.environ["DETOUR_BIN"], tmp_path, 64)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--detour", required=True)
    parser.add_argument("--size-mb", type=int, default=4096)
    parser.add_argument("--temp-dir", help="where the input goes; needs about twice the size")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.temp_dir) as name:
        run(args.detour, pathlib.Path(name), args.size_mb)

