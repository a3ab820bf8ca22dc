"""The pages that users read first: short, and every test and file they name exists."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROMISE = re.compile(r"^\| (?P<promise>[^|]+) \| (?P<tests>`(?:tests|scripts)/[^|]+) \|$", re.MULTILINE)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize("page", ["README.md", "docs/reliability.md", "CONTRIBUTING.md"])
def test_links_and_paths_exist(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    links = [path.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    quoted = [
        ROOT / name for name in re.findall(r"`((?:tests|scripts|docs|configs|recipes|qlora_train)/[\w/.-]*)`", text)
    ]
    assert links + quoted
    assert [str(each) for each in links + quoted if not each.exists()] == []


def test_make_computes_on_the_cpu_also_beside_a_gpu() -> None:
    command = ["make", "--silent", "--eval", "shown: ; @echo [$$CUDA_VISIBLE_DEVICES]", "shown"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "3"}
    for asked, shown in ([], "[]\n"), (["CUDA_VISIBLE_DEVICES=0"], "[0]\n"):
        assert subprocess.check_output([*command, *asked], text=True, cwd=ROOT, env=environment) == shown


def test_every_promise_is_short_and_names_its_test() -> None:
    found = list(PROMISE.finditer((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")))
    assert len(found) > 40
    assert [each["promise"] for each in found if len(each["promise"].split()) > 12] == []
    assert [each["promise"] for each in found if "tests/" not in each["tests"]] == []
