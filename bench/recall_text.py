"""Text that asks a model to look back: for teaching routers which tokens matter (docs/routing.md, "From dense to routed").

    bench/recall_text.py --text FOLDER --out FOLDER [--documents 1500] [--words 1250] [--facts 10] [--blocks 1]
                         [--plain 0.33] [--seed 1] [--more-wordings 0]
                         [--tokens 0 --tokenizer FOLDER]

Each document is a passage of a file of FOLDER, cut at paragraphs' ends, with 1 to --facts invented facts between its
sentences; its end asks for them, in another order, and answers. With more --blocks it asks at other places too, each
fact once: long documents then ask from every distance, wherever a training sequence cuts them. Facts come in several
wordings, none of which is that of `detour eval --recall`, and about things that it does not name. A share --plain of
the documents are the passage alone. With --tokens N every document is filled up in front with other text until it has
N tokens, its end-of-text included: after `detour prepare`, training sequences of N tokens are whole documents, and no
question lacks its fact. The same seed writes the same bytes.
"""
import argparse
import itertools
import random
import re
from pathlib import Path

NAMES = ["Alice", "Bruno", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Henrik", "Ines", "Jonas", "Katya", "Leila",
         "Marco", "Nadia", "Oscar", "Petra", "Rashid", "Sonia", "Tomas", "Ursula", "Viktor", "Wanda", "Yusuf", "Zoe"]
THINGS = ["piano", "ladder", "lantern", "compass", "violin", "saddle", "anchor", "mirror", "kettle", "hammer", "carpet",
          "teapot", "camera", "bicycle", "wardrobe", "barrel", "telescope", "umbrella", "typewriter", "blanket"]
COLOURS = ["red", "blue", "green", "yellow", "purple", "orange", "silver", "brown", "white", "black"]
PLACES = ["cellar", "attic", "garage", "garden", "kitchen", "library", "harbour", "chapel", "stable", "workshop"]
# Statement, question, where the answer begins in the question's line ({a}). {k} is the key.
WORDINGS = [
    ("The locker of {k} opens with the code {a}.", "The code of {k}'s locker: {a}.", "name", "number"),
    ("Note that the {k} weighs {a} pounds.", "How many pounds does the {k} weigh? {a}.", "thing", "number"),
    ("{k} was given ticket number {a}.", "{k}'s ticket has the number {a}.", "name", "number"),
    ("Somebody has painted the {k} {a}.", "The colour of the {k} is {a}.", "thing", "colour"),
    ("{k} hid the letter in the {a}.", "Where did {k} hide the letter? In the {a}.", "name", "place"),
    ("The price of the {k} is {a} dollars.", "The {k} costs {a} dollars.", "thing", "number"),
    ("{k} keeps a {a} under the bed.", "Under the bed {k} keeps a {a}.", "name", "thing"),
    ("Account of {k}: {a}.", "Account of {k}: {a}.", "name", "number"),
    ("The password for the {k} is {a}.", "The password for the {k} is {a}.", "place", "number"),
]
LEADS = ["Questions about the text:", "What was said above:", "To repeat the facts:", "Now answer from memory.", ""]


def draw(kind, rng):
    if kind == "number":
        return str(rng.randrange(10 ** rng.choice([2, 3, 4, 5, 6])))
    return rng.choice({"name": NAMES, "thing": THINGS, "colour": COLOURS, "place": PLACES}[kind])


def facts_of(rng, most, more_wordings):
    """(line that says, line that asks) of facts whose keys differ."""
    facts, keys = [], set()
    wordings = rng.sample(WORDINGS, min(len(WORDINGS), rng.choice([1, 1, 2, 3]) + more_wordings))
    for _ in range(max(1, round(most * rng.choice([0, 0.1, 0.2, 0.4, 0.6, 0.8, 1])))):
        say, ask, key_kind, answer_kind = rng.choice(wordings)
        key, answer = draw(key_kind, rng), draw(answer_kind, rng)
        if (say, key) not in keys and key != answer:
            keys.add((say, key))
            facts.append((say.format(k=key, a=answer), ask.format(k=key, a=answer)))
    return facts


def passages(folder, words):
    """Runs of whole paragraphs of about so many words, of every file."""
    for path in sorted(Path(folder).rglob("*.txt")):
        paragraphs, count = [], 0
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace")):
            paragraphs.append(paragraph.strip())
            count += len(paragraph.split())
            if count >= words:
                yield "\n\n".join(paragraphs)
                paragraphs, count = [], 0


def questions(asked, rng):
    """A block that asks for facts, in another order."""
    rng.shuffle(asked)
    lead = rng.choice(LEADS)
    return "\n\n" + "\n".join([lead] * bool(lead) + asked) + "\n"


def document(passage, rng, args):
    if rng.random() < args.plain:
        return passage
    sentences = re.split(r"(?<=[.!?])(?=\s)", passage)
    end = len(sentences)
    blocks = sorted(rng.randrange(end) for _ in range(args.blocks - 1)) + [end]
    said_at, asked_at = {}, {}
    for say, ask in facts_of(rng, args.facts, args.more_wordings):
        place = rng.randrange(end * 19 // 20 + 1)
        said_at.setdefault(place, []).append(rng.choice(["\n", "\n\n", " "]) + say)
        asked_at.setdefault(rng.choice([block for block in blocks if block >= place]), []).append(ask)
    text = []
    for i in range(end + 1):
        text += said_at.get(i, []) + ([questions(asked_at[i], rng)] if i in asked_at else []) + sentences[i:i + 1]
    return "".join(text)


def filled(text, filler, tokenizer, num_tokens):
    """The end of `filler` and `text`, together num_tokens - 1 tokens (end-of-text makes num_tokens), or None."""
    def length(t):
        return len(tokenizer.encode(t, add_special_tokens=False).ids)

    ids = tokenizer.encode(filler, add_special_tokens=False).ids
    room = num_tokens - 1 - length(text)
    for _ in range(8):  # joining texts can merge tokens
        if not 0 < room <= len(ids):
            return None
        whole = tokenizer.decode(ids[len(ids) - room:]) + "\n\n" + text
        missing = num_tokens - 1 - length(whole)
        if missing == 0:
            return whole
        room += missing
    return None


def documents(found, rng, args):
    if not args.tokens:
        for i in range(args.documents):
            yield document(found[i % len(found)], rng, args)
        return
    import tokenizers
    tokenizer = tokenizers.Tokenizer.from_file(f"{args.tokenizer}/tokenizer.json")
    endless = (filled(document(found[i % len(found)], rng, args), found[(i + 1) % len(found)], tokenizer, args.tokens)
               for i in itertools.count())
    tries = itertools.islice(endless, 4 * args.documents)
    yield from itertools.islice((text for text in tries if text), args.documents)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--words", type=int, default=1250)
    parser.add_argument("--facts", type=int, default=10, help="most facts of a document")
    parser.add_argument("--more-wordings", type=int, default=0, help="of a document, beside one to three: for many facts")
    parser.add_argument("--blocks", type=int, default=1, help="places of a document that ask")
    parser.add_argument("--plain", type=float, default=1 / 3, help="share of documents without facts")
    parser.add_argument("--tokens", type=int, default=0, help="tokens of every document, end-of-text included")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json, for --tokens")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.tokens and not args.tokenizer:
        parser.error("--tokens: --tokenizer is needed too")
    rng = random.Random(args.seed)
    found = list(passages(args.text, args.words))
    if not found:
        parser.error(f"--text {args.text}: expected .txt files of {args.words} words or more")
    rng.shuffle(found)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for text in documents(found, rng, args):
        (out / f"{count:05}.txt").write_text(text, encoding="utf-8")
        count += 1
    if count < args.documents:
        parser.error(f"--words {args.words}: only {count} documents came near {args.tokens} tokens from below; use fewer or more words")
    print(f"{out}: {count} documents of {len(found)} passages")


if __name__ == "__main__":
    main()
