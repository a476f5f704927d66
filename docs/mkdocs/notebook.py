"""Runs docs/notebook.py in a Jupyter kernel, and writes docs/notebook.md with its results.

`make notebook` calls it. With a folder as argument, page and pictures go there.
"""

import base64
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parents[1]
MOST_LINES = 24  # of one result
MARK = re.compile(r"^# %%(.*)\n", re.MULTILINE)
NOTE = "<!-- made by `make notebook` from notebook.py: change that file -->\n\n"


def cells(source: str) -> list[Any]:
    """Return the cells of a file in the percent format."""
    kinds_and_texts = MARK.split(source)[1:]
    made = []
    for kind, text in zip(kinds_and_texts[::2], kinds_and_texts[1::2], strict=True):
        if "[markdown]" in kind:
            text = re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)
            made.append(nbformat.v4.new_markdown_cell(text))
        else:
            made.append(nbformat.v4.new_code_cell(text.strip()))
    return made


def page(notebook: Any, folder: Path) -> str:
    """Return the executed notebook as Markdown; its pictures are written into the folder."""
    parts, pictures = [], 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        printed = ""
        for output in cell.outputs:
            if output.output_type == "stream":
                printed += output.text if output.name == "stdout" else ""
            elif "image/png" in output.data:
                pictures += 1
                picture = folder / f"notebook-{pictures}.png"
                picture.write_bytes(base64.b64decode(output.data["image/png"]))
                parts.append(f"![What this cell draws]({picture.name})")
            else:
                printed += output.data.get("text/plain", "") + "\n"
        printed = re.sub(r"\x1b\[[\d;]*m", "", printed)  # colours
        lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
        if len(lines) > MOST_LINES:
            lines[MOST_LINES:] = [f"({len(lines) - MOST_LINES} more lines)"]
        if any(lines):
            parts.append("```text\n" + "\n".join(lines) + "\n```")
    return NOTE + "\n\n".join(parts) + "\n"


def main(folder: Path) -> None:
    """Run the notebook offline, in an empty folder, and write the page."""
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    source = (DOCS / "notebook.py").read_text(encoding="utf-8")
    notebook = nbformat.v4.new_notebook(cells=cells(source))
    with tempfile.TemporaryDirectory() as place:
        resources = {"metadata": {"path": place}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notebook.md").write_text(page(notebook, folder), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
