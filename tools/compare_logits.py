#!/usr/bin/env python3
"""Compares two safetensors files tensor by tensor: max|A - B| / max|B|, B being the reference.

Integer tensors must be equal. Exits 1 if a tensor exceeds the tolerance, is missing in one file
(unless --common) or has another shape; NaN never passes.
Example: compare_logits.py engine.safetensors reference.safetensors --tolerance 1e-5
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from safetensors.torch import load_file
from torch import Tensor


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max|value - reference| / max|reference|; 0/0 is 0, a difference from all-zero infinite."""
    if value.numel() == 0:
        return 0.0
    delta = (value.double() - reference.double()).abs().max().item()
    scale = reference.double().abs().max().item()
    if scale == 0:
        return 0.0 if delta == 0 else math.inf
    return delta / scale if math.isfinite(delta) and math.isfinite(scale) else math.inf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A.safetensors")
    parser.add_argument("b", metavar="B.safetensors", help="the reference")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--common", action="store_true", help="only tensors that both files have")
    args = parser.parse_args()
    a, b = load_file(args.a), load_file(args.b)
    failed, compared = 0, 0
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            if not args.common:
                print(f"FAIL {name}: only in {args.a if name in a else args.b}")
                failed += 1
            continue
        compared += 1
        if a[name].shape != b[name].shape:
            print(f"FAIL {name}: shape {list(a[name].shape)}, reference {list(b[name].shape)}")
            failed += 1
            continue
        error = relative_error(a[name], b[name])
        exact = not b[name].dtype.is_floating_point
        ok = error <= (0.0 if exact else args.tolerance)
        failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {error:.3g}")
    if compared == 0:
        print("FAIL no tensor in common")
        failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
