#!/usr/bin/env python3
"""Checks which folder of src/ includes which: the table of docs/architecture.md, as data.

    tools/check_includes.py [ROOT]

Prints one line per finding, `file:line: what`, and exits with 1 if there is any. Beside the table:
- libtorch only in the folders that may use it, and never torch/torch.h in a header;
- a quoted include is "folder/file.h" (or Highway's "hwy/..."); everything else goes in angle brackets.
A *_test.cc may include every lower layer and its own folder.
"""
import pathlib
import re
import sys

# From the lowest layer to the highest: folder -> folders it may include, or single headers of them.
ALLOWED = {
    "core": [],
    "kernels": ["core"],
    "io": ["core"],
    "data": ["core", "io"],
    "report": ["core", "io"],
    "ops": ["core", "kernels"],
    "routing": ["core", "ops"],
    "model": ["core", "io", "ops", "routing/router.h", "routing/plan.h", "routing/registry.h"],
    "convert": ["core", "kernels", "io", "data", "routing", "model"],
    "eval": ["core", "data", "report", "ops", "routing/plan.h", "model"],
    "train": ["core", "data", "io", "report", "ops", "routing/router.h", "routing/registry.h",
              "routing/plan.h", "routing/controller.h", "model", "eval"],
    "infer": ["core", "data", "report", "ops", "routing/router.h", "model"],
    "cli": ["core", "kernels", "io", "data", "report", "ops", "routing", "model", "convert", "eval", "train", "infer"],
}
TORCH_FREE = {"core", "kernels", "io", "data", "report"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def problem(folder, file_name, quote, target):
    """What is wrong with one include of `file_name` in `folder`, or None."""
    top = target.split("/")[0]
    if top in ("torch", "ATen", "c10", "caffe2"):
        if folder in TORCH_FREE:
            return f"{folder} may not include libtorch ({target})"
        if target == "torch/torch.h" and file_name.endswith(".h"):
            return "no torch/torch.h in a header: include ATen/core/Tensor.h or what is used"
        return None
    if quote == "<":
        return f'write "{target}", not <{target}>' if top in ALLOWED and "/" in target else None
    if top == "hwy":
        return None
    if top not in ALLOWED or "/" not in target:
        return f'"{target}" is not "folder/file" of src/: our headers carry their folder, libraries go in <>'
    lower = list(ALLOWED)[: list(ALLOWED).index(folder)] if file_name.endswith("_test.cc") else ALLOWED[folder]
    if top != folder and top not in lower and target not in lower:
        return f"{folder} may not include {top} ({target})"
    return None


def check(root):
    """All findings in root/src, as `file:line: what`."""
    findings = []
    for path in sorted(pathlib.Path(root, "src").rglob("*")):
        if path.suffix not in (".h", ".cc"):
            continue
        relative = path.relative_to(root)
        folder = relative.parts[1]
        if folder not in ALLOWED:
            findings.append(f"{relative}:1: folder {folder} is not in the table of tools/check_includes.py")
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = INCLUDE.match(line)
            what = match and problem(folder, path.name, *match.groups())
            if what:
                findings.append(f"{relative}:{number}: {what}")
    return findings


def main():
    findings = check(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent)
    print("\n".join(findings) if findings else "include rules: ok")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
