"""Loads what Osprey trained in Python PEFT and compares logits at each joint: the adapter beside its base, merged by PEFT, merged by Osprey as
a Hugging Face directory, and as a GGUF file in llama.cpp.

    python tests/peers/peft_logits.py ADAPTER --merged HF_DIR --gguf FILE.gguf --osprey TOKENS.jsonl

TOKENS.jsonl is what `osprey eval ADAPTER --tokens` wrote. Exit code 1 when two joints disagree. Needs peft, and llama-cpp-python for --gguf.
"""

import argparse
import json
import sys
import types

import numpy as np
import peft
import torch
import transformers

import common
from engines import LlamaCpp


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def joints(options, documents):
    """Name of each joint with the logits of every document."""
    settings = json.load(open(f"{options.adapter}/adapter_config.json", encoding="utf-8"))
    base = transformers.AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"], dtype=torch.float32).eval()
    model = peft.PeftModel.from_pretrained(base, options.adapter).eval()
    yield "beside its base in PEFT", [logits(model, ids) for ids in documents]
    again = peft.AutoPeftModelForCausalLM.from_pretrained(options.adapter, dtype=torch.float32).eval()
    yield "opened by its configuration", [logits(again, ids) for ids in documents]
    yield "merged by PEFT", [logits(again.merge_and_unload(), ids) for ids in documents]
    if options.merged:
        merged = transformers.AutoModelForCausalLM.from_pretrained(options.merged, dtype=torch.float32).eval()
        yield "merged by Osprey", [logits(merged, ids) for ids in documents]
    if options.gguf:
        engine = LlamaCpp(options.gguf, types.SimpleNamespace(context=512, threads=2, cache="f32"))
        yield "GGUF in llama.cpp", [engine.logits(ids) for ids in documents]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter")
    parser.add_argument("--merged")
    parser.add_argument("--gguf")
    parser.add_argument("--osprey", required=True)
    parser.add_argument("--max-difference", type=float, default=1e-3, help="of any logit, relative to the largest; f16 files get ten times it")
    options = parser.parse_args()
    lines = common.read_tokens(options.osprey)
    documents = [common.ids_of(document, 1) for document in lines]
    failed, reference = False, None
    for name, found in joints(options, documents):
        reference = reference or found
        largest = max(np.abs(each).max() for each in reference)
        difference = max(np.abs(a - b).max() for a, b in zip(found, reference)) / largest
        nll = np.concatenate([common.score(each, ids)[0] for each, ids in zip(found, documents)])
        osprey = np.array([line["nll"] for document in lines for line in document if line["nll"] is not None])
        apart = np.abs(nll - osprey).max()
        limit = options.max_difference * (10 if "GGUF" in name else 1)
        print(f"{name}: logits {difference:.1e} of the largest from the first, token losses {apart:.1e} nats from Osprey's, mean {nll.mean():.5f}")
        failed |= difference > limit or apart > 10 * limit
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
