"""Writes the hostile safetensors files of this folder and safetensors.txt, which says what each one's refusal must mention."""
import json, struct


def file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"t": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


whole = "not a whole safetensors file"
files = {
    "empty": (b"", whole),
    "length_only": (struct.pack("<Q", 100), whole),
    "huge_header": (file(b"{}", length=2**62), whole),
    "header_beyond_file": (file(b"{}", length=1000), whole),
    "header_not_utf8": (file(b"\xff\xfe{}"), whole),
    "header_not_json": (file(b"{tensors}"), whole),
    "header_array": (file(b"[1, 2]"), whole),
    "deep_json": (file(b"[" * 5000), whole),
    "data_cut": (file(one(), bytes(15)), whole),
    "data_left_over": (file(one(), bytes(17)), whole),
    "offsets_reversed": (file(one(offsets=(16, 0)), bytes(16)), whole),
    "offsets_wrong_size": (file(one(offsets=(0, 12)), bytes(12)), whole),
    "offsets_huge": (file(one(offsets=(0, 2**63)), bytes(16)), whole),
    "shape_overflows": (file(one(shape=(2**33, 2**33)), bytes(16)), whole),
    "shape_negative": (file(one(shape=(-4,)), bytes(16)), whole),
    "unknown_dtype": (file(one(dtype="F12"), bytes(16)), whole),
    "overlap": (file({**one(), "u": one()["t"]}, bytes(16)), whole),
    "integers": (file(one(dtype="I32"), bytes(16)), "t is stored as I32"),
}
with open("safetensors.txt", "w") as listing:
    listing.write("# file: words its refusal must contain (made by make_safetensors.py)\n")
    for name, (data, words) in files.items():
        open(f"{name}.safetensors", "wb").write(data)
        listing.write(f"{name}.safetensors: {words}\n")
