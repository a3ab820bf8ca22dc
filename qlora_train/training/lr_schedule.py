"""The learning rate of every step: Transformers' schedules, with a warm-up whose first rate is not 0."""

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler


def make_lr_scheduler(
    name: SchedulerType, optimizer: Optimizer, *, num_warmup_steps: int, num_training_steps: int
) -> LambdaLR:
    """Return Transformers' schedule with warm-up factors (step + 1) / (num_warmup_steps + 1), for steps from 0.

    Transformers warms up by step / num_warmup_steps, so that the first step, and all of a one-step run, trains nothing.
    """
    num_training_steps = max(num_training_steps, num_warmup_steps + 1)  # polynomial divides by the steps after warm-up
    schedule = get_scheduler(name, optimizer, num_warmup_steps, num_training_steps)
    assert isinstance(schedule, LambdaLR), "the config offers no other schedule"
    if name != SchedulerType.CONSTANT:  # which has no warm-up
        schedule.lr_lambdas = [_warmed_up(factor, num_warmup_steps) for factor in schedule.lr_lambdas]
    fast_forward(schedule, 0)
    return schedule


def _warmed_up(factor: Callable[[int], float], num_warmup_steps: int) -> Callable[[int], float]:
    return lambda step: (step + 1) / (num_warmup_steps + 1) if step < num_warmup_steps else factor(step)


def fast_forward(schedule: LambdaLR, num_steps: int) -> None:
    """Put a fresh schedule where it stands after `num_steps` steps: its rates are a pure function of that number."""
    factors = [factor(num_steps) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": num_steps, "_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
