"""`qlora-train plan CONFIG`."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_train.cli.options import ConfigFile, Offline, Overrides
from qlora_train.cli.output import print_text

if TYPE_CHECKING:
    from qlora_train.config import RunConfig

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
) -> None:
    """Print what a run needs: memory, disk, steps and time; loads no weights."""
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
    resolved = load_run_config(config, overrides or ())
    device = plan_device(memory)
    base = find_base_config(resolved.model)
    data, note = (None, "not read (--no-data)") if no_data else _data(resolved, offline=offline)

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
        return
    notes = [f"data      {note}", *([f"earlier   {bar}"] if bar else [])]
    if change is not None:
        notes += [
            f"to fit ({change.plan.fitted.least_bytes / 1e9:.1f} GB):",
            *(f"  {line}" for line in change.yaml_lines()),
        ]
    elif not result.fitted.fits:
        notes.append("to fit    no setting is left; use a smaller model or a larger GPU")
    print_text("\n".join(plan_lines(result, resolved.model.model_name_or_path, base.origin, notes)))


def _data(config: "RunConfig", *, offline: bool) -> tuple[Any, str]:
    """Return the prepared data and a note; None if it, or the tokenizer, is not on this machine."""
    from qlora_train.config.path_checks import is_local_data, is_local_model
    from qlora_train.utils.errors import UserError

    sources = (*config.data.train, *(config.data.eval if isinstance(config.data.eval, tuple) else ()))
    if not all(is_local_data(source.path) for source in sources):
        return None, "not read (on the Hub): rows of data.max_length tokens are assumed"
    if not is_local_model(config.model.model_name_or_path):
        return None, "not read (the tokenizer is on the Hub): rows of data.max_length tokens"
    from qlora_train.cli.libraries import prepare_libraries

    logging.getLogger("qlora_train").setLevel(logging.WARNING)  # the plan is one screen
    prepare_libraries(offline=offline)
    from qlora_train.planning.base_and_data import inspect

    try:
        data = inspect(config, num_shown=0)
    except UserError as error:
        return None, f"cannot be used ({error.problems[0]})"
    rows = "a stream" if data.num_train_rows is None else f"{data.num_train_rows:,} training rows"
    return data, f"{rows}, {len(data.eval):,} held out"
