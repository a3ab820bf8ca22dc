"""Learning-rate schedules: those of Transformers, with a warm-up that starts above 0."""

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler


def make_lr_scheduler(
    name: SchedulerType, optimizer: Optimizer, *, num_warmup_steps: int, num_training_steps: int
) -> LambdaLR:
    """Return Transformers' schedule with warm-up factors (step + 1) / (num_warmup_steps + 1), steps counted from 0.

    Transformers' factors, step / num_warmup_steps, train nothing in the first step, and nothing at all in a one-step run.
    """
    num_training_steps = max(num_training_steps, num_warmup_steps + 1)  # polynomial divides by the steps after warm-up
    schedule = get_scheduler(name, optimizer, num_warmup_steps, num_training_steps)
    assert isinstance(schedule, LambdaLR), "the config allows no other schedule"
    if name != SchedulerType.CONSTANT:  # which has no warm-up
        schedule.lr_lambdas = [_with_warmup(factor, num_warmup_steps) for factor in schedule.lr_lambdas]
    fast_forward(schedule, 0)
    return schedule


def _with_warmup(factor: Callable[[int], float], num_warmup_steps: int) -> Callable[[int], float]:
    return lambda step: (step + 1) / (num_warmup_steps + 1) if step < num_warmup_steps else factor(step)


def fast_forward(schedule: LambdaLR, num_steps: int) -> None:
    """Set a new schedule to its state after `num_steps` steps; the rates are a function of that number."""
    factors = [factor(num_steps) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": num_steps, "_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
