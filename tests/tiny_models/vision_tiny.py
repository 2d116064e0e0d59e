"""Tiny policies that see images, with their own tokenizers and image converters."""

import struct
import zlib

import keras_hub
import numpy as np
import serving_tiny
from assembling import GEMMA_PIECES, sentence_pieces
from families import ALL_FAMILIES, IMAGE_SIZE, MROPE, PATCH_SIZE, qwen3_5_encoder

TURNS = ["<start_of_turn>", "<end_of_turn>"]
PIECES = {
    "gemma3": ["<start_of_image>", "<img>", "<end_of_image>"],
    "gemma4": ["<|image>", "<|image|>", "<image|>", "<|video|>", "<|turn>", "<turn|>"],
    "pali_gemma": [],
}
QWEN_MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SCALE = {"scale": 1 / 127.5, "offset": -1.0}
LENGTH = 64


def png(seed, height=IMAGE_SIZE, width=IMAGE_SIZE):
    """Encode a picture of noise as PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def pieces(family):
    options = {**GEMMA_PIECES, "user_defined_symbols": TURNS + PIECES[family]}
    return sentence_pieces(serving_tiny.CORPUS, 340, **options)


def _attached(family, tokenizer, preprocessor, **settings):
    make = ALL_FAMILIES.get(f"{family}_vision") or ALL_FAMILIES[family]
    policy = make(vocabulary_size=tokenizer.vocabulary_size(), **settings)
    policy.preprocessor = preprocessor
    return policy


def gemma3():
    tokenizer = keras_hub.models.Gemma3Tokenizer(pieces("gemma3"))
    converter = keras_hub.layers.Gemma3ImageConverter(image_size=(IMAGE_SIZE, IMAGE_SIZE), **SCALE)
    preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(
        tokenizer, converter, sequence_length=LENGTH, num_vision_tokens_per_image=4
    )
    return _attached("gemma3", tokenizer, preprocessor)


def gemma4():
    tokenizer = keras_hub.models.Gemma4Tokenizer(pieces("gemma4"))
    converter = keras_hub.layers.Gemma4ImageConverter(
        patch_size=PATCH_SIZE, max_soft_tokens=4, pooling_kernel_size=2, scale=1 / 255
    )
    preprocessor = keras_hub.models.Gemma4CausalLMPreprocessor(
        tokenizer,
        converter,
        sequence_length=LENGTH,
        num_vision_tokens_per_image=4,
        audio_input_feat_size=0,  # the model has no audio encoder
    )
    return _attached("gemma4", tokenizer, preprocessor)


def qwen3_5(moe=False):
    """Qwen 3.5, dense or a mixture of experts."""
    family = "Qwen3_5Moe" if moe else "Qwen3_5"
    vocabulary, merges = serving_tiny.bpe()
    marks = ["<|im_start|>", "<|im_end|>", *QWEN_MARKS]
    known = {mark: len(vocabulary) + place for place, mark in enumerate(marks)}
    # As KerasHub reads a Hugging Face directory.
    tokenizer = getattr(keras_hub.models, f"{family}Tokenizer")(
        {**vocabulary, **known}, merges, unsplittable_tokens=["<|endoftext|>", *marks]
    )
    converter = keras_hub.layers.Qwen3_5ImageConverter(
        patch_size=PATCH_SIZE, min_pixels=64, max_pixels=IMAGE_SIZE * IMAGE_SIZE, **SCALE
    )
    preprocessor = getattr(keras_hub.models, f"{family}CausalLMPreprocessor")(
        tokenizer, converter, sequence_length=LENGTH
    )
    if not moe:
        return _attached("qwen3_5", tokenizer, preprocessor)
    seeing = {"vision_encoder": qwen3_5_encoder("float32"), "mrope_section": MROPE}
    return _attached("qwen3_5_moe", tokenizer, preprocessor, **seeing)


def pali_gemma():
    tokenizer = keras_hub.models.PaliGemmaTokenizer(pieces("pali_gemma"))
    size = (IMAGE_SIZE, IMAGE_SIZE)
    converter = keras_hub.layers.PaliGemmaImageConverter(image_size=size, **SCALE)
    preprocessor = keras_hub.models.PaliGemmaCausalLMPreprocessor(
        tokenizer, converter, sequence_length=LENGTH
    )
    return _attached("pali_gemma", tokenizer, preprocessor)
