"""Evaluation: losses against an independent float32 computation, batches against single rows, scores by hand."""

import datetime
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_train.config import DataSection
from qlora_train.data import prepare_data
from qlora_train.data.types import Example, Message
from qlora_train.evaluation import generation
from qlora_train.evaluation import held_out_loss as held_out_module
from qlora_train.evaluation.batched_inference import batches_by_length, compute_in_batches
from qlora_train.evaluation.generation import generate_answers, stop_token_ids
from qlora_train.evaluation.held_out_loss import held_out_loss, label_log_probabilities
from qlora_train.evaluation.scoring import AnswerScores, compare_answers, few_shot_prompt, score_answers
from qlora_train.objectives import chunked_loss
from qlora_train.utils.errors import DataError, ModelError
from tests.support.pico import CHATML, VOCAB_SIZE

Pico = Callable[..., Path]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ragged_examples() -> list[Example]:
    """Rows of 2 to 40 tokens with scattered labels, one without labels, one labelled at position 0."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for number, length in enumerate((9, 40, 2, 23, 23, 5, 31)):
        ids = tuple(torch.randint(4, 300, (length,), generator=generator).tolist())
        mask = tuple((torch.rand(length, generator=generator) < 0.4).tolist())
        if number == 5:
            mask = (True,) + (False,) * (length - 1)
        examples.append(Example(f"row {number}", ids, mask, None, None))
    return examples


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("qlora_train"), "propagate", True)
    return caplog


@torch.no_grad()
def loss_one_by_one(model: Any, example: Example) -> tuple[float, int]:
    """The definition: no padding, full logits, a sum over labels in float64."""
    logits = model.eval()(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    nll, count = 0.0, 0
    for position in range(1, len(example.input_ids)):
        if example.loss_mask[position]:
            row = logits[position - 1]
            nll += float(torch.logsumexp(row, 0) - row[example.input_ids[position]])
            count += 1
    return nll, count


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere", "granite", "phi", "gpt_neox", "falcon"])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_held_out_loss_equals_its_definition(pico: Pico, model_type: str, batch_size: int) -> None:
    scaled = {"cohere": {"logit_scale": 0.25}, "granite": {"logits_scaling": 4.0}, "gemma2": {}}.get(model_type, {})
    model = load(pico(model_type, **scaled))
    examples = ragged_examples()
    expected = [loss_one_by_one(model, example) for example in examples]
    result = held_out_loss(model, examples, batch_size=batch_size, pad_token_id=0)
    assert [row.num_tokens for row in result.per_example] == [count for _, count in expected]
    for row, (nll, _) in zip(result.per_example, expected, strict=True):
        assert row.nll == pytest.approx(nll, rel=2e-5, abs=1e-5)
    tokens = sum(count for _, count in expected)
    assert result.loss == pytest.approx(sum(nll for nll, _ in expected) / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj"]},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "head trained in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [7]},
    },
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapters_loss_equals_its_definition_with_any_wrapped_head(pico_llama: Path, kind: str) -> None:
    torch.manual_seed(1)
    model = get_peft_model(load(pico_llama), LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    expected = [loss_one_by_one(model, example)[0] for example in ragged_examples()]
    result = held_out_loss(model, ragged_examples(), batch_size=3, pad_token_id=0)
    assert [row.nll for row in result.per_example] == pytest.approx(expected, rel=2e-5, abs=1e-5)
    base = held_out_loss(load(pico_llama), ragged_examples(), batch_size=3, pad_token_id=0)
    assert abs(base.nll - result.nll) > 0.1, "the adapter changes too little to prove anything"


class LargestFloat32(TorchDispatchMode):
    """Records the largest float32 tensor with a vocabulary axis that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.dtype == torch.float32
                and tensor.shape[-1:] == (VOCAB_SIZE,)
            ):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_float32_logits_exist_a_few_labels_at_a_time(pico_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.bfloat16)
    whole = held_out_loss(model, ragged_examples(), batch_size=4, pad_token_id=0)
    monkeypatch.setattr(chunked_loss, "EVAL_LOGITS_BYTES", 3 * 4 * VOCAB_SIZE + 1)
    with LargestFloat32() as watched:
        pieces = held_out_loss(model, ragged_examples(), batch_size=4, pad_token_id=0)
    assert watched.num_elements == 3 * VOCAB_SIZE
    assert pieces.nll == pytest.approx(whole.nll, rel=1e-9)


def head_rows(model: Any) -> list[int]:
    """Return a list that receives the number of positions of each call of the head."""
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.numel() // VOCAB_SIZE))
    return seen


@pytest.mark.parametrize(("batch_size", "max_labels"), [(50, 30), (2, 30), (50, 1), (50, 10**6)])
def test_logits_are_made_for_labels_alone_and_bounded_in_a_batch(
    pico_llama: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, max_labels: int
) -> None:
    model = load(pico_llama)
    expected = held_out_loss(model, ragged_examples(), batch_size=1, pad_token_id=0)
    monkeypatch.setattr(held_out_module, "MAX_LOGITS", max_labels * VOCAB_SIZE)
    seen = head_rows(model)
    result = held_out_loss(model, ragged_examples(), batch_size=batch_size, pad_token_id=0)
    of_rows = [row.num_tokens for row in result.per_example]
    assert sum(seen) == sum(of_rows) == result.num_tokens
    assert max(seen) <= max(max_labels, *of_rows)
    assert len(seen) >= len(of_rows) / batch_size
    assert (len(seen) == 1) == (max_labels > sum(of_rows) and batch_size >= len(of_rows))
    assert result.nll == pytest.approx(expected.nll, rel=1e-6)


@contextmanager
def memory_for(model: Any, max_rows: int, min_length: int = 0) -> Iterator[list[int]]:
    """Run out of memory above so many rows of at least this length; yields the rows of each forward pass that fits."""
    seen: list[int] = []

    def allocate(_module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        rows, length = keywords["input_ids"].shape if "input_ids" in keywords else arguments[0].shape
        if rows > max_rows and length >= min_length:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        seen.append(rows)

    handle = model.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("max_rows", [1, 2, 3])
def test_held_out_loss_halves_batches_that_do_not_fit(
    pico_llama: Path, max_rows: int, said: pytest.LogCaptureFixture
) -> None:
    model = load(pico_llama)
    expected = held_out_loss(model, ragged_examples(), batch_size=7, pad_token_id=0)
    with memory_for(model, max_rows) as seen:
        result = held_out_loss(model, ragged_examples(), batch_size=7, pad_token_id=0)
    assert max(seen) <= max_rows
    assert sum(seen) == len(result.per_example)
    assert [row.nll for row in result.per_example] == pytest.approx([row.nll for row in expected.per_example], rel=1e-5)
    assert said.messages[0].startswith(
        "memory: 7 x 40 tokens do not fit, retries with 3 rows (CUDA out of memory. Tried"
    )
    assert said.messages[0].endswith("lower train.per_device_eval_batch_size)")


@pytest.mark.parametrize("max_rows", [1, 2, 4])
def test_answers_stay_the_same_where_memory_runs_out(
    pico_llama: Path, max_rows: int, said: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(pico_llama), AutoTokenizer.from_pretrained(pico_llama)
    expected = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=5)
    with memory_for(model, max_rows):
        found = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=5)
    assert found == expected
    assert said.messages
    assert all("lower --batch-size" in message for message in said.messages)


def test_short_rows_keep_to_the_tokens_that_fitted() -> None:
    lengths, seen = [64, 64, 64, 64, 16, 16, 16, 16, 16, 16], []

    def compute(rows: list[int]) -> None:
        if len(rows) * max(lengths[row] for row in rows) > 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(rows)

    compute_in_batches(batches_by_length(lengths, 4), compute, lengths, setting="--batch-size", advice="")
    assert seen == [[0, 1], [2, 3], [4, 5, 6, 7], [8, 9]]


def test_one_row_that_does_not_fit_is_an_error_with_its_length(pico_llama: Path) -> None:
    model, tokenizer = load(pico_llama), AutoTokenizer.from_pretrained(pico_llama)
    with memory_for(model, 0):
        with pytest.raises(
            ModelError, match=r"one row of \d+ tokens does not fit .*--batch-size is down to 1; lower --max"
        ):
            generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=5)
        with pytest.raises(
            ModelError, match=r"one row of 40 tokens .*eval_batch_size is down to 1; lower data.max_length"
        ):
            held_out_loss(model, ragged_examples(), batch_size=4, pad_token_id=0)
        with pytest.raises(ModelError, match=r"one row of 9 tokens does not fit .*; lower data.max_length"):
            next(label_log_probabilities(model, ragged_examples()))


def test_the_training_mode_of_every_module_is_restored(pico_llama: Path) -> None:
    model = load(pico_llama)
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    held_out_loss(model, ragged_examples(), batch_size=2, pad_token_id=0)
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(IndexError):
        held_out_loss(model, [Example("x", (1, 10**6), (True, True), None, None)], batch_size=2, pad_token_id=0)
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("examples", [[], [Example("a", (5, 6), (True, False), None, None)]])
def test_no_label_to_measure_is_an_error(pico_llama: Path, examples: list[Example]) -> None:
    with pytest.raises(DataError, match="none with a label token"):
        held_out_loss(load(pico_llama), examples, batch_size=2, pad_token_id=0)


def user(*texts: str) -> list[Message]:
    return [{"role": "user", "content": text} for text in texts]


PROMPTS = [
    user("the quick brown fox"),
    user("What is the capital of France?"),
    [{"role": "system", "content": "one two three four five six seven"}, *user("eight nine")],
    user("a"),
    user("Springfield, IL 62704"),
]


def answer_alone(model: Any, tokenizer: Any, prompt: list[Message], max_new_tokens: int) -> str:
    """Greedy decoding by hand: no batch, no padding, no cache, stop at the end of turn."""
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < max_new_tokens:
        with torch.no_grad():
            token = int(model.eval()(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.convert_tokens_to_ids("<|im_end|>"):
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen2"])
def test_batched_answers_equal_answers_one_by_one(pico: Pico, model_type: str) -> None:
    folder = pico(model_type)
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    side = tokenizer.padding_side
    expected = [answer_alone(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    for batch_size in (1, 2, 5):
        assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=batch_size) == expected
    assert len(set(expected)) > 1
    assert tokenizer.padding_side == side


def test_sampling_and_penalties_of_the_checkpoint_do_not_apply(pico_llama: Path) -> None:
    model, tokenizer = load(pico_llama), AutoTokenizer.from_pretrained(pico_llama)
    plain = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=2)
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=3, top_p=0.5, repetition_penalty=9.0)
    model.train()
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=2) == plain
    assert model.training


def test_an_answer_ends_at_the_templates_end_of_turn(pico_llama: Path) -> None:
    """A tokenizer whose EOS differs from its end-of-turn token, as in Llama 3 base models."""
    model, tokenizer = load(pico_llama), AutoTokenizer.from_pretrained(pico_llama)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == sorted({end_of_turn, tokenizer.eos_token_id})
    [before] = generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=30, batch_size=1)
    ids = tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    token = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, -1]
    with torch.no_grad():
        model.lm_head.weight[end_of_turn] = 2 * model.lm_head.weight[token]
    [answer] = generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=30, batch_size=1)
    assert answer == answer_alone(model, tokenizer, PROMPTS[0], 30)
    assert len(answer) < len(before)
    assert before.startswith(answer)


def test_a_template_that_writes_the_date_writes_that_of_the_run(pico_llama: Path) -> None:
    model, tokenizer = load(pico_llama), AutoTokenizer.from_pretrained(pico_llama)
    days = [datetime.date(2026, 1, 2), datetime.date(2027, 3, 4)]
    expected = []
    for day in days:
        tokenizer.chat_template = f"{day:%d %b %Y} " + CHATML
        expected += generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=8, batch_size=1)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + CHATML
    found = [
        generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=8, batch_size=1, date=day)[0] for day in days
    ]
    assert found == expected
    assert found[0] != found[1], "the date makes no difference to this model, and the test proves nothing"


def test_prompts_that_cannot_be_rendered_are_refused(pico_llama: Path) -> None:
    model, tokenizer = load(pico_llama), AutoTokenizer.from_pretrained(pico_llama)
    assert generate_answers(model, tokenizer, [], max_new_tokens=4, batch_size=2) == []
    with pytest.raises(DataError, match="prompt 1 is empty"):
        generate_answers(model, tokenizer, [user("a"), []], max_new_tokens=4, batch_size=2)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="chat template"):
        generate_answers(model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=2)


def test_plain_prompt_is_sent_as_it_was_trained(pico_llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the quick brown", "completion": " fox jumps"}\n' * 3)
    tokenizer = AutoTokenizer.from_pretrained(pico_llama)
    data = prepare_data(DataSection.model_validate({"train": str(rows)}), tokenizer, 0)
    example = data.train[0]
    assert (example.prompt, example.answer) == ("the quick brown", " fox jumps")
    num_prompt = example.loss_mask.tolist().index(True)
    [sent] = generation.encode_prompts(tokenizer, [example.prompt], datetime.date(2026, 1, 1))
    assert sent == example.input_ids[:num_prompt].tolist()
    assert len(generate_answers(load(pico_llama), tokenizer, [example.prompt] * 2, max_new_tokens=4, batch_size=2)) == 2


def obj(**fields: Any) -> str:
    return json.dumps(fields)


def test_scores_of_json_answers_are_those_counted_by_hand() -> None:
    expected = [obj(a="1", b="2"), obj(a="1"), obj(a="1", b=["x"]), obj(c=1)]
    got = [
        '{ "b": "2",  "a": "1" }',  # equal in any order: 2 of 2 found, 2 wanted
        obj(a="2", z="3"),  # 0 right of 2 found, 1 wanted
        obj(b=["x"]),  # 1 right of 1 found, 2 wanted
        "no json",  # nothing found, 1 wanted
    ]
    scores = score_answers(expected, got)
    assert scores.matches == (True, False, False, False)
    assert scores.exact_match == 0.25
    assert scores.valid_json == 0.75
    assert scores.field_f1 == pytest.approx(2 * 3 / (5 + 6))


@pytest.mark.parametrize(
    ("expected", "got", "match"),
    [
        ("Paris", " Paris\n", True),
        ("Paris", "paris", False),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 1}', '{"a": "1"}', False),
        ('{"a": {"x": 1, "y": 2}}', '{"a": {"y": 2, "x": 1}}', True),
        ("[1, 2]", "[1,2]", False),
        ('{"a": 1}', '{"a": 1} and more', False),
        ('{"a": NaN}', '{"a":NaN}', False),
        ('{"a": 1}', "[" * 100_000, False),
        ("", "", True),
    ],
)
def test_exact_match_is_of_text_or_of_json_objects(expected: str, got: str, match: bool) -> None:
    assert score_answers([expected], [got]).matches == (match,)


@pytest.mark.parametrize(
    ("expected", "got", "match"),
    [
        (
            "<think>\nAdding.\n</think>\n\nFour.",
            "Adding them.\n</think>\n\nFour.",
            True,
        ),  # the prompt opens the thoughts
        ("<think>\nAdding.\n</think>\n\nFour.", "<think>\nHm.\n</think>\n\nFour.", True),
        ("Four.", "<think>\n\n</think>\n\nFour.", True),
        ('<think>x</think>{"sum": 4}', 'Hm.</think>\n\n{"sum":4}', True),
        ("Four.", "Four.\n</think>\n\nFive.", False),
        ("Four.", "Four and", False),
        ("Close it with </think>", "Open it with </think>", False),
        ("Close it with </think>", "<think>Hm.</think>Close it with </think>", True),
    ],
)
def test_thoughts_before_an_answer_are_not_compared(expected: str, got: str, match: bool) -> None:
    scores = score_answers([expected], [got])
    assert scores.matches == (match,)
    assert scores.field_f1 == (1.0 if "{" in expected else None)


def test_plain_text_answers_have_no_json_scores() -> None:
    scores = score_answers(["Paris", obj(a=1)], ["Paris", obj(a=1)])
    assert (scores.exact_match, scores.valid_json, scores.field_f1) == (1.0, None, None)
    assert score_answers(["{}"], ["{}"]).field_f1 == 1.0


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(DataError, match="no answers"):
        score_answers([], [])


def test_rows_are_compared_by_who_has_them_right() -> None:
    first = AnswerScores(0.5, None, None, (True, True, False, False, True))
    second = AnswerScores(0.5, None, None, (True, False, True, False, True))
    assert compare_answers(first, second) == {
        "both": 2, "only the adapter": 1, "only the merged model": 1, "neither": 1,
    }  # fmt: skip


def test_few_shot_prompt_keeps_the_prompts_own_system_message() -> None:
    system: Message = {"role": "system", "content": "S"}
    shots = [
        Example("1", (), (), ({"role": "system", "content": "other"}, *user("q1")), "a1"),
        Example("2", (), (), tuple(user("q2")), "a2"),
    ]
    turns = few_shot_prompt((system, *user("q")), shots)
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("system", "S"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"), ("user", "q"),
    ]  # fmt: skip
    assert few_shot_prompt(tuple(user("q")), []) == tuple(user("q"))
    with pytest.raises(DataError, match="file:3: no solved example of this kind"):
        few_shot_prompt(tuple(user("q")), [Example("file:3", (), (), None, None)])


def test_few_shot_prompt_of_plain_text_is_plain_text() -> None:
    shots = [Example("1", (), (), "1 + 1 =", " 2"), Example("2", (), (), "2 + 2 =", " 4")]
    assert few_shot_prompt("3 + 3 =", shots) == "1 + 1 = 2\n\n2 + 2 = 4\n\n3 + 3 ="
    with pytest.raises(DataError, match="2: no solved example of this kind"):
        few_shot_prompt(tuple(user("q")), shots[1:])
