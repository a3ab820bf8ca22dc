"""Compare a GGUF file in llama.cpp with the base that it is converted to, in Transformers and float32, on texts.

    python scripts/compare_gguf_base.py FILE.gguf TEXT [TEXT ...]

Of each text the first tokens are read. Printed are the losses in nats per token.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from qlora_train.export.gguf.llama_process import evaluate_file  # noqa: E402
from qlora_train.models.gguf_base import convert_gguf  # noqa: E402
from qlora_train.models.tokenizer_files import follow_tokenizer_json  # noqa: E402

NUM_TOKENS = 512


@torch.no_grad()
def nll_of(model: torch.nn.Module, ids: list[int]) -> float:
    """Return the negative log-likelihood of a text."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return float(cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))


def main(file: Path, texts: list[Path]) -> None:
    """Print the losses of each text and of all."""
    with tempfile.TemporaryDirectory() as cache:
        folder = convert_gguf(file, Path(cache))
        tokenizer = follow_tokenizer_json(AutoTokenizer.from_pretrained(folder), folder, str(folder))
        rows = [tokenizer(text.read_text(encoding="utf-8")).input_ids[:NUM_TOKENS] for text in texts]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours = [nll_of(model, ids) for ids in rows]
    labelled = [(ids, [False] + [True] * (len(ids) - 1)) for ids in rows]
    theirs = evaluate_file(file, rows=labelled, prompts=[], stops=[], max_new_tokens=1, max_seconds=None).nll
    print(f"{'text':<40} tokens  Transformers  llama.cpp")
    for text, ids, mine, other in zip(texts, rows, ours, theirs, strict=True):
        print(f"{text.name:<40} {len(ids) - 1:>6} {mine / (len(ids) - 1):>13.4f} {other / (len(ids) - 1):>10.4f}")
    total = sum(len(ids) - 1 for ids in rows)
    print(f"{'all':<40} {total:>6} {sum(ours) / total:>13.4f} {sum(theirs) / total:>10.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
