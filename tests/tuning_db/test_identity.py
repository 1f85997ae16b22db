"""Fingerprints: what changes them and what does not."""

import pytest

from portattn.tuning_db.identity import canonical_json, source_sha256
from portattn.tuning_db.location import locate, network_file_system

PYTHON = '"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n'
CUDA = """// what
__global__ void f(int *x) {
  /* long
     comment */ *x = 1;  // "quoted"
}
const char *s = "//no";
"""


def digest(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return source_sha256([path])


@pytest.mark.parametrize(
    ("name", "text", "same", "other"),
    [
        (
            "k.py",
            PYTHON,
            "\n\n# moved\ndef f(x):\n    return (x + 1)\n",
            PYTHON.replace("x + 1", "x + 2"),
        ),
        (
            "k.cu",
            CUDA,
            '__global__ void f(int *x) {\n\n *x =   1;\n}\nconst char *s = "//no";',
            CUDA.replace("//no", "//yes"),
        ),
    ],
)
def test_comments_and_layout_do_not_change_a_kernels_identity(tmp_path, name, text, same, other):
    first = digest(tmp_path, name, text)
    assert digest(tmp_path, name, same) == first
    assert digest(tmp_path, name, other) != first


def test_order_of_files_does_not_matter_and_absent_files_do(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.cpp"
    a.write_text("x = 1")
    assert source_sha256([a, b]) == source_sha256([b, a])
    without = source_sha256([a, b])
    b.write_text("int x;")
    assert source_sha256([a, b]) != without


def test_canonical_json_refuses_nan():
    assert canonical_json({"b": 1, "a": [True]}) == '{"a":[true],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_locations(monkeypatch, tmp_path):
    monkeypatch.setenv("PORTATTN_DB", "")
    default = locate()
    assert not default.named
    assert default.path.name == "tuning.db"
    assert locate(str(tmp_path / "x.db")).path == tmp_path / "x.db"
    assert locate(f"sqlite:///{tmp_path}/x.db").path == tmp_path / "x.db"
    fleet = locate("postgresql+psycopg://me:secret@host/db")
    assert fleet.path is None
    assert "secret" not in fleet.shown
    assert locate("none").url == ""


def test_network_file_systems_are_seen(tmp_path):
    mounts = f"/dev/a / ext4 rw\nserver:/x {tmp_path} nfs4 rw\n/dev/b {tmp_path}/local ext4 rw\n"
    assert network_file_system(tmp_path / "t.db", mounts) == "nfs4"
    assert network_file_system(tmp_path / "local" / "t.db", mounts) is None
