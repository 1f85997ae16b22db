"""README.md's Python runs as it stands, from top to bottom."""

import re


def test_python_blocks_run(repository, tmp_path, monkeypatch, capsys):
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (repository / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "kernel" in capsys.readouterr().out
    assert {"mask.png", "layer.onnx"} <= {path.name for path in tmp_path.iterdir()}
