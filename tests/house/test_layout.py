"""The rules of the tree that no other tool checks."""

import re
import subprocess

import pytest

LINKS = ("backends", "tuner", "export", "tuning_db")
KERNEL_LINES, FILE_LINES = 450, 300
# The emulator stands in for the device that kernels run on.
KERNEL_FOLDERS = ("backends/cpu/", "backends/triton/", "backends/cupy/", "tests/cupy/emulator")


@pytest.fixture(scope="module")
def files(repository):
    """Paths of the files under version control, and of new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    return [
        name for name in sorted(set(listed.stdout.splitlines())) if (repository / name).is_file()
    ]


@pytest.mark.parametrize("name", LINKS)
def test_root_folder_is_linked_into_the_package(repository, name):
    link = repository / "portattn" / name
    assert link.is_symlink()
    assert link.readlink().as_posix() == f"../{name}"
    assert (repository / name / "__init__.py").is_file()


def test_package_is_typed(repository):
    assert (repository / "portattn" / "py.typed").is_file()


def test_every_python_folder_is_a_package(repository, files):
    roots = ("portattn/", *(f"{name}/" for name in LINKS))
    folders = {
        name.rsplit("/", 1)[0] for name in files if name.endswith(".py") and name.startswith(roots)
    }
    # Alembic loads its own scripts by path.
    scripts = {folder for folder in folders if "/migrations" in folder}
    assert [
        f for f in sorted(folders - scripts) if not (repository / f / "__init__.py").is_file()
    ] == []


def line_limit(name: str) -> int:
    return KERNEL_LINES if name.startswith(KERNEL_FOLDERS) else FILE_LINES


def test_files_are_short(repository, files):
    sources = [
        name for name in files if name.endswith((".py", ".cpp", ".hpp", ".h", ".cu", ".cuh"))
    ]
    lines = {name: len((repository / name).read_text().splitlines()) for name in sources}
    assert {name: count for name, count in lines.items() if count > line_limit(name)} == {}


def relative_links(text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [target for target in targets if "://" not in target]


def test_links_in_the_documents_lead_somewhere(repository, files):
    broken = [
        f"{name}: {target}"
        for name in files
        if name.endswith(".md")
        for target in relative_links((repository / name).read_text())
        if not (repository / name).parent.joinpath(target).exists()
    ]
    assert broken == []
