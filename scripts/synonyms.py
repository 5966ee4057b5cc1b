"""Write saddlepoint/attacks/_synonyms.txt: synonyms of common words, from the WordNet 3.0 database files.

    python scripts/synonyms.py WORDNET VOCABULARY

WORDNET is the folder of the database (data.noun, index.verb, verb.exc, ...; Debian: package wordnet-base), VOCABULARY the
vocab.txt of a BERT encoder, whose whole words are taken as the common ones. Inflected forms are made by rule or from
WordNet's exception lists, and kept only where the vocabulary knows the word; so `making` stands beside `creating`.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

MOST = 10  # synonyms of one word and part of speech
PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
FORMS = {"noun": ("s",), "verb": ("s", "ed", "ing"), "adj": ("er", "est"), "adv": ()}


def inflected(word: str, form: str, irregular: dict[str, set[str]], vocabulary: set[str]) -> str | None:
    """One inflected form of a lemma; None where the vocabulary does not know it."""
    made = []
    if form == "s":
        made = [re.sub("(?<=[^aeiou])y$", "ie", word) + ("es" if re.search("(s|x|z|ch|sh|o)$", word) else "s")]
    else:
        # A short verb doubles its last letter: `stir`, `stirring`.
        doubled = word + word[-1] if re.fullmatch("[^aeiou]*[aeiou][bdgmnprt]", word) else word
        stem = re.sub("e$", "", doubled)
        if form != "ing":
            stem = re.sub("(?<=[^aeiou])y$", "i", stem)
        made = [stem + form]
    exceptions = [e for e in irregular.get(word, ()) if (form == "ed" and not e.endswith("ing")) or (form == "s" and e.endswith("s"))]
    return next((m for m in [*exceptions, *made] if m in vocabulary and m != word), None)


def main(wordnet: Path, vocabulary_file: Path) -> None:
    vocabulary = {w for w in vocabulary_file.read_text(encoding="utf-8").split() if re.fullmatch("[a-z]{3,}", w)}
    license_lines = [
        re.sub(r"^ *\d+ ?", "", line).rstrip() for line in (wordnet / "data.noun").read_text(encoding="utf-8").splitlines()[:29]
    ]
    table: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)  # (word, part) -> synonyms, the commonest sense first
    for part, short in PARTS.items():
        synsets = {}
        for line in (wordnet / f"data.{part}").read_text(encoding="utf-8").splitlines()[29:]:
            cells = line.split(" ")
            synsets[cells[0]] = [re.sub(r"\(.*\)$", "", cells[4 + 2 * i]) for i in range(int(cells[3], 16))]
        irregular: dict[str, set[str]] = defaultdict(set)
        for line in (wordnet / f"{part}.exc").read_text(encoding="utf-8").splitlines():
            form, lemma = line.split()[:2]
            irregular[lemma].add(form)
        for line in (wordnet / f"index.{part}").read_text(encoding="utf-8").splitlines()[29:]:
            cells = line.split()
            word, senses = cells[0], cells[-int(cells[2]) :]
            if word not in vocabulary:
                continue
            near = [w for sense in senses for w in synsets[sense] if w in vocabulary and w != word]
            table[word, short].update(dict.fromkeys(near))
            for form in FORMS[part]:
                if own := inflected(word, form, irregular, vocabulary):
                    others = [o for w in near if (o := inflected(w, form, irregular, vocabulary)) and o != own]
                    table[own, short].update(dict.fromkeys(others))
    parts: dict[str, str] = defaultdict(str)
    for word, part in table:
        parts[word] += part
    told = {key: near for key, near in sorted(table.items()) if near or parts[key[0]] != "n"}
    lines = [
        "# Synonyms of common words by part of speech (n v a r), extracted from WordNet 3.0 by scripts/synonyms.py.",
        "# A line without synonyms only tells the part of speech; a word without a line is a noun. The license of WordNet 3.0:",
        "#",
        *(f"# {line}".rstrip() for line in license_lines),
        *(" ".join([word, part, *list(near)[:MOST]]) for (word, part), near in told.items()),
    ]
    out = Path(__file__).parents[1] / "saddlepoint" / "attacks" / "_synonyms.txt"
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{out}: {len(told)} words and parts of speech, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
