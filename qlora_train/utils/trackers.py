"""The experiment trackers of `run.report_to`: what keeps each offline, what is secret, what this trainer cannot upload."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tracker:
    """A tracker that Transformers has a callback for.

    Attributes:
        offline: environment variables that keep it from using the network.
        project_variable: variable with the name of the project, or experiment, that runs belong to.
        server_variable: variable with the address of its server.
        server_prefixes: values of that variable that are on the network; empty for all.
        secrets: variables with credentials.
        uploads: variables and their values that make Transformers' callback upload `output_dir/checkpoint-N`. A run's
            checkpoints have other names and files.
    """

    offline: Mapping[str, str] = field(default_factory=dict)
    project_variable: str = ""
    server_variable: str = ""
    server_prefixes: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    uploads: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def remote_server_variable(self) -> str | None:
        """Return the variable that names a server on the network, or None if there is none."""
        value = os.environ.get(self.server_variable, "")
        return self.server_variable if value and value.startswith(self.server_prefixes or "") else None

    def upload_variable(self) -> str | None:
        """Return the variable that asks for uploads of checkpoints, or None."""
        found = (name for name, values in self.uploads.items() if os.environ.get(name, "").lower() in values)
        return next(found, None)


TRACKERS = {
    "tensorboard": Tracker(),
    "wandb": Tracker(
        offline={"WANDB_MODE": "offline"},
        project_variable="WANDB_PROJECT",
        secrets=("WANDB_API_KEY",),
        uploads={"WANDB_LOG_MODEL": ("checkpoint",)},
    ),
    "mlflow": Tracker(
        project_variable="MLFLOW_EXPERIMENT_NAME",
        server_variable="MLFLOW_TRACKING_URI",
        server_prefixes=("http://", "https://", "databricks"),
        secrets=("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN"),
        uploads={"HF_MLFLOW_LOG_ARTIFACTS": ("1", "on", "yes", "true")},
    ),
    "trackio": Tracker(server_variable="TRACKIO_SPACE_ID"),
}


def go_offline(names: Iterable[str]) -> None:
    """Keep the trackers of a run from using the network; one that is disabled stays disabled.

    For the trackers of the run alone: Transformers greets everyone for whom W&B is offline.
    """
    for name in names:
        for variable, value in TRACKERS[name].offline.items():
            if os.environ.get(variable) != "disabled":
                os.environ[variable] = value
