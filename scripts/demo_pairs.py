"""Make the demo's preference pairs: a right answer to an address, and a wrong one.

Wrong answers are of two kinds. Those of a trained run (`--answers-of`) are what its model answers, where that is wrong. The
others are made by changing the right answer once: a word moved to the part beside it, two parts joined, a part left out, a
part under another name, two values exchanged. A model after SFT tells these apart already: they keep what it can do, and
its own mistakes are what it learns from. Training pairs have both, held-out pairs of a run its own mistakes alone.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from demo_data import KEYS

Parts = dict[str, str]
Turn = dict[str, str]
Change = Callable[[Parts, random.Random], Parts]
NAMES = tuple(dict.fromkeys(KEYS.values()))
"""Names of parts."""


def move_word(parts: Parts, generator: random.Random) -> Parts:
    """Move the last word of a part to the next one, or the first word of that back."""
    first, second = _neighbours(parts, generator)
    left, right = parts[first].split(), parts[second].split()
    if generator.random() < 0.5:
        right.insert(0, left.pop())
    else:
        left.append(right.pop(0))
    changed = {**parts, first: " ".join(left), second: " ".join(right)}
    return {name: value for name, value in changed.items() if value}


def join_parts(parts: Parts, generator: random.Random) -> Parts:
    """Write two neighbouring parts as one, under the name of either."""
    first, second = _neighbours(parts, generator)
    name = generator.choice((first, second))
    joined = f"{parts[first]} {parts[second]}"
    return {(name if key == first else key): (joined if key == first else value)
            for key, value in parts.items() if key != second}  # fmt: skip


def drop_part(parts: Parts, generator: random.Random) -> Parts:
    """Leave a part out."""
    dropped = generator.choice(list(parts))
    return {name: value for name, value in parts.items() if name != dropped}


def rename_part(parts: Parts, generator: random.Random) -> Parts:
    """Give a part a name that no part of the answer has."""
    old = generator.choice(list(parts))
    new = generator.choice([name for name in NAMES if name not in parts])
    return {(new if name == old else name): value for name, value in parts.items()}


def swap_values(parts: Parts, generator: random.Random) -> Parts:
    """Exchange the values of two neighbouring parts."""
    first, second = _neighbours(parts, generator)
    return {**parts, first: parts[second], second: parts[first]}


CHANGES_OF_ONE: tuple[Change, ...] = (rename_part,)
CHANGES: tuple[Change, ...] = (move_word, join_parts, drop_part, rename_part, swap_values)
"""Changes of an answer with one part, and with several."""


def _neighbours(parts: Parts, generator: random.Random) -> tuple[str, str]:
    """Return the names of two parts side by side."""
    names = list(parts)
    first = generator.randrange(len(names) - 1)
    return names[first], names[first + 1]


def wrong_answer(right: str, generator: random.Random) -> str:
    """Return the right answer with one change, never equal to it."""
    parts: Parts = json.loads(right)
    changed = parts
    while changed == parts:  # two parts may have one value
        change = generator.choice(CHANGES if len(parts) > 1 else CHANGES_OF_ONE)
        changed = change(parts, generator)
    return json.dumps(changed, ensure_ascii=False, separators=(",", ":"))


def pair(turns: list[Turn], wrong: str) -> dict[str, list[Turn]]:
    """Return a row of a conversation and a wrong answer to its last turn."""
    *prompt, right = turns
    return {"prompt": prompt, "chosen": [right], "rejected": [{"role": "assistant", "content": wrong}]}


def address_of(row: dict[str, list[Turn]]) -> str:
    """Return the address of a pair."""
    return row["prompt"][-1]["content"]


def changed_pairs(conversations: Iterable[list[Turn]], seed: int) -> Iterator[dict[str, list[Turn]]]:
    """Yield a pair of each address with a changed answer, which depends on the seed and the address alone."""
    for turns in conversations:
        generator = random.Random(f"{seed} {turns[-2]['content']}")
        yield pair(turns, wrong_answer(turns[-1]["content"], generator))


def run_answers(run: Path, conversations: list[list[Turn]]) -> list[str]:
    """Return the greedy answers of a run's merged model, or else of its adapter."""
    from qlora_train.evaluation.generation import generate_answers
    from qlora_train.export.finished_run import open_finished_run
    from qlora_train.inference.run_models import run_models

    finished = open_finished_run(run)
    name = "merged" if finished.folder.has_merged() else "adapter"
    ((_, model, tokenizer),) = run_models(finished, [name])
    prompts: list[Any] = [turns[:-1] for turns in conversations]
    return generate_answers(model, tokenizer, prompts, max_new_tokens=128, batch_size=32, date=finished.date)


def own_pairs(conversations: list[list[Turn]], answers: list[str]) -> dict[str, dict[str, list[Turn]]]:
    """Return a pair of each address that a model answered wrongly, by address."""
    from qlora_train.evaluation.scoring import score_answers

    matches = score_answers([turns[-1]["content"] for turns in conversations], answers).matches
    return {
        turns[-2]["content"]: pair(turns, answer)
        for turns, answer, match in zip(conversations, answers, matches, strict=True)
        if answer and not match
    }


def read_conversations(file: Path) -> list[list[Turn]]:
    """Return the turns of each row of the demo's data."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def write(file: Path, rows: list[dict[str, list[Turn]]]) -> None:
    """Write pairs as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write train.jsonl and heldout.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".demo/addresses"), help="what scripts/demo_data.py made")
    parser.add_argument("--output", type=Path, default=Path(".demo/pairs"), help="the data folder")
    parser.add_argument("--seed", type=int, default=0, help="of the changes")
    parser.add_argument("--rows", type=int, help="training addresses to take (all)")
    parser.add_argument("--answers-of", type=Path, metavar="RUN", help="reject this run's own wrong answers")
    options = parser.parse_args()
    addresses = {name: read_conversations(options.data / f"{name}.jsonl") for name in ("train", "heldout")}
    addresses["train"] = addresses["train"][: options.rows]
    pairs = {name: list(changed_pairs(rows, options.seed)) for name, rows in addresses.items()}
    if options.answers_of:
        answers = run_answers(options.answers_of, addresses["train"] + addresses["heldout"])
        own = own_pairs(addresses["train"] + addresses["heldout"], answers)
        pairs["train"] = [own.get(address_of(row), row) for row in pairs["train"]]
        pairs["heldout"] = [own[address_of(row)] for row in pairs["heldout"] if address_of(row) in own]
    for name, rows in pairs.items():
        write(options.output / f"{name}.jsonl", rows)
        print(f"pairs: {len(rows)} of {len(addresses[name])} addresses in {options.output / name}.jsonl")


if __name__ == "__main__":
    main()
