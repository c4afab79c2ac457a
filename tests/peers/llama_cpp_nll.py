"""Evaluates a GGUF file in llama.cpp and compares it, token by token, with what Osprey made of the same ids.

    python tests/peers/llama_cpp_nll.py FILE.gguf TEXT --osprey TOKENS.jsonl --max-nll-difference 1e-3 --min-top1 0.995

Needs llama-cpp-python.
"""

import common
from engines import LlamaCpp

if __name__ == "__main__":
    parser = common.arguments(__doc__.splitlines()[0], "GGUF file")
    parser.add_argument("--cache", choices=["f16", "f32"], default="f16", help="type of the key-value cache (llama.cpp's own default: f16)")
    common.run(parser.parse_args(), lambda options: LlamaCpp(options.model, options))
