"""The `gguf` package's side of src/io/gguf_oracle_test.cc.

gguf_oracle.py DIR
    Writes python.gguf (random tensors of every type, every kind of metadata), python.txt (the metadata) and
    python.safetensors (the tensors as the package decodes them); types.txt, the table of types. Checks that the tensors
    of cpp.gguf are values.safetensors as the package encodes it, and describes its metadata in cpp.txt.
gguf_oracle.py --model FILE OUT
    Describes the metadata and writes a line per tensor: name, type, shape, SHA-256 of its values as f32.
"""

import hashlib
import struct
import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

KINDS = ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"]
SMALL = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
LARGE = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def describe(kind, value):
    """As Describe in the test. An array is a list of pairs (kind, value)."""
    if kind == "array":
        return "array" + "".join(f" ({describe(*item)})" for item in value)
    if kind == "string":
        return "string " + value.encode().hex()
    if kind in ("f32", "f64"):
        return f"{kind} {struct.unpack('<Q', struct.pack('<d', value))[0]:016x}"
    return f"{kind} {'large' if int(value) >= 2**63 else int(value)}"


def describe_file(reader):
    """The metadata of a file without nested arrays, in the order of the keys' bytes."""
    lines = []
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        kind, value = KINDS[field.types[0]], field.contents()
        if kind == "array":
            value = [(KINDS[field.types[-1]], item) for item in value]
        lines.append((key.encode(), f"{key} {describe(kind, value)}\n"))
    return "".join(line for _, line in sorted(lines))


def add_metadata(writer):
    """All kinds at their limits; returns the lines that describe them."""
    f32 = float(np.float32(0.1))
    values = {
        "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -2**31, "f32": f32, "bool": True,
        "string": "ä\0 b", "u64": 2**63 - 1, "i64": -2**63, "f64": 0.1,
    }
    lines = {"general.architecture": describe("string", "test")}
    for kind, value in values.items():
        writer.add_key_value(f"one.{kind}", value, GGUFValueType(KINDS.index(kind)))
        lines[f"one.{kind}"] = describe(kind, value)
        writer.add_key_value(f"list.{kind}", [value] * 3, GGUFValueType.ARRAY, GGUFValueType(KINDS.index(kind)))
        lines[f"list.{kind}"] = describe("array", [(kind, value)] * 3)
    writer.add_key_value("large", 2**64 - 1, GGUFValueType.UINT64)
    lines["large"] = describe("u64", 2**64 - 1)
    writer.add_key_value("nested", [[1, 2], [3]], GGUFValueType.ARRAY)
    lines["nested"] = describe("array", [("array", [("i32", 1), ("i32", 2)]), ("array", [("i32", 3)])])
    return "".join(f"{key} {line}\n" for key, line in sorted(lines.items()))


def write_random(directory):
    """Tensors of any bytes, and of normal values where the package can encode them."""
    rng = np.random.default_rng(5)
    writer = GGUFWriter(f"{directory}/python.gguf", "test")
    with open(f"{directory}/python.txt", "w") as out:
        out.write(add_metadata(writer))
    tensors = {}

    def add(name, type_name, data):
        qtype = GGMLQuantizationType[type_name]
        writer.add_tensor(name, data, raw_dtype=qtype)
        tensors[name] = dequantize(data, qtype).copy()

    for type_name in SMALL + LARGE:
        block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
        num_blocks = 512 // block_size * 3
        for name, shape in (("flat", (40,)), ("rows", (70,)), ("cube", (5, 7))):
            data = rng.integers(0, 256, (*shape, num_blocks * block_bytes), dtype=np.uint8)
            add(f"{type_name}.{name}", type_name, data)
    normal = rng.standard_normal((33, 256)).astype(np.float32)
    for type_name in SMALL + ["BF16"]:
        add(f"{type_name}.normal", type_name, quantize(normal, GGMLQuantizationType[type_name]))
    patterns = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    add("F16.all", "F16", patterns.view(np.float16))
    add("BF16.all", "BF16", patterns.view(np.uint8))
    add("F32", "F32", normal)
    add("F32.one", "F32", normal[0, :1])
    add("F16.normal", "F16", normal.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(tensors, f"{directory}/python.safetensors")


def check_ours(directory):
    values = load_file(f"{directory}/values.safetensors")["values"]
    reader = GGUFReader(f"{directory}/cpp.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == ["F32", "F16", "three", "Q8_0"], list(found)
    for tensor in reader.tensors:
        assert tensor.data_offset % 32 == 0
    for name in ("F32", "F16", "Q8_0"):
        tensor = found[name]
        assert tensor.tensor_type.name == name
        expected = quantize(values, GGMLQuantizationType[name])
        same = np.frombuffer(tensor.data.tobytes(), np.uint8) == np.frombuffer(expected.tobytes(), np.uint8)
        assert same.all(), f"{name}: {np.count_nonzero(~same)} of {same.size} bytes differ"
    assert found["three"].data.tolist() == values.flat[:3].tolist()
    assert found["Q8_0"].shape.tolist() == [64, 256, 2]
    with open(f"{directory}/cpp.txt", "w") as out:
        out.write(describe_file(reader))


def describe_model(path, out_path):
    reader = GGUFReader(path)
    with open(out_path, "w") as out:
        out.write(describe_file(reader))
        for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name.encode()):
            values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type))
            shape = ",".join(str(size) for size in reversed(tensor.shape.tolist()))
            print(tensor.name, tensor.tensor_type.name, shape, hashlib.sha256(values).hexdigest(), file=out)


def main(arguments):
    if arguments[0] == "--model":
        describe_model(*arguments[1:])
        return
    np.seterr(all="ignore")
    (directory,) = arguments
    write_random(directory)
    check_ours(directory)
    with open(f"{directory}/types.txt", "w") as out:
        for qtype, (block_size, block_bytes) in sorted(GGML_QUANT_SIZES.items()):
            print(int(qtype), qtype.name, block_size, block_bytes, file=out)


if __name__ == "__main__":
    main(sys.argv[1:])
