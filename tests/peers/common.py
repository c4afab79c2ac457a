"""What the peer checks share: the document protocol of `osprey eval`, its per-token files, and the comparison.

Protocol: the text is split at the separator, documents are trimmed and empty ones dropped, the first N are kept; each starts with the
tokenizer's BOS where it has one and is cut to the context; the negative log-likelihood is averaged over predicted tokens.

A per-token file has one JSON object per line: {"document": d, "position": p, "token": id, "nll": x, "top1": id}, documents from 0 and
positions within the document's ids. A line whose `nll` is null gives an id that nothing predicts (the first of a document); where it is
left out, the engine's BOS stands at position 0.
"""

import argparse
import json
import sys

import numpy as np


class Mistake(Exception):
    """Something the caller gave is wrong."""


def arguments(description, model):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help=model)
    parser.add_argument("text", nargs="?", help="documents; not needed when the ids come from --osprey and their check is not wanted")
    parser.add_argument("--separator", default="<|endoftext|>")
    parser.add_argument("--max-documents", type=int)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--ids", help="JSON list of id lists to use instead of the engine's own tokenizer")
    parser.add_argument("--osprey", help="per-token file of `osprey eval --tokens`: its ids are used, its figures compared")
    parser.add_argument("--write", help="write the engine's per-token file here")
    parser.add_argument("--against", help="second model (GGUF file or Hugging Face directory) for the mean KL divergence from it")
    parser.add_argument("--max-nll-difference", type=float, help="limit of |nll per token - Osprey's|")
    parser.add_argument("--min-top1", type=float, help="least share of tokens whose most likely successor is Osprey's")
    parser.add_argument("--max-tokenizer-differences", type=int, help="documents that the engine's tokenizer may cut otherwise")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def documents(path, separator, count):
    with open(path, encoding="utf-8") as file:
        found = [part.strip() for part in file.read().split(separator)]
    return [part for part in found if part][:count]


def read_tokens(path):
    """Per document a list of lines in the order of their positions."""
    found = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            entry = json.loads(line)
            if entry["document"] == len(found):
                found.append([])
            elif entry["document"] != len(found) - 1:
                raise Mistake(f"{path}:{number}: document {entry['document']} follows document {len(found) - 1}")
            previous = found[-1][-1]["position"] if found[-1] else min(entry["position"], 1) - 1
            if entry["position"] != previous + 1:
                raise Mistake(f"{path}:{number}: position {entry['position']} follows position {previous}")
            found[-1].append(entry)
    return found


def ids_of(lines, bos):
    ids = [line["token"] for line in lines]
    if lines[0]["position"] == 0:
        return ids
    if bos is None:
        raise Mistake("the first id of a document is missing and the engine knows no BOS: let position 0 be written with a null nll")
    return [bos, *ids]


def score(logits, ids):
    """(nll, most likely id) of every predicted token, from the logits at each position but the last."""
    log_probabilities = log_softmax(logits[: len(ids) - 1])
    return -log_probabilities[np.arange(len(ids) - 1), ids[1:]], log_probabilities.argmax(-1)


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def divergence(reference, other):
    """KL(reference || other) of every row."""
    p, q = log_softmax(reference), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)


class Tally:
    """Sums over all documents of one evaluation."""

    def __init__(self):
        self.nll, self.top1, self.lines, self.kl = [], [], [], []

    def add(self, document, ids, logits, against):
        nll, top1 = score(logits, ids)
        self.nll.append(nll)
        self.top1.append(top1)
        self.lines.append({"document": document, "position": 0, "token": int(ids[0]), "nll": None, "top1": None})
        for i, (x, best) in enumerate(zip(nll, top1), 1):
            self.lines.append({"document": document, "position": i, "token": int(ids[i]), "nll": float(x), "top1": int(best)})
        if against is not None:
            self.kl.append(divergence(against[: len(ids) - 1], logits[: len(ids) - 1]))

    def report(self):
        nll = np.concatenate(self.nll)
        figures = {"nll_per_token": float(nll.mean()), "tokens": len(nll), "documents": len(self.nll)}
        if self.kl:
            figures["kl_mean"] = float(np.concatenate(self.kl).mean())
        return figures

    def compare(self, osprey):
        predicted = [line for lines in osprey for line in lines if line["nll"] is not None]
        nll, top1 = np.concatenate(self.nll), np.concatenate(self.top1)
        if len(predicted) != len(nll):
            raise Mistake(f"Osprey predicted {len(predicted)} tokens, the engine {len(nll)}: is --context the one of `osprey eval`?")
        difference = nll - np.array([line["nll"] for line in predicted])
        agreement = (top1 == np.array([line["top1"] for line in predicted])).mean()
        return {
            "osprey_nll_per_token": float(np.mean([line["nll"] for line in predicted])),
            "nll_difference": float(difference.mean()),
            "nll_difference_largest": float(np.abs(difference).max()),
            "top1_agreement": float(agreement),
        }


def gather_ids(options, engine, osprey):
    """Ids of every document, and in how many documents the engine's own tokenizer gives others (None without a text)."""
    texts = documents(options.text, options.separator, options.max_documents) if options.text else None
    own = [engine.tokenize(text)[: options.context] for text in texts] if texts else None
    if osprey is not None:
        given = [ids_of(lines, engine.bos) for lines in osprey]
    elif options.ids:
        with open(options.ids, encoding="utf-8") as file:
            given = [ids[: options.context] for ids in json.load(file)]
    elif own is not None:
        return own, None
    else:
        raise Mistake("give a text, --ids or --osprey")
    if own is None:
        return given, None
    if len(own) != len(given):
        raise Mistake(f"the text holds {len(own)} documents, the given ids {len(given)}: are separator and count the same?")
    return given, sum(a != b for a, b in zip(own, given))


def failures(options, figures):
    limits = [
        ("nll_difference", options.max_nll_difference, lambda x, limit: abs(x) <= limit),
        ("top1_agreement", options.min_top1, lambda x, limit: x >= limit),
        ("tokenizer_differences", options.max_tokenizer_differences, lambda x, limit: x <= limit),
    ]
    for name, limit, holds in limits:
        if limit is None:
            continue
        if name not in figures:
            raise Mistake(f"a limit of {name} needs --osprey" + (" or --ids, and a text" if name == "tokenizer_differences" else ""))
        if not holds(figures[name], limit):
            yield f"{name} is {figures[name]:.6g}, the limit {limit:.6g}"


def evaluate(options, engine, against):
    osprey = read_tokens(options.osprey) if options.osprey else None
    all_ids, differences = gather_ids(options, engine, osprey)
    tally = Tally()
    for document, ids in enumerate(all_ids):
        if len(ids) > 1:
            tally.add(document, ids, engine.logits(ids), against.logits(ids) if against else None)
    if not tally.nll:
        raise Mistake("no document has a token to predict")
    figures = tally.report()
    if osprey is not None:
        figures |= tally.compare(osprey)
    if differences is not None:
        figures["tokenizer_differences"] = differences
    if options.write:
        with open(options.write, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in tally.lines)
    return figures


def run(options, open_engine):
    """Evaluates, prints the figures as JSON and ends the program: 0, 1 when a limit is passed, 2 for a mistake."""
    from engines import open_any

    try:
        against = open_any(options.against, options) if options.against else None
        figures = evaluate(options, open_engine(options), against)
        print(json.dumps(figures, indent=1))
        passed = list(failures(options, figures))
    except (Mistake, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for line in passed:
        print(f"check failed: {options.model}: {line}", file=sys.stderr)
    sys.exit(1 if passed else 0)
