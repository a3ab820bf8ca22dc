"""Make the demo's data: US addresses with hand-made labels -> a line of text and its parts as JSON.

The source package `usaddress` (MIT) ships addresses whose words were labelled by hand. Every labelled address becomes one
row, none is left out because it is hard; street corners ("5th and Main"), which are not one address, and duplicates are.
The files are ordered from easy to odd, so rows are shuffled, and a hash of the address decides which are held out.
"""

import argparse
import hashlib
import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from packages import check, fetch

VERSION = "0.5.16"
ARCHIVE = "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6"
# The hand-labelled files and their hashes; held-out rows come from the first alone.
FILES = {
    "labeled.xml": "dbd125fa01fbdbc4e25cce722c648ce4e224e4c9bdb9b5a14498aa8a042aee32",
    "us50_train_tagged.xml": "04e43d2e5095050558c1f22b55f6d36fd605e4d7fd972567a9366ef1707a115c",
    "us50_messiest_manual_label.xml": "98ae9608fcaa2b82858d11b969b897cc2a75ffd7d391119d2cb526fe80d81016",
    "multi_word_state_addresses.xml": "e983d1bce00219472fe7ab24b62a3b253229da7b296f2b393e5d4a4c86528c5a",
}
HELD_OUT_BUCKETS = 7
SYSTEM = "Address to JSON."

Pieces = list[tuple[str, str]]

# usaddress label -> key of the answer. "suffix" is a slip in two rows, where it marks a direction.
KEYS = {
    **dict.fromkeys(("AddressNumberPrefix", "AddressNumber", "AddressNumberSuffix"), "number"),
    **dict.fromkeys(
        (
            "StreetNamePreDirectional", "StreetNamePreModifier", "StreetNamePreType", "StreetName",
            "StreetNamePostType", "StreetNamePostModifier", "StreetNamePostDirectional", "suffix",
        ),
        "street",
    ),
    **dict.fromkeys(("OccupancyType", "OccupancyIdentifier", "SubaddressType", "SubaddressIdentifier"), "unit"),
    **dict.fromkeys(("USPSBoxType", "USPSBoxID", "USPSBoxGroupType", "USPSBoxGroupID"), "box"),
    **dict.fromkeys(("BuildingName", "LandmarkName"), "place"),
    **dict.fromkeys(("ZipCode", "ZipPlus4"), "zip"),
    "Recipient": "name",
    "PlaceName": "city",
    "StateName": "state",
    "CountryName": "country",
    "NotAddress": "note",
}  # fmt: skip
CORNERS = {"IntersectionSeparator", "CornerOf"}


def labelled_lines(xml: bytes) -> Iterator[Pieces]:
    """Yield each address of a file as (label, words), punctuation kept with the words it follows."""
    for line in ElementTree.fromstring(xml):
        pieces = [(part.tag, " ".join(f"{part.text or ''}{part.tail or ''}".split())) for part in line]
        yield [(label, words) for label, words in pieces if words]


def answer(pieces: Pieces) -> dict[str, str]:
    """Return the parts in order of appearance, words as they stand, without commas at the ends.

    Words of one key that stand apart are joined by a space.
    """
    runs: list[tuple[str, list[str]]] = []
    for label, words in pieces:
        key = KEYS[label]
        if not runs or runs[-1][0] != key:
            runs.append((key, []))
        runs[-1][1].append(words)
    parts: dict[str, str] = {}
    for key, words in runs:
        value = " ".join(words).strip(" ,;")
        if value:
            parts[key] = f"{parts[key]} {value}" if key in parts else value
    return parts


def identity(address: str) -> str:
    """Return what two spellings of one address share: case and punctuation do not count."""
    return " ".join(re.sub(r"[^\w#]+", " ", address.casefold()).split())


def is_held_out(address: str) -> bool:
    """Say whether an address is held out: a pure function of its text."""
    digest = hashlib.sha256(identity(address).encode()).hexdigest()
    return int(digest[:8], 16) % HELD_OUT_BUCKETS == 0


def split_rows(files: dict[str, bytes]) -> tuple[list[dict[str, object]], list[dict[str, object]], Counter[str]]:
    """Return training rows, held-out rows and how many lines were read and left out, by reason."""
    train, held_out, seen, counts = [], [], set(), Counter[str]()
    for name, xml in files.items():
        for pieces in labelled_lines(xml):
            counts["read"] += 1
            address = " ".join(words for _, words in pieces)
            if any(label in CORNERS for label, _ in pieces):
                counts["street corners"] += 1
            elif identity(address) in seen:
                counts["duplicates"] += 1
            elif is_held_out(address) and name != "labeled.xml":
                counts["of other files, but held out"] += 1
            else:
                (held_out if is_held_out(address) else train).append(row(address, answer(pieces)))
            seen.add(identity(address))
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(held_out)
    return train, held_out, counts


def row(address: str, parts: dict[str, str]) -> dict[str, object]:
    """Return one conversation."""
    compact = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": address},
            {"role": "assistant", "content": compact},
        ]
    }


def main() -> None:
    """Write train.jsonl and heldout.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(".demo/addresses"), help="the data folder")
    output: Path = parser.parse_args().output
    archive = fetch("usaddress", VERSION, output / "packages", sha256=ARCHIVE, source=True)
    with tarfile.open(archive) as tar:
        files = {}
        for name, sha256 in FILES.items():
            member = tar.extractfile(f"usaddress-{VERSION}/training/{name}")
            assert member is not None, name
            files[name] = check(name, member.read(), sha256)
    train, held_out, counts = split_rows(files)
    for name, rows in (("train", train), ("heldout", held_out)):
        with (output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in rows)
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    print(f"data: {len(train)} training and {len(held_out)} held-out rows in {output} ({left_out})")


if __name__ == "__main__":
    main()
