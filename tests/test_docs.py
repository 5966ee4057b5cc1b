"""The docs say what is true: commands parse, generated pages are current, links and names exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from saddlepoint import cli, config, registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
COMMANDS = sorted(
    {
        part.strip()
        for page in PAGES
        for line in re.findall(r"^    (saddlepoint .+)$", page.read_text(), re.M)
        for part in line.partition("  #")[0].split("&&")
    }
)


def test_the_methods_page_is_what_the_registry_says():
    shown = CliRunner().invoke(cli.app, ["list", "--markdown"])

    assert shown.stdout.strip() == (ROOT / "docs" / "METHODS.md").read_text().strip(), "run: saddlepoint list --markdown > docs/METHODS.md"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_docs_has_flags_that_exist_and_methods_that_parse(command):
    words = shlex.split(command)[1:]
    found = typer.main.get_command(cli.app)
    while words and hasattr(found, "commands") and words[0] in found.commands:
        found = found.commands[words.pop(0)]
    flags = {name: option for option in found.params for name in option.opts}
    for flag, value in zip(words, [*words, ""][1:], strict=True):
        if flag.startswith("--"):
            assert flag in flags, f"{flag} is no flag of {command!r}"
        kind = flag.removeprefix("--").removesuffix("s")
        if flag.startswith("--") and kind in registry.KINDS:
            registry.parse(kind, value)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_changelog_names_every_method():
    said = (ROOT / "CHANGELOG.md").read_text()

    assert [n for kind in registry.KINDS for n in registry.names(kind) if n not in said] == []


def test_every_field_of_a_run_is_described():
    assert [name for name, field in config.Config.model_fields.items() if not field.description] == []


def test_the_glossary_has_each_label_and_is_sorted():
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "GLOSSARY.md").read_text(), re.M)[2:]

    assert rows == sorted(rows, key=str.lower)
