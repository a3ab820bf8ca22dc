"""The figures at the top of a report, and the checks that a run has passed, skipped or failed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_train.report.metric_charts import PEAK_MEMORY, values_of
from qlora_train.report.number_text import number_text
from qlora_train.report.recorded_run import RecordedRun

State = Literal["passed", "warning", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A headline number with a note below it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A check of the run, with what was found."""

    name: str
    state: State
    text: str


def setting(run: RecordedRun, key: str) -> Any:
    """Return a setting of the run, None if config.yaml is not readable."""
    return next((each.value for each in run.settings if each.key == key), None)


def status_of(run: RecordedRun) -> str:
    """Return whether training has finished, and at which step."""
    if run.training:
        return f"finished at step {run.training.get('steps')}"
    return f"not finished: last step {run.last_step}" if run.last_step else "not begun"


def method_of(run: RecordedRun) -> str:
    """Return how the adapter was trained, in one line."""
    rank, alpha = setting(run, "lora.r"), setting(run, "lora.lora_alpha")
    if rank is None:
        return "settings unknown"
    if not setting(run, "quantization.load_in_4bit"):
        base = "LoRA, base in 16 bits"
    else:
        base = f"QLoRA, base in {str(setting(run, 'quantization.bnb_4bit_quant_type')).upper()}"
    return f"{base}, rank {rank}, alpha {number_text(alpha)}, objective {setting(run, 'train.objective')}"


# --- figures ----------------------------------------------------------------------------------------------------------


def figures_of(run: RecordedRun) -> list[Figure]:
    """Return the headline numbers that the run has."""
    found = (_held_out_loss(run), _exact_match(run), _steps(run), _duration(run), _memory(run))
    return [figure for figure in found if figure is not None]


def _held_out_loss(run: RecordedRun) -> Figure | None:
    losses = values_of(run, "eval_loss")
    if not losses:
        return _training_loss(run)
    step = run.training.get("taken_from_step", max(losses))
    shown = losses.get(step, losses[max(losses)])
    if len(losses) == 1:
        return Figure("Held-out loss", number_text(shown), "one evaluation")
    return Figure("Held-out loss", number_text(shown), f"{number_text(losses[min(losses)])} at step {min(losses)}")


def _training_loss(run: RecordedRun) -> Figure | None:
    losses = values_of(run, "loss")
    if not losses:
        return None
    return Figure(
        "Training loss", number_text(losses[max(losses)]), f"{number_text(losses[min(losses)])} at step {min(losses)}"
    )


def _exact_match(run: RecordedRun) -> Figure | None:
    evaluation = run.results.get("evaluation", {})
    scores = {name: evaluation.get(name, {}).get("exact_match") for name in ("adapter", "merged", "base")}
    measured = {name: score for name, score in scores.items() if score is not None}
    if not measured:
        return None
    name, score = next(iter(measured.items()))
    others = [f"{other} {number_text(value, 'share')}" for other, value in measured.items() if other != name]
    return Figure("Exact match", number_text(score, "share"), ", ".join(others) or name)


def _steps(run: RecordedRun) -> Figure | None:
    training = run.training
    if not run.last_step and not training:
        return None
    tokens = training.get("num_tokens")
    note = (
        f"{number_text(tokens)} tokens"
        if tokens
        else f"of {run.plan['num_steps']}"
        if run.plan.get("num_steps")
        else ""
    )
    return Figure("Steps", number_text(training.get("steps", run.last_step)), note)


def _duration(run: RecordedRun) -> Figure | None:
    seconds, of_steps = run.training.get("train_seconds"), run.training.get("step_seconds")
    if not seconds or not of_steps:
        return None
    planned = run.results.get("plan", {}).get("predicted_seconds")
    of_plan = f" (planned {number_text(planned, 'seconds')})" if planned else ""
    notes = [f"optimizer steps {number_text(of_steps, 'seconds')}{of_plan}"]
    if speed := tokens_per_second(run):
        notes.append(f"{number_text(speed)} tokens/s")
    if reference := run.training.get("since_last_start", {}).get("reference_seconds"):
        notes.append(f"reference log-probabilities {number_text(reference, 'seconds')}")
    return Figure("Training time", number_text(seconds, "seconds"), ", ".join(notes))


def tokens_per_second(run: RecordedRun) -> float | None:
    """Return the mean speed of the run's optimizer steps; None if it has not finished."""
    seconds, tokens = run.training.get("step_seconds"), run.training.get("num_tokens")
    return tokens / seconds if seconds and tokens else None


def _memory(run: RecordedRun) -> Figure | None:
    plan = run.results.get("plan", {})
    measured = plan.get("measured_peak_bytes")
    planned = plan.get("predicted_peak_bytes") or run.plan.get("peak_bytes")
    so_far = max(values_of(run, PEAK_MEMORY).values(), default=None)
    if not measured and so_far and run.is_on_cpu:
        return Figure("Peak memory", number_text(so_far, "bytes"), "whole process, not what the plan counts")
    measured = measured or so_far
    if measured:
        note = f"planned {number_text(planned, 'bytes')}" if planned else "not planned"
        return Figure("Peak memory", number_text(measured, "bytes"), note)
    return Figure("Peak memory, planned", number_text(planned, "bytes"), "not measured") if planned else None


# --- checks -----------------------------------------------------------------------------------------------------------


def checks_of(run: RecordedRun) -> list[Check]:
    """Return the checks, in the order in which a run makes them."""
    parity = (_parity(name, check) for name, check in run.parity_checks.items())
    return [*parity, _quantization(run), *_training_guard(run), _adapter_check(run), *_merge_checks(run)]


def _parity(name: str, check: Mapping[str, Any]) -> Check:
    title = f"Parity check: {name}"
    if not check:
        return Check(title, "skipped", f"not made: the run did not use {name}, or has not begun")
    numbers = ", ".join(
        f"{label} {number_text(check[key])}" for key, label in
        (("loss", "loss differs by"), ("gradient", "gradients by"), ("tensor", "the worst tensor by"))
        if isinstance(check.get(key), int | float)
    )  # fmt: skip
    if check.get("passed"):
        return Check(title, "passed", f"as the reference computes: {numbers}")
    return Check(title, "warning", f"not used: {check.get('problem') or numbers}")


def _quantization(run: RecordedRun) -> Check:
    found = run.results.get("quantization")
    if setting(run, "quantization.load_in_4bit") is False:
        return Check("Quantization", "skipped", "the base is in 16 bits: quantization.load_in_4bit is false")
    if not found:
        return Check("Quantization", "skipped", "recorded when training has finished")
    limit = setting(run, "quantization.min_quantized_share") or 0.0
    state: State = "passed" if found["quantized_share"] >= limit else "failed"
    return Check(
        "Quantization",
        state,
        f"{number_text(found['quantized_share'], 'share')} of {number_text(found['num_linear_weights'])} linear weights in "
        f"4 bits, {found['bits_per_weight']:.3f} bits each; at least {number_text(limit, 'share')} asked for",
    )


def _training_guard(run: RecordedRun) -> Iterator[Check]:
    counts = {
        "steps skipped because of a non-finite number": run.training.get("num_skipped_steps"),
        "loss spikes": run.training.get("num_loss_spikes"),
    }
    if run.training:
        found = [f"{count} {name}" for name, count in counts.items() if count]
        text = ", ".join(found) or "every number finite, no loss spike"
        yield Check("Training", "warning" if found else "passed", text)


def _adapter_check(run: RecordedRun) -> Check:
    check = run.results.get("adapter_check")
    if not check:
        return Check("Adapter check", "skipped", "not made: the run is not finished, or its base needs several devices")
    text = (
        f"loaded in a fresh process by the code on its card: {_predictions(check, check['num_tokens'])}; limit "
        f"{number_text(check['max_divergence'])}; {number_text(check['num_texts'])} texts tokenised alike"
    )
    return Check("Adapter check", "passed" if check["passed"] else "failed", text)


def _merge_checks(run: RecordedRun) -> Iterator[Check]:
    merge = run.results.get("merge")
    if not merge:
        asked = setting(run, "export.merge")
        yield Check("Merge", "skipped", "not merged yet" if asked else "not asked for: export.merge is false")
        return
    for base, candidate in merge["candidates"].items():
        kept = base == merge["merge_base"]
        text = (
            f"{'kept' if kept else 'not kept'}: {merge['rows']} loss {number_text(candidate['loss'])}, with the adapter "
            f"{number_text(merge['adapter_loss'])}; {_predictions(candidate, merge['num_tokens'])}"
        )
        yield Check(f"Merge onto the {base} base", "passed" if kept else "skipped", text)


def _predictions(check: Mapping[str, Any], num_tokens: int) -> str:
    """Return how far predictions are from the trained model's."""
    return (
        f"KL divergence {number_text(check['kl_divergence'])} nats/token, top-1 equal at "
        f"{number_text(check['top1_agreement'], 'share')} of {number_text(num_tokens)} tokens"
    )
