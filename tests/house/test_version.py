"""One version, said the same everywhere."""

import importlib.metadata
import re

import portattn


def test_package_and_metadata_agree():
    assert importlib.metadata.version("portattn") == portattn.__version__


def test_changelog_begins_with_this_version(repository):
    headings = re.findall(r"^## (\S+)", (repository / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == portattn.__version__
