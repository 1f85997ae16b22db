"""Collects what a GPU machine without a network needs: wheels of portattn and its requirements.

The target is Python 3.12 on Linux x86-64 with torch, triton, cupy, onnx, onnxruntime and numpy.
Prints the folder's size and the newest GLIBC symbol that the library asks for.
"""

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".whl"
PYTHON_VERSION = "3.12"
MAX_BYTES = 60 * 2**20
ON_THE_MACHINE = {"torch", "triton", "cupy-cuda13x", "onnx", "onnxruntime", "onnxscript", "numpy"}
# fmt: off
WANTED = (
    "alembic", "annotated-doc", "annotated-types", "click", "colorlog", "greenlet", "mako",
    "markdown-it-py", "markupsafe", "mdurl", "optuna", "packaging", "platformdirs", "pydantic",
    "pydantic-core", "pygments", "pyyaml", "rich", "shellingham", "sqlalchemy", "tqdm",
    "typer", "typing-extensions", "typing-inspection",
)
# fmt: on
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")


def pip(*arguments: str) -> None:
    """Run pip of this interpreter."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], cwd=ROOT, check=True)


def collect() -> None:
    """Fill the folder, from nothing, with one version of each wheel."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.whl"):
        old.unlink()
    pip("wheel", "-qq", "--no-deps", "--no-build-isolation", "--wheel-dir", str(FOLDER), ".")
    platforms = [f"--platform={name}" for name in PLATFORMS]
    pip(
        *("download", "-qq", "--no-deps", "--only-binary=:all:", "--implementation=cp"),
        *(f"--python-version={PYTHON_VERSION}", *platforms, "--constraint=constraints.txt"),
        *(f"--dest={FOLDER}", *WANTED),
    )


def missing_requirements() -> set[str]:
    """What a wheel in the folder requires and neither the folder nor the machine has."""
    environment = {
        "python_version": PYTHON_VERSION,
        "python_full_version": f"{PYTHON_VERSION}.0",
        "extra": "",
    }
    present, required = set(ON_THE_MACHINE), set()
    for path in FOLDER.glob("*.whl"):
        present.add(canonicalize_name(path.name.split("-")[0]))
        with zipfile.ZipFile(path) as wheel:
            name = next(
                entry for entry in wheel.namelist() if entry.endswith(".dist-info/METADATA")
            )
            metadata = Parser().parsestr(wheel.read(name).decode())
        for line in metadata.get_all("Requires-Dist", []):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                required.add(canonicalize_name(requirement.name))
    return required - present


def newest_glibc(wheel: Path) -> str:
    """The highest GLIBC symbol version that libportattn in the wheel needs, e.g. ``"2.34"``."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("portattn/libportattn.so")
    versions = {
        tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_(\d+(?:\.\d+)+)\0", library)
    }
    return ".".join(map(str, max(versions, default=(2, 2, 5))))  # x86-64 begins at 2.2.5


def main() -> None:
    """Collect, check and report."""
    collect()
    missing = missing_requirements()
    if missing:
        sys.exit(
            f"wheels are missing: {', '.join(sorted(missing))}; add them to WANTED in {__file__}"
        )
    size = sum(path.stat().st_size for path in FOLDER.glob("*.whl"))
    if size > MAX_BYTES:
        sys.exit(
            f"the wheels take {size / 2**20:.1f} MiB; at most {MAX_BYTES / 2**20:.0f} are allowed"
        )
    (own,) = FOLDER.glob("portattn-*.whl")
    print(f"{len(list(FOLDER.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB, in {FOLDER.name}/")
    print(f"{own.name} needs GLIBC {newest_glibc(own)} or newer")
    print("There: python3 -m pip install --no-index --no-deps --target SITE .whl/*.whl")


if __name__ == "__main__":
    main()
