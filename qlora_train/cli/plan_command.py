"""`qlora-train plan CONFIG`."""

import json
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_train.cli.options import ConfigFile, Offline, Overrides
from qlora_train.cli.output import print_text
from qlora_train.utils.errors import ConfigError, UserError

if TYPE_CHECKING:
    from qlora_train.config import RunConfig
    from qlora_train.planning.run_plan import RunPlan

TOO_LARGE_STATUS = 3
"""Exit status of a plan that does not fit; 1 and 2 are those of every command."""
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Plan for a GPU of this size, such as 24GiB (default: this machine)")
]


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    memory: Memory = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="Do not read the data: rows of data.max_length")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON")] = False,
    offline: Offline = False,
) -> int:
    """Print what a run needs: memory, disk, steps and time; loads no weights.

    Exit status: 0 it fits; 3 it is too large for the device; 2 an error, or data that a run would refuse.
    """
    from qlora_train.config import load_run_config
    from qlora_train.planning.base_config import find_base_config
    from qlora_train.planning.cheapest_change import cheapest_change
    from qlora_train.planning.plan_device import plan_device
    from qlora_train.planning.plan_text import plan_lines
    from qlora_train.planning.run_history import earlier_runs, error_bar, predict_seconds
    from qlora_train.planning.run_plan import RunPlan, plan_run
    from qlora_train.planning.workload import RowSizes
    from qlora_train.utils import network

    if offline:
        network.go_offline()
    _refuse_model(config)
    resolved = load_run_config(config, overrides or ())
    device = plan_device(memory)
    base = find_base_config(resolved.model)
    data, note, refusal = (None, "not read (--no-data)", None) if no_data else _data(resolved, offline=offline)

    def planned(changed: "RunConfig") -> RunPlan:
        sizes = RowSizes.most(changed) if data is None else RowSizes.of(changed, data)
        return plan_run(changed, base.content, device, sizes, is_local=base.is_local)

    folder = Path(str(resolved.run.output_dir))
    earlier = earlier_runs(folder.parent, device.name) if device.is_this_machine else []
    result = predict_seconds(planned(resolved), earlier)
    change = None if result.fitted.fits else cheapest_change(resolved, planned)
    bar = error_bar(earlier)
    if as_json:
        more = {"config_json": base.origin, "data": note, "earlier_runs": bar or None}
        changes = None if change is None else dict(change.changes)
        print_text(json.dumps({**result.to_json(), **more, "fitting_change": changes}, indent=2))
        return _status(result, refusal)
    notes = [f"data      {note}", *([f"earlier   {bar}"] if bar else [])]
    if change is not None:
        notes += [
            f"to fit ({change.plan.fitted.least_bytes / 1e9:.1f} GB):",
            *(f"  {line}" for line in change.yaml_lines()),
        ]
    elif not result.fitted.fits:
        notes.append("to fit    no setting is left; use a smaller model or a larger GPU")
    print_text("\n".join(plan_lines(result, resolved.model.model_name_or_path, base.origin, notes)))
    return _status(result, refusal)


def _refuse_model(config: Path) -> None:
    """Refuse the name of a model where a config is expected."""
    is_hub_id = len(config.parts) == 2 and not config.parent.exists() and config.suffix not in (".yaml", ".yml")
    if config.suffix == ".gguf" or (config / "config.json").is_file() or is_hub_id:
        command = shlex.join(["qlora-train", "new", str(config), "-o", "my.yaml"])
        raise ConfigError(
            f"{config}: plan takes a config, not a model; write one, which prints its plan too: {command}"
        )


def _status(plan: "RunPlan", refusal: UserError | None) -> int:
    """Return the exit status of a printed plan; data that a run would refuse is an error."""
    if refusal is not None:
        raise refusal
    return 0 if plan.fitted.fits else TOO_LARGE_STATUS


def _data(config: "RunConfig", *, offline: bool) -> tuple[Any, str, UserError | None]:
    """Return the prepared data, a note, and why a run would refuse the data.

    The data is None if it is refused, or if it or the tokenizer is not on this machine.
    """
    from qlora_train.config.path_checks import is_local_data, is_local_model

    sources = (*config.data.train, *(config.data.eval if isinstance(config.data.eval, tuple) else ()))
    if not all(is_local_data(source.path) for source in sources):
        return None, "not read (on the Hub): rows of data.max_length tokens are assumed", None
    if not is_local_model(config.model.model_name_or_path):
        return None, "not read (the tokenizer is on the Hub): rows of data.max_length tokens", None
    from qlora_train.cli.libraries import prepare_libraries

    logging.getLogger("qlora_train").setLevel(logging.WARNING)  # the plan is one screen
    prepare_libraries(offline=offline)
    from qlora_train.planning.base_and_data import inspect

    try:
        data = inspect(config, num_shown=0)
    except UserError as error:
        return None, "cannot be used (the error follows): rows of data.max_length tokens", error
    rows = "a stream" if data.num_train_rows is None else f"{data.num_train_rows:,} training rows"
    return data, f"{rows}, {len(data.eval):,} held out", None
