"""tokenizer.json files of every kind of pipeline, for tokenizer_oracle.py: each component that src/data reads is in one."""

import copy
import itertools

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BARE = {**BYTE_LEVEL, "use_regex": False}
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
          r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
BEHAVIORS = ["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


def sequence(key, *parts):
    return {"type": "Sequence", key: list(parts)}


def normalizers(*parts):
    return sequence("normalizers", *parts)


def pretokenizers(*parts):
    return sequence("pretokenizers", *parts)


def decoders(*parts):
    return sequence("decoders", *parts)


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def metaspace(scheme, split_, replacement="▁"):
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": split_}


def strip(left, right):
    return {"type": "Strip", "strip_left": left, "strip_right": right}


def template(before, after=()):
    """TemplateProcessing with (token, id) in front of and behind the text."""
    special = lambda token: {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [special(t) for t, _ in before] + [text] + [special(t) for t, _ in after],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in [*before, *after]}}


def added_token(spec, content, **flags):
    """Adds a token to the file; a new one gets the next id."""
    vocab, tokens = spec["model"]["vocab"], spec["added_tokens"]
    known = {**vocab, **{t["content"]: t["id"] for t in tokens}}
    token = known.get(content, max(known.values()) + 1)
    tokens.append({"id": token, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
                   "normalized": False, "special": False, **flags})
    return token


def train(texts, *, pre_tokenizer, vocab_size, specials, **options):
    """A tokenizer.json with BPE trained by the package; its pipeline is only that of the training."""
    import json

    from tokenizers import Tokenizer, models, trainers
    affixes = {key: options[key] for key in ("continuing_subword_prefix", "end_of_word_suffix") if key in options}
    tokenizer = Tokenizer(models.BPE(**affixes))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials,
                                                             show_progress=False, **options))
    return json.loads(tokenizer.to_str())


def byte_level_pipelines(trained):
    """On a byte-level vocabulary whose first token is <|endoftext|>."""
    accents = normalizers({"type": "NFD"}, {"type": "StripAccents"}, {"type": "NFC"})
    normal = {
        "nfd": {"type": "NFD"}, "nfkc": {"type": "NFKC"}, "nfkd": {"type": "NFKD"}, "lower": {"type": "Lowercase"},
        "accents": accents, "marks": {"type": "StripAccents"}, "strip": strip(True, True),
        "strip_left": strip(True, False), "strip_right": strip(False, True), "prepend": {"type": "Prepend", "prepend": "ab "},
        "replace": replace("th", "T "), "regex": replace(r"\s+|(?<=\w)e", "_", "Regex"), "behind": replace(r"(?<=[a-m]) ?", "-", "Regex"),
        "many": normalizers(strip(True, False), {"type": "NFKC"}, normalizers({"type": "Lowercase"}), replace(" ", "")),
    }
    for name, normalizer in normal.items():
        spec = copy.deepcopy(trained)
        spec.update(normalizer=normalizer, pre_tokenizer=BYTE_LEVEL)
        added_token(spec, "The", normalized=True)
        added_token(spec, "état", normalized=True, rstrip=True)
        added_token(spec, "<X>", normalized=True, special=True)
        added_token(spec, "<x>", lstrip=True)
        yield f"normalizer_{name}", spec

    pre = {"falcon": pretokenizers({"type": "Punctuation", "behavior": "Contiguous"}, BYTE_LEVEL,
                                   {"type": "Digits", "individual_digits": False}, split("[0-9][0-9][0-9]")),
           "digits_only": pretokenizers({"type": "Digits", "individual_digits": True}, BARE),
           "words": pretokenizers({"type": "Whitespace"}, BARE), "white": pretokenizers({"type": "WhitespaceSplit"}, BARE),
           "first": pretokenizers(split("[ae]", "MergedWithNext"), metaspace("first", False, " "), BARE),
           "prefixes": pretokenizers({"type": "Punctuation"}, {**BARE, "add_prefix_space": True})}
    pre |= {f"punctuation_{b}": pretokenizers({"type": "Punctuation", "behavior": b}, BARE) for b in BEHAVIORS}
    for behavior, invert in itertools.product(BEHAVIORS, (False, True)):
        pre[f"split_{behavior}_{invert}"] = pretokenizers(split(r"\p{Lu}|\s+|[aei]", behavior, invert), BARE)
        pre[f"text_{behavior}_{invert}"] = pretokenizers(split("e", behavior, invert, "String"), BARE)
    for name, pre_tokenizer in pre.items():
        spec = copy.deepcopy(trained)
        spec["pre_tokenizer"] = pre_tokenizer
        yield f"pre_{name}", spec

    spec = copy.deepcopy(trained)  # Qwen 2
    spec.update(normalizer={"type": "NFC"}, pre_tokenizer=pretokenizers(split(QWEN2), BARE), post_processor=BARE)
    for content in ("<|im_start|>", "<|im_end|>"):
        added_token(spec, content, special=True)
    yield "qwen2", spec

    for name, pattern in (("llama3_whole", LLAMA3), ("tekken", TEKKEN)):
        spec = copy.deepcopy(trained)
        spec.update(pre_tokenizer=pretokenizers(split(pattern), BARE), post_processor=template([("<|endoftext|>", 0)]))
        spec["model"]["ignore_merges"] = True
        yield name, spec

    spec = copy.deepcopy(trained)  # what llama.cpp does where a GGUF names no pre-tokenizer
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
    spec["pre_tokenizer"] = pretokenizers(split(r"[\p{P}\$\+<=>\^~\|]+"), split(gpt2), split(r"\p{N}+"),
                                          split("[0-9][0-9][0-9]"), BARE)
    yield "gguf_default", spec

    spec = copy.deepcopy(trained)  # the alphabet in the normalizer, as some converters write it
    spec.update(normalizer=normalizers({"type": "NFC"}, {"type": "ByteLevel"}), pre_tokenizer=None)
    added_token(spec, "é!", normalized=True)
    yield "normalizer_byte_level", spec

    spec = copy.deepcopy(trained)
    end, start = added_token(spec, "<end>", special=True), added_token(spec, "<start>", special=True)
    spec["post_processor"] = {"type": "RobertaProcessing", "sep": ["<end>", end], "cls": ["<start>", start],
                              "trim_offsets": True, "add_prefix_space": False}
    yield "roberta", spec
    spec = copy.deepcopy(spec)
    spec["post_processor"] = sequence(
        "processors", BYTE_LEVEL, template([("<start>", start), ("<|endoftext|>", 0)], [("<end>", end), ("<end>", end)]))
    spec["decoder"] = decoders(BYTE_LEVEL, {"type": "Strip", "content": " ", "start": 2, "stop": 1}, replace("the", "THE"))
    yield "processors", spec


def text_pipelines(trained):
    """On a vocabulary of text: SentencePiece's, with <unk>, <s>, </s> and byte tokens first."""
    mark = replace(" ", "▁")
    fallback = [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    llama = {
        "normalizer": normalizers({"type": "Prepend", "prepend": "▁"}, mark), "pre_tokenizer": None,
        "post_processor": template([("<s>", 1)]),
        "decoder": decoders(*fallback, {"type": "Strip", "content": " ", "start": 1, "stop": 0}),
    }
    model = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}

    def variant(pipeline, merge_options=(), tokens=()):
        spec = copy.deepcopy(trained)
        spec.update({"normalizer": None, "pre_tokenizer": None, "post_processor": None, **copy.deepcopy(pipeline)})
        spec["model"].update({**model, **dict(merge_options)})
        spec["added_tokens"] = []
        for content in ("<unk>", "<s>", "</s>"):
            added_token(spec, content, special=True)
        for content, flags in tokens:
            added_token(spec, content, **flags)
        return spec

    tokens = [("<tool>", {}), ("the", {"normalized": True}), ("<|end", {"lstrip": True, "rstrip": True, "special": True}),
              ("hello", {"normalized": True, "single_word": True})]
    yield "llama2", variant(llama)
    yield "llama2_added", variant(llama, tokens=tokens)
    yield "llama_first", variant({**llama, "normalizer": None, "pre_tokenizer": metaspace("first", False)}, tokens=tokens)
    yield "mistral", variant({**llama, "normalizer": None, "pre_tokenizer": metaspace("always", False)})
    yield "metaspace", variant({"pre_tokenizer": metaspace("always", True), "decoder": metaspace("always", True)})
    yield "metaspace_first", variant({"pre_tokenizer": pretokenizers({"type": "Punctuation"}, metaspace("first", True)),
                                      "decoder": metaspace("first", True)}, tokens=tokens)
    yield "metaspace_never", variant({"pre_tokenizer": metaspace("never", True), "decoder": metaspace("never", True)})
    yield "gemma", variant({"normalizer": mark, "pre_tokenizer": split(" ", "MergedWithPrevious", kind="String"),
                            "decoder": decoders(*fallback)}, {"fuse_unk": False})
    yield "strip_first", variant({"normalizer": normalizers(strip(True, True), replace("th", "ht")),
                                  "pre_tokenizer": metaspace("first", True), "decoder": decoders(*fallback)}, tokens=tokens)
    yield "no_fuse", variant({**llama, "decoder": decoders(replace("▁", " "), {"type": "ByteFallback"},
                                                          {"type": "Strip", "content": "a", "start": 1, "stop": 1})})
    yield "whole_words", variant({**llama, "pre_tokenizer": metaspace("always", True)}, {"ignore_merges": True})
    for fuse in (False, True):
        yield f"text_unk_{fuse}", variant(llama, {"byte_fallback": False, "fuse_unk": fuse})
    yield "text_dropped", variant(llama, {"byte_fallback": False, "unk_token": None})
    for fuse in (False, True):  # some byte tokens are missing
        spec = variant(llama, {"fuse_unk": fuse})
        gone = {"<0x80>", "<0xA9>", "<0x0A>", "<0x9F>", "<0xBF>"}
        kept = [t for t in sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get) if t not in gone]
        spec["model"]["vocab"] = {t: i for i, t in enumerate(kept)}
        yield f"some_bytes_{fuse}", spec


def affix_pipelines(texts):
    """Vocabularies whose tokens tell where in a word they stand."""
    from tokenizers import pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    clip = train(texts, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False), vocab_size=2500,
                 specials=["<|start|>", "<|end|>"], end_of_word_suffix="</w>", initial_alphabet=alphabet)
    pattern = r"<\|start\|>|<\|end\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    clip.update(normalizer=normalizers({"type": "NFC"}, replace(r"\s+", " ", "Regex"), {"type": "Lowercase"}),
                pre_tokenizer=pretokenizers(split(pattern, "Removed", True), BYTE_LEVEL), decoder=BYTE_LEVEL,
                post_processor={"type": "BertProcessing", "sep": ["<|end|>", 1], "cls": ["<|start|>", 0]})
    clip["model"]["unk_token"] = "<|end|>"
    yield "clip", clip
    spec = copy.deepcopy(clip)
    spec.update(decoder={"type": "BPEDecoder", "suffix": "</w>"})
    yield "word_suffix", spec
    words = train(texts, pre_tokenizer=pre_tokenizers.Whitespace(), vocab_size=2500, specials=["[UNK]"],
                  continuing_subword_prefix="##", limit_alphabet=200)
    words.update(pre_tokenizer={"type": "Whitespace"}, decoder=decoders({"type": "Fuse"}))
    words["model"]["unk_token"] = "[UNK]"
    yield "subword_prefix", words


def text_vocabulary(texts):
    from tokenizers import pre_tokenizers
    return train(texts, pre_tokenizer=pre_tokenizers.Metaspace(), vocab_size=3500,
                 specials=["<unk>", "<s>", "</s>"] + BYTE_TOKENS, limit_alphabet=400)
