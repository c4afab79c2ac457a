"""Evaluates a Hugging Face directory in transformers and compares it, token by token, with what Osprey made of the same ids.

    python tests/peers/transformers_nll.py DIR TEXT --osprey TOKENS.jsonl --max-nll-difference 1e-3 --min-top1 0.995

Needs torch and transformers.
"""

import common
from engines import Transformers

if __name__ == "__main__":
    common.run(common.arguments(__doc__.splitlines()[0], "Hugging Face directory").parse_args(), lambda options: Transformers(options.model, options))
