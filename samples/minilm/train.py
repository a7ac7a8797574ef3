"""Train the sample's adapter: LoRA on every linear layer of all-MiniLM-L6-v2, for docstring → name retrieval.

The loss is contrastive: in a batch of pairs each query has to pick its own name among all names of the batch, and each
name its query. A batch is made of runs of pairs of one module each, because telling `Message.get_params` from
`Message.get_param` is the hard part, and telling it from `calendar.HTMLCalendar` is not.

The dev modules (not the committed held-out ones) tell after each epoch whether training still helps.

    python -m samples.minilm.train
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samples.minilm.dataset import Pair, held_out_pairs, training_pairs
from samples.minilm.encoders import load_base, load_peft, load_tokenizer, quiet_peft, torch_encoder
from samples.minilm.evaluate import mrr, tokenize
from samples.minilm.weights import MODEL_ID, minilm_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

ADAPTER = Path(__file__).with_name("adapter")
# The pooler is left out: mean pooling never reads it, so it would get no gradient.
CHUNK = 16
TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the adapter becomes."""

    rank: int = 4
    alpha: int = 16
    dropout: float = 0.1
    learning_rate: float = 1e-3
    epochs: int = 3
    batch_size: int = 64
    run_length: int = 8
    temperature: float = 0.05
    seed: int = 0


def batches(pairs: list[Pair], recipe: Recipe, rng: random.Random) -> Iterator[list[Pair]]:
    """One epoch: runs of pairs of one module, the runs shuffled, then cut into batches."""
    by_module: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_module.setdefault(pair.module, []).append(pair)
    runs: list[list[Pair]] = []
    for group in by_module.values():
        rng.shuffle(group)
        runs += [group[i : i + recipe.run_length] for i in range(0, len(group), recipe.run_length)]
    rng.shuffle(runs)
    flat = [pair for run in runs for pair in run]
    for start in range(0, len(flat) - recipe.batch_size + 1, recipe.batch_size):
        yield flat[start : start + recipe.batch_size]


def vectors(model: nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """What `evaluate.embed` computes, with gradients; in chunks of like length, which halves the time."""
    import torch

    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    chunks = [_pooled(model, tokenizer, [texts[i] for i in order[k : k + CHUNK]]) for k in range(0, len(order), CHUNK)]
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(chunks)[back]


def _pooled(model: nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    import torch

    batch = {name: torch.from_numpy(array) for name, array in tokenize(tokenizer, texts).items()}
    weights = batch["attention_mask"].unsqueeze(-1).to(torch.float32)
    hidden = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def contrastive_loss(queries: torch.Tensor, names: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross entropy of the similarity matrix against its diagonal, over rows and over columns."""
    import torch

    logits = queries @ names.T / temperature
    own = torch.arange(len(logits))
    entropy = torch.nn.functional.cross_entropy
    return (entropy(logits, own) + entropy(logits.T, own)) / 2


def lora_model(folder: Path, recipe: Recipe) -> Any:
    """The frozen base with fresh LoRA modules, whose B is zero: it scores what the base scores."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=TARGETS,
    )
    with quiet_peft():
        return get_peft_model(load_base(folder), config)


def train(recipe: Recipe) -> Any:
    """Train, and report the dev score before and after each epoch."""
    import torch

    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    folder = minilm_folder()
    tokenizer, model = load_tokenizer(folder), lora_model(folder, recipe)
    pairs, dev = training_pairs("train"), training_pairs("dev")
    print(f"{len(pairs)} training pairs, dev MRR {mrr(torch_encoder(model), tokenizer, dev):.4f}", flush=True)

    epochs = [list(batches(pairs, recipe, rng)) for _ in range(recipe.epochs)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=sum(map(len, epochs)), pct_start=0.1
    )
    for number, epoch in enumerate(epochs, 1):
        start, total = time.monotonic(), 0.0
        model.train()
        for batch in epoch:
            queries = vectors(model, tokenizer, [pair.query for pair in batch])
            names = vectors(model, tokenizer, [pair.name for pair in batch])
            loss = contrastive_loss(queries, names, recipe.temperature)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        score = mrr(torch_encoder(model.eval()), tokenizer, dev)
        seconds = time.monotonic() - start
        print(f"epoch {number}: loss {total / len(epoch):.4f}, dev MRR {score:.4f}, {seconds:.0f} s", flush=True)
    return model


def save(model: Any, out: Path) -> None:
    """Write the two files of a PEFT adapter, in float16, with the model's public name for a base.

    `save_pretrained` would add a model card and the path of this machine's copy of the base.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    halves = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in tensors.items()}
    save_file(halves, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = MODEL_ID
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(out))


def main() -> None:
    """Train with the committed recipe, save, and score what was saved on the held-out modules."""
    import torch

    parser = argparse.ArgumentParser(description="Train the sample adapter.")
    parser.add_argument("--out", type=Path, default=ADAPTER, help="the adapter's folder")
    parser.add_argument("--threads", type=int, default=1, help="one thread makes the run repeatable")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    save(train(Recipe()), options.out)

    folder, pairs = minilm_folder(), held_out_pairs()
    tokenizer = load_tokenizer(folder)
    base = mrr(torch_encoder(load_base(folder)), tokenizer, pairs)
    adapted = mrr(torch_encoder(load_peft(folder, options.out)), tokenizer, pairs)
    print(f"held-out MRR: base {base:.4f}, adapted {adapted:.4f}")


if __name__ == "__main__":
    main()
