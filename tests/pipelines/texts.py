"""Tokenizers and text encoders for reduced pipelines, a few thousand random weights each."""

import functools
from typing import Any

from bases import t5_words
from tiny import LETTERS, clip_tokenizer

LINES = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n",
    "Describe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency with "
    "the original input where appropriate.",
    "You are an assistant designed to generate superior images. You are a promt engineer.",
)
SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text or '<|image_pad|>' }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH = 32
CLIP_SIZE = 2 * len(LETTERS) + 2


def clip_words(length: int = 77):
    return clip_tokenizer(length, CLIP_SIZE - 2, CLIP_SIZE - 1)


def clip(width: int = WIDTH, projection: bool = False, length: int = 77):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=CLIP_SIZE, hidden_size=width, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=length, projection_dim=width,
        bos_token_id=CLIP_SIZE - 2, eos_token_id=CLIP_SIZE - 1, pad_token_id=CLIP_SIZE - 1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_tokens(length: int = 96):
    tokenizer = t5_words()
    tokenizer.model_max_length = length
    return tokenizer


def t5(multilingual: bool = False, width: int = WIDTH):
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    model, config = (UMT5EncoderModel, UMT5Config) if multilingual else (T5EncoderModel, T5Config)
    return model(config(vocab_size=99, d_model=width, d_kv=8, d_ff=40, num_layers=2, num_heads=4))


@functools.cache
def _byte_pairs() -> str:
    """A byte-level BPE of a few hundred tokens that has the words of :data:`LINES`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer.to_str()


def words(length: int = 512):
    """A tokenizer as Llama 3, GLM and Mistral have them."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer.from_str(_byte_pairs())
    first = "<|im_start|>"
    pairs.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, _token(first))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pairs, pad_token="<|endoftext|>",
        eos_token="<|endoftext|>", bos_token="<|im_start|>", model_max_length=length,
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen_words(length: int = 1024):
    import json

    from transformers import Qwen2Tokenizer

    model = json.loads(_byte_pairs())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=merges, extra_special_tokens=list(SPECIALS[1:])
    )
    tokenizer.model_max_length, tokenizer.chat_template = length, CHAT
    return tokenizer


def gemma_words(length: int = 256):
    from transformers import GemmaTokenizer

    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS, *",.:<>-"]
    tokenizer = GemmaTokenizer(
        vocab={token: i for i, token in enumerate(marks)}, merges=[], add_bos_token=True
    )
    tokenizer.model_max_length = length
    return tokenizer


SIZES: dict[str, Any] = {
    "vocab_size": 800, "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0,
}  # fmt: skip


def language_model(name: str, **sizes: Any):
    """A model of transformers, by the name of its class."""
    import transformers

    kind: Any = getattr(transformers, name)
    return kind(kind.config_class(**{**SIZES, **sizes}))


EYES: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 40}
"""What sees pictures, for a language model."""
PATCHES: dict[str, Any] = {
    **EYES, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
}  # fmt: skip


def _seeing() -> dict[str, Any]:
    """A language model's sizes with Qwen's positions of pictures."""
    return {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}


def _token(name: str) -> int:
    return SPECIALS.index(name)


def qwen_vl():
    """Qwen2.5-VL: a language model that sees pictures, of two layers each."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**_seeing(), "num_hidden_layers": 2},
            vision_config={
                **EYES, "depth": 2, "num_heads": 2, "out_hidden_size": WIDTH,
                "fullatt_block_indexes": [1], "window_size": 56,
            },
            image_token_id=_token("<|image_pad|>"),
            video_token_id=_token("<|video_pad|>"),
            vision_start_token_id=_token("<|vision_start|>"),
            vision_end_token_id=_token("<|vision_end|>"),
        )
    )  # fmt: skip


def qwen_processor():
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    sides = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sides), qwen_words(), Qwen2VLVideoProcessor(), chat_template=CHAT
    )


def qwen3_vl(words: bool = False):
    """Qwen3-VL without what makes words of its states, or with it."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

    return (Qwen3VLForConditionalGeneration if words else Qwen3VLModel)(
        Qwen3VLConfig(
            text_config=_seeing(),
            vision_config={
                **EYES, "depth": 1, "num_heads": 2, "out_hidden_size": WIDTH,
                "deepstack_visual_indexes": [0],
            },
        )
    )  # fmt: skip


def qwen3_processor():
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(), qwen_words(), Qwen3VLVideoProcessor(), chat_template=CHAT
    )


def gemma3():
    """Gemma 3 with its eyes, as LTX-2 has it."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(text_config=SIZES, vision_config=PATCHES)
    return Gemma3ForConditionalGeneration(config)


def mistral():
    """What FLUX.2 has: Mistral 3 with its picture tower."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={**SIZES, "model_type": "mistral"},
            vision_config={**PATCHES, "model_type": "pixtral", "head_dim": 16},
            image_token_index=_token("[IMG]"),
        )
    )


def mistral_processor():
    from transformers import PixtralImageProcessor, PixtralProcessor

    return PixtralProcessor(PixtralImageProcessor(), words(), chat_template=CHAT)
