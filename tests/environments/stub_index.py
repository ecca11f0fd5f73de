"""A package index in a folder, with wheels named torch that contain two lines of Python."""

from __future__ import annotations

import base64
import hashlib
import zipfile


def add_wheel(index, version, source="", requires=()):
    """Write a wheel of torch into ``index``, a folder that pip reads as an index, and list it there."""
    folder = index / "torch"
    folder.mkdir(parents=True, exist_ok=True)
    information = f"torch-{version}.dist-info"
    files = {
        "torch/__init__.py": f'__version__ = "{version}"\n{source}',
        f"{information}/METADATA": "".join(
            f"{key}: {value}\n"
            for key, value in [
                ("Metadata-Version", "2.1"),
                ("Name", "torch"),
                ("Version", version),
                *(("Requires-Dist", each) for each in requires),
            ]
        ),
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{name},{_digest(text)},{len(text.encode())}\n" for name, text in files.items()]
    files[f"{information}/RECORD"] = "".join([*rows, f"{information}/RECORD,,\n"])
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    names = sorted(each.name for each in folder.glob("*.whl"))
    (folder / "index.html").write_text("".join(f'<a href="{name}">{name}</a><br>\n' for name in names))


def _digest(text):
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    return f"sha256={digest}"
