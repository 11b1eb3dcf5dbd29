"""What README and docs say of files, keys and commands is so."""

import argparse
import ast
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import glmd.errors
from glmd.cli import COMMANDS
from glmd.commands.arguments import build_parser
from glmd.distillation.signals import GIVEN
from glmd.losses.logits import TASK_LOGIT_LOSSES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _made(script: str) -> str:
    path = ROOT / "docs" / f"{script}.py"
    spec = importlib.util.spec_from_file_location(script, path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page: str = module.page()
    return page


@pytest.mark.parametrize("page", ["configuration", "methods"])
def test_a_page_is_what_its_script_makes(page):
    made = _made(f"make_{page}")
    assert made == (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), f"run python docs/make_{page}.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_has_one(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_the_project_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:configs|scripts|docs|requirements)/[\w./-]*\w)", text)) - {
        "configs/methods/NAME.yaml"
    }
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_readme_lists_every_command_and_no_other():
    listed = re.findall(r"^\| `glmd ([\w-]+)", README, re.MULTILINE)
    actions = build_parser(COMMANDS)._subparsers._group_actions
    assert isinstance(actions[0], argparse._SubParsersAction)
    assert sorted(listed) == sorted(actions[0].choices)


def test_the_check_of_a_change_installs_and_tests_as_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for words in ("install -e '.[test]' -c requirements/constraints.txt", "python -m pytest -q"):
        assert words in README
        assert words in script.replace('"', "").replace("--quiet ", "")


def test_every_dependency_is_pinned_to_the_version_that_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lines = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert {re.split(r"[<>=!]", name)[0].lower() for name in needed} <= pinned


RELIABILITY = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_that_a_page_names_exists():
    for page in PAGES:
        for file, name in re.findall(r"\b(test_\w+\.py)::(test_\w+)", page.read_text(encoding="utf-8")):
            functions = ast.parse(next((ROOT / "tests").rglob(file)).read_text(encoding="utf-8")).body
            assert name in {each.name for each in functions if isinstance(each, ast.FunctionDef)}, f"{file}::{name}"


def test_the_page_of_losses_has_a_row_for_each_with_its_options_and_their_defaults():
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`.*\|(.*)\|.*\|$", page, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(TASK_LOGIT_LOSSES)
    for name, written in rows:
        parameters = inspect.signature(TASK_LOGIT_LOSSES[name]).parameters.values()
        options = [each for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in GIVEN]
        said = [each.split()[0] for each in re.sub(r"\(.*?\)", "", written).split(",") if each.strip()]
        assert sorted(said) == sorted(each.name for each in options), name
        for each in options:
            assert each.name == "temperature" or f"{each.name} ({each.default:g}" in written, f"{name}: {each.name}"


def test_every_promise_and_every_fault_names_a_test():
    rows = [line for line in RELIABILITY.partition("## Promises")[2].splitlines() if line.startswith("| ")]
    rows = [line for line in rows if "---" not in line and not line.startswith(("| promise", "| #"))]
    assert [line for line in rows if "::test_" not in line] == []
    faults = re.findall(r"^\| (\d+) \|", RELIABILITY.partition("## Faults")[2], re.MULTILINE)
    assert [int(number) for number in faults] == list(range(1, 52))


def test_the_exit_codes_of_the_page_are_those_of_the_errors():
    errors = [each for each in vars(glmd.errors).values() if isinstance(each, type) and hasattr(each, "exit_code")]
    documented = {int(code) for code in re.findall(r"^\| ([1234])[ ,]", RELIABILITY, re.MULTILINE)}
    assert {error.exit_code for error in errors} <= documented


def test_nothing_lies_in_the_tree_but_what_was_put_there():
    """A test that takes a text for a folder would leave one."""
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    files = {"README.md", "CHANGELOG.md", "LICENSE", "SECURITY.md", "CITATION.cff", "pyproject.toml", "mkdocs.yml"}
    folders = {"glmd", "scripts", "tests", "configs", "docs", "benchmarks", "examples", "requirements"}
    assert top - files - folders - {"runs", "build", "dist"} == set()
