"""The shape of the package: imports go one way, heavy libraries stay where they belong, nothing is unpickled or patched."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qlora_train"
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = (
    "utils", "config", "architectures", "kernels", "objectives", "data", "models", "adapters", "runs", "evaluation",
    "training", "export", "planning", "inference", "pipeline", "cli",
)  # fmt: skip
"""Packages from first to last: each imports only earlier ones."""
FOUNDATIONS = {
    "utils": set(), "config": {"utils"}, "architectures": {"utils"}, "kernels": set(), "runs": {"config", "utils"},
}  # fmt: skip
"""Packages that everything builds on, and all that they may import of this package."""
FORBIDDEN = {"data": {"kernels", "models", "objectives"}, "training": {"export"}, "runs": {"training"}}
"""Packages that must stay independent of an earlier one."""
HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "safetensors"}
"""Libraries that take seconds to load."""
LIGHT = ["cli", "utils", "config", "architectures", "data"]
"""Packages that do not import torch, so that their messages come in milliseconds."""
WITH_TENSORS = {"collate.py", "device.py", "nvidia_driver.py"}
"""Files of light packages that use tensors."""
RESTRICTED = PACKAGE / "models" / "legacy_bin.py"
"""The one file that reads pickles of others, with the reader that runs no code."""
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

names = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def stage_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Yield the full names of imported modules; `from package import name` gives `package.name` too."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def stages_imported_by(file: Path) -> set[str]:
    ours = (name.split(".") for name in imported(ast.walk(tree_of(file))))
    return {parts[1] for parts in ours if parts[0] == "qlora_train" and len(parts) > 1} - {
        "__version__",
        stage_of(file),
    }


def libraries_imported_by(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(ast.walk(tree_of(file)))}


def test_every_stage_has_its_place_in_the_order() -> None:
    stages = {stage_of(file) for file in FILES} - {"__init__"}
    assert stages == set(ORDER), "a new stage belongs into ORDER, after all that it imports"
    assert len(FILES) > 40


@names
def test_no_file_imports_a_later_stage(file: Path) -> None:
    if stage_of(file) == "__init__":
        assert stages_imported_by(file) == set()
        return
    own = ORDER.index(stage_of(file))
    later = {stage for stage in stages_imported_by(file) if ORDER.index(stage) > own}
    assert later == set()


@pytest.mark.parametrize("stage", FOUNDATIONS)
def test_foundations_import_nothing_of_ours(stage: str) -> None:
    found = set().union(*(stages_imported_by(file) for file in FILES if stage_of(file) == stage))
    assert found <= FOUNDATIONS[stage]


@pytest.mark.parametrize("stage", FORBIDDEN)
def test_packages_stay_independent(stage: str) -> None:
    found = set().union(*(stages_imported_by(file) for file in FILES if stage_of(file) == stage))
    assert found & FORBIDDEN[stage] == set()


def test_file_names_are_unique() -> None:
    names = [file.name for file in FILES if file.name != "__init__.py"]
    assert len(set(names)) == len(names)


def test_trl_is_imported_by_the_trainer_alone() -> None:
    assert {stage_of(file) for file in FILES if "trl" in libraries_imported_by(file)} == {"training"}


def at_import(file: Path, seen: set[Path]) -> set[str]:
    """Return the libraries that are loaded when a file is, through files of ours as well."""
    if file in seen:
        return set()
    seen.add(file)
    libraries: set[str] = set()
    for name in imported(iter(tree_of(file).body)):
        root, *rest = name.split(".")
        if root != "qlora_train":
            libraries.add(root)
            continue
        for depth in range(len(rest) + 1):  # a module, and every package on the way to it
            path = PACKAGE.joinpath(*rest[:depth])
            for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                if candidate.is_file():
                    libraries |= at_import(candidate, seen)
    return libraries


@pytest.mark.parametrize("stage", LIGHT)
def test_light_stages_load_no_heavy_library_at_import(stage: str) -> None:
    files = [file for file in FILES if stage_of(file) == stage and file.name not in WITH_TENSORS]
    assert files
    for file in files:
        assert at_import(file, set()) & HEAVY == set(), file


def mentions_model_type(node: ast.AST) -> bool:
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Attribute | ast.Name | ast.Constant)]
    return "model_type" in {getattr(part, "attr", getattr(part, "id", getattr(part, "value", None))) for part in parts}


def compares_a_model_type(node: ast.AST) -> bool:
    """Say whether a value of model_type is compared; a comparison with the word itself is of keys."""
    if isinstance(node, ast.Match):
        return mentions_model_type(node.subject)
    operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    return any(mentions_model_type(operand) for operand in operands if not isinstance(operand, ast.Constant))


@names
def test_model_types_are_told_apart_by_the_table_alone(file: Path) -> None:
    if stage_of(file) == "architectures":
        return
    compared = [node for node in ast.walk(tree_of(file)) if compares_a_model_type(node)]
    assert [ast.unparse(node) for node in compared] == []


def test_the_check_for_model_types_sees_what_it_should() -> None:
    wrong = ("config.model_type == 'llama'", "config['model_type'] in ('a', 'b')", "model_type != 'x'")
    right = ("key != 'model_type'", "config.model_kind == 'llama'", "get('model_type')")
    for text in (*wrong, *right):
        assert any(compares_a_model_type(node) for node in ast.walk(ast.parse(text))) == (text in wrong)


@names
def test_nothing_is_pickled_or_unpickled(file: Path) -> None:
    assert libraries_imported_by(file) & PICKLING == set()
    calls = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
    if file == RESTRICTED:
        [load] = [call for call in calls if ast.unparse(call.func) == "torch.load"]
        assert "weights_only=True" in ast.unparse(load)
        calls.remove(load)
    assert {"torch.load", "torch.save", "np.load", "np.save"} & {ast.unparse(call.func) for call in calls} == set()


def foreign_names(file: Path) -> set[str]:
    """Return the names that a file binds to modules, classes or functions of other libraries."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("qlora_train"):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def root_of(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@names
def test_no_other_library_is_patched(file: Path) -> None:
    foreign = foreign_names(file) - {"os"}  # os.environ is there to be set
    patched = []
    for node in ast.walk(tree_of(file)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "any")]
        patched += [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute) and root_of(t) in foreign]
    assert patched == []
