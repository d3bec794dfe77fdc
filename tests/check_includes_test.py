"""tools/check_includes.py finds the includes that it is there to find."""
import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).parent.parent / "tools" / "check_includes.py"


def run(root, file, text):
    path = root / "src" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    result = subprocess.run([sys.executable, TOOL, root], capture_output=True, text=True)
    return result.returncode, result.stdout


@pytest.mark.parametrize("file, line, expected", [
    ("core/a.cc", '#include "io/b.h"', "core may not include io"),
    ("model/a.cc", '#include "routing/dtrnet.h"', "model may not include routing"),
    ("io/a.h", '#  include "data/b.h"  // why', "io may not include data"),
    ("data/a_test.cc", '#include "model/b.h"', "data may not include model"),
    ("kernels/a.cc", "#include <ATen/ATen.h>", "kernels may not include libtorch"),
    ("report/a_test.cc", "#include <c10/util/Half.h>", "report may not include libtorch"),
    ("ops/a.h", "#include <torch/torch.h>", "no torch/torch.h in a header"),
    ("ops/a.cc", "#include <core/error.h>", 'write "core/error.h"'),
    ("core/a.cc", '#include "error.h"', "libraries go in <>"),
    ("core/a.cc", '#include "../io/b.h"', "libraries go in <>"),
    ("extra/a.cc", "", "folder extra is not in the table"),
])
def test_finds(tmp_path, file, line, expected):
    code, out = run(tmp_path, file, f"// first line\n{line}\n")
    number = 2 if line else 1
    assert code == 1
    assert out.startswith(f"src/{file}:{number}: ")
    assert expected in out


@pytest.mark.parametrize("file, line", [
    ("core/a.cc", '#include "core/b.h"'),
    ("core/a.cc", "#include <vector>"),
    ("kernels/a.cc", '#include "hwy/highway.h"'),
    ("model/a.cc", '#include "routing/plan.h"'),
    ("model/a_test.cc", '#include "routing/dtrnet.h"'),
    ("ops/a.cc", "#include <torch/torch.h>"),
    ("cli/a.cc", '#include "train/loop.h"'),
    ("core/a.cc", '// #include "io/b.h"'),
])
def test_accepts(tmp_path, file, line):
    assert run(tmp_path, file, line + "\n") == (0, "include rules: ok\n")
