"""Shared by all tests: no network, few threads, a temporary cache, the `fast` mark, and pico models built once per session.

`make test` runs tests in several processes (pytest-xdist), each with one thread, as do the processes that tests start.
"""

import logging
import os
import shutil
import sys
import tempfile
import warnings

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="qlora-train-tests-")  # not the user's
# one folder per process: Python keeps the package that it imports from it first
os.environ["HF_MODULES_CACHE"] = f"{os.environ['XDG_CACHE_HOME']}/modules"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import fake_cuda

if fake_cuda.IS_FAKE:  # before Transformers and accelerate look for a device
    fake_cuda.install()

from qlora_train.export import fresh_process
from tests.support.pico import build_pico

fresh_process.PRELOAD.append("tests.faults.child")  # the tests of faults start their processes by the same server
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


DEVELOPMENT_PACKAGES = {"hypothesis", "gguf", "xllamacpp", "atheris", "playwright", "pyte"}


class TestFile(pytest.Module):
    """A test file that is skipped without its development package: a machine with a GPU may have runtime packages only."""

    def _getobj(self) -> Any:
        try:
            return super()._getobj()
        except self.CollectError as error:
            missing = getattr(error.__cause__, "name", None)
            if missing not in DEVELOPMENT_PACKAGES:
                raise
        for name, module in list(sys.modules.items()):
            if getattr(module, "__file__", None) == str(self.path):
                del sys.modules[name]  # partly imported
        raise pytest.skip.Exception(f"needs the package {missing}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> TestFile:
    return TestFile.from_parent(parent, path=module_path)


SLOW_NAMES = {
    "RankedRuns",
    "run_workers",
    "start_processes",
    "train_run",
    "run_config",
    "adapted_model",
    "load_model",
    "subprocess",
    "multiprocessing",
    "Runs",
    "build_pico",
}
SLOW_FIXTURES = {"pico", "pico_llama"}
SLOW_FOLDERS = {
    "adapters",
    "architectures",
    "e2e",
    "faults",
    "fuzz",
    "kernels",
    "objectives",
    "parallel",
    "scripts",
    "training",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as `fast` if they use no model and their module starts no run and no process."""
    for item in items:
        names, fixtures = vars(item.module).keys(), set(item.fixturenames)  # type: ignore[attr-defined]
        slow = SLOW_NAMES & names or SLOW_FIXTURES & fixtures or item.path.parent.name in SLOW_FOLDERS
        if not slow and not item.get_closest_marker("slow") and not item.get_closest_marker("gpu"):
            item.add_marker("fast")


def pytest_unconfigure() -> None:
    """Delete the cache."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pico(model_type, **arguments of build_pico) -> folder`, built once per session; read-only."""
    built: dict[str, Path] = {}

    def get(model_type: str = "llama", **arguments: Any) -> Path:
        key = repr((model_type, sorted(arguments.items())))
        if key not in built:
            built[key] = build_pico(tmp_path_factory.mktemp(f"pico-{model_type}-"), model_type, **arguments)
        return built[key]

    return get


@pytest.fixture(scope="session")
def pico_llama(pico: Callable[..., Path]) -> Path:
    """A pico Llama folder; read-only."""
    return pico("llama")


@pytest.fixture(autouse=True)
def packages_end_with_their_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget what a test imported from a temporary folder: to the next tests such a package would look installed."""
    before = set(sys.modules)
    yield
    folder = str(tmp_path_factory.getbasetemp())

    def is_temporary(name: str) -> bool:
        spec = vars(sys.modules[name]).get("__spec__")  # an attribute of a lazy module would import it
        places = (spec.origin, *(spec.submodule_search_locations or [])) if spec else ()
        return any(str(place).startswith(folder) for place in places)

    # all are found before one is gone: the places of a namespace package follow those of its parent
    for name in [name for name in set(sys.modules) - before if is_temporary(name)]:
        del sys.modules[name]


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The whole log of the package, also after an earlier test's command line has redirected it."""
    logger = logging.getLogger("qlora_train")
    before, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.DEBUG, logger="qlora_train"):
        yield caplog
    logger.propagate = before


@pytest.fixture
def preserve_library_settings() -> Iterator[None]:
    """Restore logging, warnings and progress bars after `cli.main` ran in this process."""
    import transformers

    logger = logging.getLogger("qlora_train")
    before = logger.handlers[:], logger.level, logger.propagate
    bitsandbytes, verbosity = logging.getLogger("bitsandbytes").level, transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    logger.handlers[:], logger.level, logger.propagate = before
    logging.getLogger("bitsandbytes").setLevel(bitsandbytes)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
