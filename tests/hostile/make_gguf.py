"""Writes the hostile GGUF files of this folder and gguf.txt, which says what each one's refusal must mention."""
import struct

u32 = lambda v: struct.pack("<I", v)
u64 = lambda v: struct.pack("<Q", v)
text = lambda s: u64(len(s)) + (s if isinstance(s, bytes) else s.encode())
head = lambda tensors, keys, version=3: b"GGUF" + u32(version) + u64(tensors) + u64(keys)
key = lambda name, kind, value: text(name) + u32(kind) + value
tensor = lambda name, sizes, kind, offset: text(name) + u32(len(sizes)) + b"".join(map(u64, sizes)) + u32(kind) + u64(offset)


def padded(table, data=b""):
    return table + bytes(-len(table) % 32) + data


F32, Q8_0, TQ2_0, STRING, ARRAY, BOOL, U32 = 0, 8, 35, 8, 9, 7, 4
files = {
    "empty": (b"", "truncated"),
    "wrong_magic": (b"GGML" + u32(3) + u64(0) * 2, "not a GGUF file"),
    "version_1": (head(0, 0, 1), "GGUF version 1"),
    "big_endian": (b"GGUF" + struct.pack(">I", 3) + u64(0) * 2, "GGUF version"),
    "header_only": (b"GGUF" + u32(3), "truncated"),
    "many_tensors": (head(2**63, 0), "tensor count"),
    "many_keys": (head(0, 2**40), "key count"),
    "long_key": (head(0, 1) + u64(2**62) + bytes(32), "key 0"),
    "key_not_utf8": (head(0, 1) + key(b"\xff\xfe", U32, u32(1)), "UTF-8"),
    "key_twice": (head(0, 2) + key("a", U32, u32(1)) * 2, "twice"),
    "unknown_kind": (head(0, 1) + key("a", 99, u32(1)), "unknown type 99"),
    "bool_of_two": (head(0, 1) + key("flag", BOOL, b"\x02"), "boolean"),
    "long_string": (head(0, 1) + key("s", STRING, u64(2**64 - 1)), "more than the file can hold"),
    "long_array": (head(0, 1) + key("tokens", ARRAY, u32(STRING) + u64(2**61)), "tokens of"),
    "array_of_arrays": (head(0, 1) + key("deep", ARRAY, u32(ARRAY) + u64(1) + bytes(40)), "array of arrays"),
    "array_unknown_kind": (head(0, 1) + key("a", ARRAY, u32(77) + u64(1) + bytes(8)), "unknown type 77"),
    "alignment_zero": (head(0, 1) + key("general.alignment", U32, u32(0)), "alignment"),
    "alignment_odd": (head(0, 1) + key("general.alignment", U32, u32(33)), "alignment"),
    "no_dimensions": (padded(head(1, 0) + tensor("t", [], F32, 0) + bytes(64)), "0 dimensions"),
    "five_dimensions": (padded(head(1, 0) + tensor("t", [1] * 5, F32, 0), bytes(32)), "5 dimensions"),
    "overflowing_shape": (padded(head(1, 0) + tensor("t", [2**32, 2**33], F32, 0), bytes(32)), "impossible shape"),
    "overflowing_bytes": (padded(head(1, 0) + tensor("t", [2**62], F32, 0), bytes(32)), "impossible shape"),
    "zero_size": (padded(head(1, 0) + tensor("t", [0, 4], F32, 0), bytes(32)), "impossible shape"),
    "uneven_row": (padded(head(1, 0) + tensor("t", [33, 2], Q8_0, 0), bytes(96)), "rows of 33"),
    "uneven_ternary_row": (padded(head(1, 0) + tensor("t", [64, 4], TQ2_0, 0), bytes(96)), "rows of 64"),
    "offset_beyond": (padded(head(1, 0) + tensor("t", [4], F32, 2**40), bytes(32)), "beyond the end"),
    "offset_wraps": (padded(head(1, 0) + tensor("t", [4], F32, 2**64 - 32), bytes(32)), "beyond the end"),
    "offset_unaligned": (padded(head(1, 0) + tensor("t", [4], F32, 4), bytes(64)), "aligned"),
    "data_cut": (padded(head(1, 0) + tensor("t", [64], F32, 0), bytes(255)), "truncated"),
    "tensor_twice": (padded(head(2, 0) + tensor("t", [4], F32, 0) + tensor("t", [4], F32, 32), bytes(64)), "twice"),
    "overlap": (padded(head(2, 0) + tensor("a", [16], F32, 0) + tensor("b", [4], F32, 32), bytes(64)), "overlap"),
    "table_cut": (head(2, 0) + tensor("t", [4], F32, 0) + u64(200) + bytes(40), "the name of tensor 1"),
}
with open("gguf.txt", "w") as listing:
    listing.write("# file: words its refusal must contain (made by make_gguf.py)\n")
    for name, (data, words) in files.items():
        open(f"{name}.gguf", "wb").write(data)
        listing.write(f"{name}.gguf: {words}\n")
