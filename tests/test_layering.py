"""Import order of the packages, lazy heavy libraries, and no pickle or monkey-patching of libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.source_tree import FILES, PACKAGE, imported, tree_of

ORDER = (
    "utils", "config", "parallel", "architectures", "kernels", "objectives", "data", "models", "adapters", "runs",
    "evaluation", "training", "export", "planning", "authoring", "inference", "report",
    "pipeline", "doctor", "cli",
)  # fmt: skip
"""Packages from first to last: each imports only earlier ones."""
FOUNDATIONS = {
    "utils": set(), "config": {"utils"}, "parallel": {"config", "utils"}, "architectures": {"utils"}, "kernels": set(),
    "runs": {"config", "parallel", "utils"}, "report": {"config", "data", "evaluation", "runs", "utils"},
}  # fmt: skip
"""Packages that may import only these packages."""
FORBIDDEN = {"data": {"kernels", "models", "objectives"}, "training": {"export"}, "runs": {"training"}}
"""Packages that must not import these earlier ones."""
HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "safetensors"}
"""Libraries that take seconds to load."""
LIGHT = ["cli", "utils", "config", "parallel", "architectures", "data", "report"]
"""Packages that do not import torch, so that errors appear within milliseconds."""
WITH_TENSORS = {"collate.py", "device.py", "memory_meter.py", "nvidia_driver.py", "process_group.py"}
"""Files of light packages that use tensors."""
RESTRICTED = PACKAGE / "models" / "legacy_bin.py"
"""The one file that reads pickles, with weights_only."""
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def stage_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def stages_imported_by(file: Path) -> set[str]:
    ours = (name.split(".") for name in imported(ast.walk(tree_of(file))))
    return {parts[1] for parts in ours if parts[0] == "qlora_train" and len(parts) > 1} - {
        "__version__",
        stage_of(file),
    }


def libraries_imported_by(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(ast.walk(tree_of(file)))}


def test_every_package_is_in_the_order() -> None:
    stages = {stage_of(file) for file in FILES} - {"__init__"}
    assert stages == set(ORDER), "add a new package to ORDER, after all packages that it imports"
    assert len(FILES) > 40


def test_no_file_imports_a_later_package() -> None:
    order = ("__init__", *ORDER)
    assert {
        f"{file.relative_to(PACKAGE)} imports {stage}"
        for file in FILES
        for stage in stages_imported_by(file)
        if order.index(stage) > order.index(stage_of(file))
    } == set()


def imports_of_package(stage: str) -> set[str]:
    return set().union(*(stages_imported_by(file) for file in FILES if stage_of(file) == stage))


def test_packages_stay_independent() -> None:
    for stage, allowed in FOUNDATIONS.items():
        assert imports_of_package(stage) <= allowed, stage
    for stage, forbidden in FORBIDDEN.items():
        assert imports_of_package(stage) & forbidden == set(), stage


def test_file_names_are_unique() -> None:
    names = [file.name for file in FILES if file.name != "__init__.py"]
    assert len(set(names)) == len(names)


def modules_imported_by(file: Path) -> set[Path]:
    """Return the files of this package that a file imports, at module level or inside a function."""
    names = (name.split(".") for name in imported(ast.walk(tree_of(file))) if name.startswith("qlora_train."))
    return {path for parts in names if (path := PACKAGE.joinpath(*parts[1:]).with_suffix(".py")).is_file()} - {file}


def test_no_import_circle() -> None:
    waiting = {file: modules_imported_by(file) for file in FILES}
    while free := {file for file, needed in waiting.items() if not needed & waiting.keys()}:
        waiting = {file: needed for file, needed in waiting.items() if file not in free}
    assert sorted(str(file.relative_to(PACKAGE)) for file in waiting) == []


def test_trl_is_imported_by_the_trainer_alone() -> None:
    assert {stage_of(file) for file in FILES if "trl" in libraries_imported_by(file)} == {"training"}


def at_import(file: Path, seen: set[Path]) -> set[str]:
    """Return the libraries that importing a file imports, transitively."""
    if file in seen:
        return set()
    seen.add(file)
    libraries: set[str] = set()
    for name in imported(iter(tree_of(file).body)):
        root, *rest = name.split(".")
        if root != "qlora_train":
            libraries.add(root)
            continue
        for depth in range(len(rest) + 1):  # the module and its parent packages
            path = PACKAGE.joinpath(*rest[:depth])
            for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                if candidate.is_file():
                    libraries |= at_import(candidate, seen)
    return libraries


def test_light_packages_import_no_heavy_library() -> None:
    for file in FILES:
        if stage_of(file) in LIGHT and file.name not in WITH_TENSORS:
            assert at_import(file, set()) & HEAVY == set(), file


def test_check_imports_at_most_a_tenth_of_the_package() -> None:
    config = PACKAGE.parent / "configs" / "llama7b.yaml"
    code = (
        f"import sys; from qlora_train.cli.main import main; assert main(['check', {str(config)!r}]) == 0; "
        "print(*[name for name in sys.modules if name.startswith('qlora_train')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True, capture_output=True, text=True)
    imported_modules = done.stdout.splitlines()[-1].split()
    assert len(imported_modules) <= 0.1 * len(FILES), imported_modules


def mentions_model_type(node: ast.AST) -> bool:
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Attribute | ast.Name | ast.Constant)]
    return "model_type" in {getattr(part, "attr", getattr(part, "id", getattr(part, "value", None))) for part in parts}


def compares_a_model_type(node: ast.AST) -> bool:
    """Tell whether a value of model_type is compared; comparing with the string "model_type" compares keys."""
    if isinstance(node, ast.Match):
        return mentions_model_type(node.subject)
    operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    return any(mentions_model_type(operand) for operand in operands if not isinstance(operand, ast.Constant))


def test_only_the_architectures_table_compares_model_types() -> None:
    assert [
        f"{file.relative_to(PACKAGE)}: {ast.unparse(node)}"
        for file in FILES
        if stage_of(file) != "architectures"
        for node in ast.walk(tree_of(file))
        if compares_a_model_type(node)
    ] == []


def test_comparisons_of_model_types_are_found() -> None:
    wrong = ("config.model_type == 'llama'", "config['model_type'] in ('a', 'b')", "model_type != 'x'")
    right = ("key != 'model_type'", "config.model_kind == 'llama'", "get('model_type')")
    for text in (*wrong, *right):
        assert any(compares_a_model_type(node) for node in ast.walk(ast.parse(text))) == (text in wrong)


def test_nothing_is_pickled_or_unpickled() -> None:
    for file in FILES:
        assert libraries_imported_by(file) & PICKLING == set(), file
        calls = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
        if file == RESTRICTED:
            [load] = [call for call in calls if ast.unparse(call.func) == "torch.load"]
            assert "weights_only=True" in ast.unparse(load)
            calls.remove(load)
        called = {ast.unparse(call.func) for call in calls}
        assert {"torch.load", "torch.save", "np.load", "np.save"} & called == set(), file


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


def assigned_attributes(file: Path) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree_of(file)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "any")]
        yield from (target for target in targets if isinstance(target, ast.Attribute))


def test_no_other_library_is_patched() -> None:
    for file in FILES:
        foreign = foreign_names(file) - {"os"}  # os.environ may be set
        patched = [ast.unparse(target) for target in assigned_attributes(file) if root_of(target) in foreign]
        assert patched == [], file
