"""`qlora-train check`, `show` and `schema`, which need the config package only."""

import json

from qlora_train.cli.options import ConfigFile, Overrides


def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a config, and the files and packages that it needs; no torch, no download."""
    from qlora_train.config import load_run_config
    from qlora_train.config.preflight import check_machine

    check_machine(load_run_config(config, overrides or ()))
    print(f"{config}: ok")


def show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the resolved config, each value with its source."""
    from qlora_train.config.writer import provenance

    settings = provenance(config, overrides or ())
    width = max(len(setting.key) for setting in settings)
    for setting in settings:
        print(f"{setting.key:<{width}}  {json.dumps(setting.value)}  # {setting.source}")


def schema() -> None:
    """Print the JSON schema of the config, for editors."""
    from qlora_train.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))
