"""The reference implementation's side of src/io/oracle_test.cc: io_oracle.py DIR.

Reads DIR/cpp.safetensors, DIR/mixed.safetensors and writes what it found to DIR/*.txt, one line per tensor: name,
dtype, shape, bytes in hex. Writes python.safetensors (with python.txt in the same form), convert.safetensors (casts by
torch) and sharded/ (huggingface_hub).
"""

import json
import os
import sys

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}


def describe(path, tensors, metadata):
    with open(path, "w") as out:
        print("metadata", json.dumps(metadata, sort_keys=True, separators=(",", ":")), file=out)
        for name, tensor in sorted(tensors.items()):
            data = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) if tensor.numel() else b""
            print(name, NAMES[tensor.dtype], ",".join(map(str, tensor.shape)) or "-", data.hex() or "-", file=out)


def read(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def write_casts(path):
    """Every 16-bit pattern as f32, and f32 patterns (all exponents, values at and beside ties) as 16 bits."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(1)
    ties = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    low = torch.cat([torch.tensor(ties), torch.randint(0, 65536, (20,), generator=generator)])
    bits = ((torch.arange(65536)[:, None] << 16) | low[None, :]).flatten().to(torch.int32)
    values = bits.view(torch.float32)
    f64 = torch.tensor([0.1, 1 + 2.0**-24, 1 + 3 * 2.0**-24, 1e300, -1e-300], dtype=torch.float64)
    save_file({
        "f16": patterns.view(torch.float16), "f16_as_f32": patterns.view(torch.float16).float(),
        "bf16": patterns.clone().view(torch.bfloat16), "bf16_as_f32": patterns.view(torch.bfloat16).float(),
        "f32": values, "f32_as_f16": values.half(), "f32_as_bf16": values.bfloat16(),
        "f64": f64, "f64_as_f32": f64.float(),
    }, path)


def main(directory):
    for name in ("cpp", "mixed"):
        describe(f"{directory}/{name}.txt", *read(f"{directory}/{name}.safetensors"))
    tensors = {
        name.lower(): torch.arange(-3, 3).to(dtype).reshape(2, 3) for dtype, name in NAMES.items()
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), 'odd "näme"\n': torch.ones(1)}
    save_file(tensors, f"{directory}/python.safetensors", metadata={"format": "pt", "who": "pythön"})
    del tensors['odd "näme"\n']
    describe(f"{directory}/python.txt", tensors, {"format": "pt", "who": "pythön"})
    write_casts(f"{directory}/convert.safetensors")
    state = {f"model.layers.{i}.weight": torch.full((64, 64), float(i)) for i in range(6)}
    os.mkdir(f"{directory}/sharded")
    save_torch_state_dict(state, f"{directory}/sharded", max_shard_size=40_000)


if __name__ == "__main__":
    main(sys.argv[1])
