"""Writes a trained model as a GGUF file: matrices in Q8_0, norms in F32, vocabulary and template.

python export.py runs/chat runs/tokenizer.json ../python/tabagent_model/assets/tiny-chat.gguf
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from tokenizers import Tokenizer

import tokenizer as vocabulary
from model import Shape
from sample import TEMPLATE

DESCRIPTIONS = {
    "tiny-chat": "The tiny chat model that comes with tabagent_model, for tests and first steps.",
    "tiny-draft": "The draft model for tiny-chat: same vocabulary, a fifth of the work.",
}


def export(checkpoint: Path, tokenizer: Tokenizer, path: Path) -> None:
    shape = Shape(**json.loads(checkpoint.with_suffix(".json").read_text()))
    writer = GGUFWriter(path, "llama")
    _describe(writer, path.stem, shape)
    _add_vocabulary(writer, vocabulary.Vocabulary.of(tokenizer))
    with np.load(checkpoint.with_suffix(".npz")) as weights:
        for name, weight in weights.items():
            if not name.endswith(".weight") or "/" in name:  # the optimiser's
                continue
            if weight.ndim == 1:
                writer.add_tensor(name, weight.astype(np.float32))
            else:
                kind = GGMLQuantizationType.Q8_0
                writer.add_tensor(name, quantize(weight.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(
        f"{path.name}: {shape.num_parameters:,} parameters, {path.stat().st_size / 2**20:.1f} MiB"
    )


def _describe(writer: GGUFWriter, name: str, shape: Shape) -> None:
    writer.add_name(name)
    writer.add_description(DESCRIPTIONS.get(name, name))
    writer.add_license("MIT")
    writer.add_size_label(f"{shape.num_parameters / 1e6:.1f}M")
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)


def _add_vocabulary(writer: GGUFWriter, words: vocabulary.Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.PRE_TOKENIZER)
    writer.add_token_list(words.tokens)
    writer.add_token_merges(words.merges)
    writer.add_token_types(words.types)
    writer.add_bos_token_id(vocabulary.END_OF_TEXT)
    writer.add_pad_token_id(vocabulary.END_OF_TEXT)
    writer.add_eos_token_id(vocabulary.TURN_END)
    writer.add_eot_token_id(vocabulary.TURN_END)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint as GGUF.")
    parser.add_argument(
        "checkpoint", type=Path, help="the path that train.py wrote, without suffix"
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("gguf", type=Path)
    arguments = parser.parse_args()
    export(arguments.checkpoint, Tokenizer.from_file(str(arguments.tokenizer)), arguments.gguf)


if __name__ == "__main__":
    main()
