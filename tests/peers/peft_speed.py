"""Speed of LoRA fine-tuning in Python PEFT: the peer of `osprey bench train` on a recipe with [finetune].

    python tests/peers/peft_speed.py BASE --rows 8 --tokens 256 --rank 16 --threads 2

Random tokens, all matrices of the blocks adapted, AdamW, float32. The same recipe for Osprey: finetune.base = BASE, finetune.context =
tokens, train.batch = rows. Prints tokens per second of the median step and the growth of resident memory over the loaded base.
"""

import argparse
import json
import resource
import time

import peft
import torch
import transformers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="train every weight instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    if not options.full:
        every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=options.rank, lora_alpha=32, target_modules=every, task_type="CAUSAL_LM"))
    model.train()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    times = []
    for _ in range(options.steps + 2):
        batch = torch.randint(3, model.config.vocab_size, (options.rows, options.tokens))
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
    step = sorted(times[2:])[len(times[2:]) // 2]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    figures = {"tokens_per_second": options.rows * options.tokens / step, "step_milliseconds": step * 1e3, "memory_growth_bytes": grown}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
