"""Stock engines behind one face: `bos` (id or None), `tokenize(text) -> ids`, `logits(ids) -> [len(ids), vocab]`."""

import json
import pathlib

import numpy as np


class LlamaCpp:
    """llama.cpp through llama-cpp-python, as its defaults run a file, but for the key-value cache's type."""

    def __init__(self, path, options):
        import llama_cpp

        cache = {"f16": 1, "f32": 0}[getattr(options, "cache", "f16")]  # GGML_TYPE_F16, GGML_TYPE_F32
        self.model = llama_cpp.Llama(
            path, n_ctx=options.context, n_batch=options.context, n_ubatch=options.context, n_threads=options.threads,
            n_threads_batch=options.threads, type_k=cache, type_v=cache, logits_all=True, verbose=False,
        )
        adds_bos = llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(self.model.model))
        self.bos = self.model.token_bos() if adds_bos else None

    def tokenize(self, text):
        return self.model.tokenize(text.encode(), add_bos=self.bos is not None, special=False)

    def logits(self, ids):
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)])


class Transformers:
    """Hugging Face transformers in float32, and the tokenizers library on the directory's tokenizer.json."""

    def __init__(self, path, options):
        import tokenizers
        import torch
        import transformers

        torch.set_num_threads(options.threads)
        self.torch = torch
        folder = pathlib.Path(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The tokenizer has a BOS when its own post-processor adds one; config.json names a bos_token_id for nearly every model.
        added = self.tokenizer.encode("").ids
        config = json.loads((folder / "config.json").read_text())
        self.bos = added[0] if added and added[0] == config.get("bos_token_id") else None

    def tokenize(self, text):
        return self.tokenizer.encode(text).ids

    def logits(self, ids):
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids])).logits[0].numpy()


def open_any(path, options):
    return LlamaCpp(path, options) if path.endswith(".gguf") else Transformers(path, options)
