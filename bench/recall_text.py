"""Text that asks a model to look back: for teaching routers which tokens matter (docs/routing.md, "From dense to routed").

    bench/recall_text.py --text FOLDER --out FOLDER [--documents 1500] [--words 1250] [--seed 1]

Each document is a passage of a file of FOLDER, cut at paragraphs' ends, with 1 to 10 invented facts between its
sentences; its end asks for them, in another order, and answers. Facts come in several wordings, none of which is that of
`detour eval --recall`, and about things that it does not name. A third of the documents are the passage alone. The same
seed writes the same bytes.
"""
import argparse
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


def facts_of(rng):
    """Lines to say and lines to ask, of facts whose keys differ."""
    said, asked, keys = [], [], set()
    wordings = rng.sample(WORDINGS, rng.choice([1, 1, 2, 3]))
    for _ in range(rng.choice([1, 1, 2, 4, 6, 8, 10])):
        say, ask, key_kind, answer_kind = rng.choice(wordings)
        key, answer = draw(key_kind, rng), draw(answer_kind, rng)
        if (say, key) not in keys and key != answer:
            keys.add((say, key))
            said.append(say.format(k=key, a=answer))
            asked.append(ask.format(k=key, a=answer))
    rng.shuffle(asked)
    return said, asked


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


def document(passage, rng):
    if rng.random() < 1 / 3:
        return passage
    sentences = re.split(r"(?<=[.!?])(?=\s)", passage)
    said, asked = facts_of(rng)
    for fact in said:
        glue = rng.choice(["\n", "\n\n", " "])
        sentences.insert(rng.randrange(len(sentences) * 19 // 20 + 1), glue + fact)
    lead = rng.choice(LEADS)
    return "".join(sentences) + "\n\n" + "\n".join([lead] * bool(lead) + asked) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--words", type=int, default=1250)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    found = list(passages(args.text, args.words))
    if not found:
        parser.error(f"--text {args.text}: expected .txt files of {args.words} words or more")
    rng.shuffle(found)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for i in range(args.documents):
        (out / f"{i:05}.txt").write_text(document(found[i % len(found)], rng), encoding="utf-8")
    print(f"{out}: {args.documents} documents of {len(found)} passages")


if __name__ == "__main__":
    main()
